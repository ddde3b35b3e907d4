"""Trainings in processes of their own, and what ends them at the moments that matter."""

import contextlib
import json
import math
import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from protojax import errors, progress

_SEAL, _TEMPORARY = "seal.json", ".orbax-checkpoint-tmp"
_POLL = 0.001  # seconds
MOMENTS = ("step", "save", "before the seal", "sealed, not yet named", "look", "start")


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
