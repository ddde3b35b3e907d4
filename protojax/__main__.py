"""`protojax VERB ...` and `python -m protojax VERB ...`: the programs under one name."""

import difflib
import importlib.metadata
import os
import runpy
import sys

import protojax

VERBS = {
  "train": "train a run, or go on with one",
  "plan": "what a step takes of a TPU slice that is not here: memory, time, messages",
  "evaluate": "accuracy of a run's features, with the protocol beside it",
  "doctor": "are prototypes copies, and are they used; also what a log says",
  "report": "one HTML page about a run or several",
  "convert": "weights from other libraries and to them",
  "embed": "features of every image of a folder or data set",
  "replay": "which layer broke in a step whose loss was not finite",
  "verify-resume": "does a killed run end as a whole one, on this machine",
  "prepare": "CIFAR, or images of yours at the size that training stores",
}
MODULES = {verb: verb for verb in VERBS} | {
  "train": "main",
  "verify-resume": "verify_resume",
}  # in protojax/


def run() -> None:
  """Runs the program that the first argument names, as `python -m protojax.MODULE` would."""
  verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if verb in (*VERBS, "main"):
    if os.getcwd() not in sys.path:  # as under `python -m`: for modules of the user's own
      sys.path.append(os.getcwd())
    del sys.argv[1]
    runpy.run_module(f"protojax.{MODULES.get(verb, verb)}", run_name="__main__", alter_sys=True)
    return
  lines = "\n".join(f"  {name:<14} {what}" for name, what in VERBS.items())
  if verb in ("--help", "-h"):
    print(f"protojax VERB ..., each with --help\n\n{lines}")
    return
  if verb == "--version":
    print(f"protojax {protojax.__version__}, jax {importlib.metadata.version('jax')}")
    return
  near = difflib.get_close_matches(verb, VERBS, 1)
  hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(VERBS)}"
  print(f"protojax: there is no {verb!r}: {hint}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  run()
