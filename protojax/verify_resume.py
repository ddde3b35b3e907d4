"""Does a killed run end as a whole one does, here: protojax verify-resume --config=RECIPE

Trains the recipe a few steps, once undisturbed and once with `kill -9` at the moments that matter,
and compares what both leave to the bit. It trusts nothing of the machine it runs on: file system,
driver, launcher and all take part.
"""

import argparse
import pathlib
import random
import shlex
import sys
import time
from collections.abc import Sequence

from protojax import cli, errors, progress, resolving, typed
from protojax.verifying import comparing, killing

_DESCRIPTION = """\
Trains a recipe for some steps without disturbance, and again while it is killed (SIGKILL) in the
middle of a step, of a save, between a save and its seal, of a look, of the start. Then compares
every array of the state, every number of metrics.jsonl but times, and the exported weights.

  protojax verify-resume --config=quickstart --workdir=runs/verify
  protojax verify-resume --config=gmm_vit_s --workdir=/shared/verify --kills=20 \\
    --launcher='bash launch/gpu_local.sh' --config.data.name=folder \
    --config.data.data_dir=IMAGES --config.num_steps=60

--then also lets a run be stopped half-way and go on under another command, with other devices or
processes. That ends in the same numbers up to rounding, so the largest difference of a part of the
state (an encoder's parameters, their moments, the prototypes ...) or of the loss is said.

  ... --then='env JAX_NUM_CPU_DEVICES=2 python -m protojax.main'

Where nothing is typed: 24 steps, a save every 4, a look every 6, an evaluation every 12. A launcher
has to end what it started when its process group is killed."""

_USUAL = {"num_steps": 24, "save_every": 4, "monitor.every": 6, "eval_every": 12, "log_every": 1}
_TRAINING = [sys.executable, "-m", "protojax.main"]


def _parser() -> argparse.ArgumentParser:
  parser = cli.parser("verify-resume", _DESCRIPTION)
  parser.usage = "protojax verify-resume --config=RECIPE --workdir=FOLDER [--config.KEY=VALUE ...]"
  parser.add_argument("--config", metavar="RECIPE", required=True, help="NAME, FILE.py, NAME:debug")
  parser.add_argument("--workdir", required=True, help="new folder for the runs")
  parser.add_argument("--kills", type=int, default=10, help="default 10")
  parser.add_argument("--seed", type=int, default=0, help="of the moments, default 0")
  parser.add_argument("--launcher", help="what starts a training; default: python -m protojax.main")
  parser.add_argument("--then", metavar="LAUNCHER", help="another, which goes on half-way")
  parser.add_argument(
    "--tolerance",
    type=float,
    default=1e-3,
    help="what --then may be apart; default 1e-3 of a part's length",
  )
  parser.add_argument("--config.KEY", metavar="VALUE", help="changes a setting of the recipe")
  return parser


def _flags(recipe: str, changes: list[tuple[str, str | None]]) -> tuple[list[str], dict[str, int]]:
  """(the flags of the trainings, the settings that are waited for)."""
  given = dict(changes)
  lengths = {"num_steps"} & given.keys() or {"num_epochs"} & given.keys()
  usual = {k: v for k, v in _USUAL.items() if k not in given and not (k == "num_steps" and lengths)}
  changes = [*changes, *((k, str(v)) for k, v in usual.items())]
  config = typed.config(recipe, changes)
  resolving.check(config)
  if not config.num_steps:
    raise errors.UserError("config.num_epochs: give config.num_steps here, some dozens")
  flags = [f"--config.{k}" + ("" if v is None else f"={v}") for k, v in changes]
  return [f"--config={recipe}", *flags], {
    "steps": config.num_steps,
    "looks": min(config.monitor.every, config.eval_every),
  }


def main(argv: Sequence[str]) -> None:
  """The program; see --help."""
  changes, others = typed.split(argv)
  args = _parser().parse_args(others)
  if args.kills < 1:
    raise errors.UserError(f"kills={args.kills}: give 1 or more")
  flags, lengths = _flags(args.config, changes)
  folder = pathlib.Path(args.workdir).expanduser().absolute()
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise errors.UserError(f"workdir={args.workdir} is not empty: give a new folder")
  folder.mkdir(parents=True, exist_ok=True)
  runs = killing.Runs(flags, shlex.split(args.launcher) if args.launcher else _TRAINING, folder)

  def say(line: str) -> None:
    print(line, flush=True)

  whole = folder / "whole"
  say(f"{lengths['steps']} steps at once; its output: {runs.log(whole)}")
  begun = time.monotonic()
  with progress.during("the whole run"):
    runs.to_the_end(whole)
  seconds = time.monotonic() - begun
  say(f"done in {seconds:.0f} s; now with kills")
  choice, done = random.Random(args.seed), []
  while len(done) < args.kills:
    other = folder / ("killed" if not done else f"killed_from_{len(done) + 1}")
    new = killing.killed(
      runs,
      other,
      kills=args.kills - len(done),
      said=len(done),
      start=seconds / 2,
      choice=choice,
      say=say,
      **lengths,
    )
    if not new:
      raise errors.UserError(
        f"the run ended before it could be killed, after {len(done)} of {args.kills} kills: give "
        "it more steps, config.num_steps"
      )
    done += new
    wrong, compared = comparing.differences(whole, other)
    if wrong:
      more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
      raise errors.UserError(
        f"after {len(new)} kills the run in {other} differs from the whole one in "
        f"{', '.join(wrong[:3])}{more}: do not trust long runs to this machine as it is"
      )
  often = ", ".join(
    f"{moment}: {done.count(moment)}" for moment in killing.MOMENTS if moment in done
  )
  say(f"equal to the bit after {len(done)} kills ({often}): {compared}")
  if args.then:
    moved = folder / "moved"
    killing.stop_half_way(runs, moved, lengths["steps"])
    runs.to_the_end(moved, shlex.split(args.then))
    apart, leaf = comparing.largest(whole, moved)
    said = f"{apart:.1e} of its length apart at most ({leaf})"
    if apart > args.tolerance:
      raise errors.UserError(f"stopped half-way and gone on with {args.then}: {said}")
    say(f"stopped half-way, gone on with {args.then}: {said}")


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
