"""`protojax VERB ...` and `python -m protojax VERB ...`: the programs under one name."""

import runpy
import sys

VERBS = {
  "prepare": "CIFAR, or images of yours at the size that training stores",
  "main": "train a run, or go on with one",
  "evaluate": "accuracy of a run's features, with the protocol beside it",
  "doctor": "are prototypes copies, and are they used; also what a log says",
  "report": "one HTML page about a run or several",
  "convert": "weights from other libraries and to them",
  "embed": "features of every image of a folder or data set",
}


def run() -> None:
  """Runs the program that the first argument names, as `python -m protojax.VERB` would."""
  verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if verb in VERBS:
    del sys.argv[1]
    runpy.run_module(f"protojax.{verb}", run_name="__main__", alter_sys=True)
    return
  lines = "\n".join(f"  {name:<9} {what}" for name, what in VERBS.items())
  if verb in ("--help", "-h"):
    print(f"protojax VERB ..., each with --help\n\n{lines}")
    return
  print(f"protojax: there is no {verb!r}: choose {', '.join(VERBS)}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  run()
