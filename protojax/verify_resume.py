"""Does a killed run end as a whole one does, here: protojax verify-resume --config=RECIPE

Trains the recipe a few steps, once undisturbed and once with `kill -9` at the moments that matter,
and compares what both leave to the bit. It trusts nothing of the machine it runs on: file system,
driver, launcher and all take part.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from protojax import cli, errors, progress, resolving, typed

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
_SEAL, _TEMPORARY = "seal.json", ".orbax-checkpoint-tmp"
_POLL = 0.001  # seconds
_ENCODER = re.compile("/(?:backbone|head)/")  # what the name of an encoder's array goes on with
MOMENTS = ("step", "save", "before the seal", "sealed, not yet named", "look", "start")


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


class Runs:
  """Starts trainings of one recipe, ends them, and knows what a folder of theirs holds.

  Args:
    flags: --config and all --config.KEY=VALUE, as training takes them.
    launcher: the words that start a training.
    folder: where their outputs (`*.log`) and compiled programs go.
  """

  def __init__(self, flags: list[str], launcher: list[str], folder: pathlib.Path):
    self._flags, self._launcher, self._folder = flags, launcher, folder
    self._environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), **os.environ}

  @contextlib.contextmanager
  def started(self, run: pathlib.Path, launcher: list[str] | None = None) -> Iterator[Any]:
    """A training in its own process group; what is left of the group is killed at the end."""
    command = [*(launcher or self._launcher), *self._flags, f"--workdir={run}"]
    with open(self.log(run), "ab") as log:
      try:
        process = subprocess.Popen(
          command, env=self._environment, stdout=log, stderr=log, start_new_session=True
        )
      except OSError as error:
        raise errors.UserError(f"cannot start {shlex.join(command)}: {error.strerror}") from None
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()

  def log(self, run: pathlib.Path) -> pathlib.Path:
    """Where a run's output goes."""
    return self._folder / f"{run.name}.log"

  def to_the_end(self, run: pathlib.Path, launcher: list[str] | None = None) -> None:
    """Trains to the last step.

    Raises:
      UserError: if the training ends with another status than 0; with its last line.
    """
    with self.started(run, launcher) as process:
      status = process.wait()
    self.require(run, status, 0)

  def require(self, run: pathlib.Path, status: int, wanted: int) -> None:
    """Raises UserError if a training has ended otherwise than it should."""
    if status != wanted:
      lines = self.log(run).read_text(errors="replace").strip().splitlines() or ["no output"]
      raise errors.UserError(
        f"the training in {run} ended with status {status} instead of {wanted}: {lines[-1]} (all "
        f"of it: {self.log(run)})"
      )


def step_of(run: pathlib.Path) -> int:
  """Updates that the last line of a run's metrics.jsonl is about; -1 without one."""
  lines = _tail(run / "metrics.jsonl").splitlines()
  for line in reversed(lines):
    with contextlib.suppress(ValueError, KeyError):
      return json.loads(line)["step"]
  return -1


def _tail(path: pathlib.Path, size: int = 1 << 16) -> str:
  try:
    with open(path, "rb") as file:
      file.seek(max(0, path.stat().st_size - size))
      return file.read().decode(errors="replace")
  except FileNotFoundError:
    return ""


def _saving(run: pathlib.Path, step: int) -> pathlib.Path | None:
  """The unfinished folder of a checkpoint of this step or a later one."""
  for path in run.glob(f"checkpoints/*{_TEMPORARY}"):
    number = path.name.removesuffix(_TEMPORARY)
    if number.isdigit() and int(number) >= step:
      return path
  return None


def _come(moment: str, run: pathlib.Path, step: int, looks: int) -> bool:
  """Whether a moment has come for a training that is to be killed at `step` or later."""
  if moment == "start":
    return True
  if moment == "step":
    return step_of(run) >= step
  if moment == "look":
    done = step_of(run)
    return done >= step and done % looks == 0
  saving = _saving(run, step)
  if moment == "save":
    return saving is not None
  if moment == "before the seal":
    return saving is not None and (saving / "state").is_dir() and (saving / "metadata").is_dir()
  return saving is not None and (saving / _SEAL).exists()


def kill_at(
  process: Any, moment: str, run: pathlib.Path, *, step: int, looks: int, delay: float
) -> bool:
  """Waits for the moment, `delay` seconds more, and kills the training's whole process group.

  Returns:
    Whether it was killed: not if it ended before.
  """
  while process.poll() is None and not _come(moment, run, step, looks):
    time.sleep(_POLL)
  until = time.monotonic() + delay
  while process.poll() is None and time.monotonic() < until:
    time.sleep(_POLL)
  if process.poll() is not None:
    return False
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  return True


def killed(
  runs: Runs,
  run: pathlib.Path,
  *,
  kills: int,
  said: int,
  steps: int,
  looks: int,
  start: float,
  choice: random.Random,
  say: Callable[[str], None],
) -> list[str]:
  """Trains to the end and is killed on the way; returns at which moments.

  A run may end before all kills were due: the last ones come late where a machine is busy.

  Args:
    runs: starts them.
    run: new folder.
    kills: how often to kill, spread over the steps.
    said: kills before these.
    steps: of the run.
    looks: every so many steps is a look.
    start: seconds that a start takes.
    choice: draws the moments.
    say: takes a line about each.

  Raises:
    UserError: if a training ends otherwise than by our signal or with status 0.
  """
  moments: list[str] = []
  while len(moments) < kills:
    moments += choice.sample(MOMENTS, len(MOMENTS))
  done: list[str] = []
  for number, moment in enumerate(moments[:kills], 1):
    step = max(1, math.floor(number * steps / (kills + 1)))
    # A step and a look are short, a start is long; the files of a save tell themselves.
    longest = {"start": start, "step": 0.2, "look": 0.5, "save": 0.05}.get(moment, 0.0)
    with runs.started(run) as process:
      delay = choice.uniform(0.0, longest)
      ended = not kill_at(process, moment, run, step=step, looks=looks, delay=delay)
      status = process.wait()
    if ended:
      runs.require(run, status, 0)
      return done
    done.append(moment)
    say(f"kill {said + number} of {said + kills}: {moment}, the log at step {max(0, step_of(run))}")
  with progress.during("the rest of the run"):
    runs.to_the_end(run)
  return done


def stop_half_way(runs: Runs, run: pathlib.Path, steps: int) -> None:
  """Trains half of the steps and is asked to stop, as a scheduler does (SIGTERM).

  A run that has done all its steps before it is stopped is made again, and asked earlier.

  Raises:
    UserError: if it ends in another way, or cannot be stopped in time.
  """
  from protojax.training import checkpoint

  for ask in (steps // 2, steps // 4, 0):
    with runs.started(run) as process:
      while process.poll() is None and step_of(run) < ask:
        time.sleep(_POLL)
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
      status = process.wait()
    if steps not in checkpoint.steps(run):
      runs.require(run, status, 128 + signal.SIGTERM)
      return
    shutil.rmtree(run)  # all was done, whatever the signal made of its end
  raise errors.UserError(
    "the run ended before it could be stopped half-way: give it more steps, config.num_steps"
  )


def state_of(run: pathlib.Path) -> dict[str, np.ndarray]:
  """{leaf: array} of a run's newest checkpoint, on the host."""
  from protojax.training import checkpoint

  return checkpoint.on_host(run)


def records_of(run: pathlib.Path) -> dict[tuple[int, str], Any]:
  """{(step, name): number} of metrics.jsonl, without times."""
  records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return {
    (record["step"], name): value
    for record in records
    for name, value in record.items()
    if name != "step" and not name.startswith("time/")
  }


def files_of(run: pathlib.Path) -> dict[str, str]:
  """{file: SHA-256} of what a run exports."""
  paths = sorted(path for path in (run / "exported").rglob("*") if path.is_file())
  return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def _digest(x: np.ndarray) -> str:
  head = f"{x.dtype}{list(x.shape)}".encode()
  return hashlib.sha256(head + np.ascontiguousarray(x).tobytes()).hexdigest()


def differences(whole: pathlib.Path, other: pathlib.Path) -> tuple[list[str], str]:
  """What two runs left, compared to the bit.

  Returns:
    (the names of what differs or is in one alone, how much was compared).
  """
  sides = []
  for run in (whole, other):
    state = {f"state {name}": _digest(x) for name, x in state_of(run).items()}
    records = {f"{name} of step {step}": v for (step, name), v in records_of(run).items()}
    sides.append((state, records, files_of(run)))
  wrong = [
    name
    for one, two in zip(*sides, strict=True)
    for name in sorted(one.keys() | two.keys())
    if one.get(name) != two.get(name)
  ]
  counts = [len(part) for part in sides[0]]
  said = "{:,} arrays of the state, {:,} numbers of the log, {} exported files".format(*counts)
  return wrong, said


def largest(whole: pathlib.Path, other: pathlib.Path) -> tuple[float, str]:
  """(difference, of what) where two runs that ought to be equal up to rounding are furthest apart.

  Compared as vectors, |a - b| / |a| in the 2-norm, are the parts of the state: all parameters of an
  encoder together, and so its moments and statistics; each other array by itself; and the loss of
  all steps. Not an encoder's arrays one by one: a bias before a batch norm has a gradient that is
  nothing but rounding, of which Adam makes whole steps, and no output of the network shows it.
  """
  sides = []
  for run in (whole, other):
    parts = collections.defaultdict(list)
    for name, x in sorted(state_of(run).items()):
      if np.issubdtype(x.dtype, np.floating):
        parts[_ENCODER.split(name)[0]].append(x.astype(np.float64).ravel())
    for (_, name), value in sorted(records_of(run).items()):
      if name == "train/loss":
        parts["the loss in metrics.jsonl"].append(np.array([value], np.float64))
    sides.append({name: np.concatenate(found) for name, found in parts.items()})
  one, two = sides
  found = [(0.0, "none")]
  for name in one.keys() | two.keys():
    if name not in one or name not in two or one[name].shape != two[name].shape:
      return math.inf, f"{name}, which is of another shape or in one run alone"
    length = max(float(np.linalg.norm(one[name])), 1e-12)
    found.append((float(np.linalg.norm(one[name] - two[name])) / length, name))
  return max(found)


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
  runs = Runs(flags, shlex.split(args.launcher) if args.launcher else _TRAINING, folder)

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
    new = killed(
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
    wrong, compared = differences(whole, other)
    if wrong:
      more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
      raise errors.UserError(
        f"after {len(new)} kills the run in {other} differs from the whole one in "
        f"{', '.join(wrong[:3])}{more}: do not trust long runs to this machine as it is"
      )
  often = ", ".join(f"{moment}: {done.count(moment)}" for moment in MOMENTS if moment in done)
  say(f"equal to the bit after {len(done)} kills ({often}): {compared}")
  if args.then:
    moved = folder / "moved"
    stop_half_way(runs, moved, lengths["steps"])
    runs.to_the_end(moved, shlex.split(args.then))
    apart, leaf = largest(whole, moved)
    said = f"{apart:.1e} of its length apart at most ({leaf})"
    if apart > args.tolerance:
      raise errors.UserError(f"stopped half-way and gone on with {args.then}: {said}")
    say(f"stopped half-way, gone on with {args.then}: {said}")


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
