"""Checkpoints of a run: saved in the background, restored to the bit, never half-written.

The only file that imports orbax. A checkpoint is the folder <workdir>/checkpoints/<step> with the
state, a small JSON (`metadata`) and the sizes and checksums of both (`files.json`); it gets its
name when all of that is on disk, so whatever has a number for a name is whole. The checksums are
ours: orbax reads a flipped bit without complaint.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import zlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from protojax import config as configs
from protojax import errors

PyTree = Any
_SUMS = "files.json"
_TEMPORARY = ".orbax-checkpoint-tmp"  # orbax's own suffix
_START_ANEW = "choose another --workdir or set --config.overwrite=True"

# What may differ between the run that saved and the run that goes on: it changes where, how fast or
# how often, not what is computed. Everything else is refused, so a new option is safe by default.
_FREE = (
  "resume", "overwrite", "log_every", "save_every", "eval_every", "keep_checkpoints", "monitor.",
  "accum_steps", "model.remat", "mesh.", "data.data_dir", "data.num_workers", "probe.data_dir",
  "probe.test_split", "probe.k", "probe.temperature", "probe.limit",
  # Compared as the steps they come to:
  "num_epochs", "optim.warmup_epochs", "optim.freeze_prototypes_epochs",
)  # fmt: skip


def refuse_mismatch(metadata: dict, config) -> None:
  """Refuses to go on with a run under settings that would make it another run.

  Args:
    metadata: of a checkpoint; {"config": nested dict}.
    config: resolved. Settings that only one side knows (another version's) are not compared.

  Raises:
    UserError: one line that names every setting that differs, with both values.
  """
  old, new = (json.loads(json.dumps(configs.flat(c))) for c in (metadata["config"], config))
  differing = [
    f"{key} {old[key]} -> {value}"
    for key, value in new.items()
    if key in old and old[key] != value
    and not any(key == free or (free[-1] == "." and key.startswith(free)) for free in _FREE)
  ]  # fmt: skip
  if differing:
    raise errors.UserError(
      f"the workdir holds a run with other settings: {', '.join(differing)}: {_START_ANEW}"
    )


def _not_from_orbax(record) -> bool:
  return f"{os.sep}orbax{os.sep}" not in record.pathname


def _sum(path: pathlib.Path) -> list[int]:
  """[bytes, CRC-32] of a file."""
  crc = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 22):
      crc = zlib.crc32(block, crc)
  return [path.stat().st_size, crc]


def _one_line(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class Checkpoints:
  """The checkpoints of one run. Every process makes the same calls in the same order.

  Args:
    workdir: folder of the run; nothing is made before the first save.
    keep: how many of the newest to keep, at least 2: a damaged newest needs one to fall back to.

  Raises:
    UserError: if `keep` is less than 2 or <workdir>/checkpoints is not a folder.
  """

  def __init__(self, workdir: str | os.PathLike, *, keep: int = 2):
    self._folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
    self._keep = keep
    self._manager = None
    self._newest = None  # step of the last save or restore that did not fail
    self._unreadable = []  # newer than the restored one
    self._swept = False
    if keep < 2:
      raise errors.UserError(
        f"keep_checkpoints={keep}: keep at least 2, so that a damaged one has another before it"
      )
    if self._folder.exists() and not self._folder.is_dir():
      raise errors.UserError(f"{self._folder} is not a folder: choose another --workdir")
    # Its errors come back as exceptions; its tracebacks and progress would drown ours.
    logging.get_absl_logger().addFilter(_not_from_orbax)

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
        self._folder,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
          async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
          save_root_metadata=False,
          lightweight_initialize=True,
        ),
      )
    return self._manager

  def save(self, step: int, state: PyTree, metadata: dict) -> None:
    """Starts to save; returns as soon as `state` may be donated. The same step twice is one save.

    Args:
      step: later than all that were saved before.
      state: pytree of jax arrays, typed keys included.
      metadata: JSON: {"config": ..., "version": ...}.

    Raises:
      UserError: if the disk is full, now or during the save before this one.
      ValueError: if a later step is there already.
    """
    if step == self._newest:
      return
    self.wait()
    self._newest = step
    with self._reporting():
      manager = self._open()
      if not self._swept:
        self._sweep()
      for damaged in self._unreadable:
        manager.delete(damaged)
      self._unreadable = []
      steps = manager.all_steps()
      if steps and max(steps) > step:
        raise ValueError(f"{self._folder} holds step {max(steps)}, later than {step}")
      if step not in steps:
        items = {
          "state": ocp.args.StandardSave(state),
          "metadata": ocp.args.JsonSave(metadata),
        }
        manager.save(step, args=ocp.args.Composite(**items), force=True)

  def _seal(self) -> None:
    """Adds the checksums. orbax calls it in process 0, when all is written but not yet named."""
    folder = self._folder / f"{self._newest}{_TEMPORARY}"
    files = sorted(f for item in ("state", "metadata") for f in (folder / item).rglob("*"))
    sums = {f.relative_to(folder).as_posix(): _sum(f) for f in files if f.is_file()}
    (folder / _SUMS).write_text(json.dumps(sums))

  def _damage(self, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, if anything."""
    folder = self._folder / str(step)
    try:
      for name, expected in json.loads((folder / _SUMS).read_text()).items():
        if _sum(folder / name) != expected:
          return f"{name} is damaged"
    except FileNotFoundError as error:
      return f"{pathlib.Path(error.filename).relative_to(folder)} is missing"
    except (ValueError, AttributeError, OSError) as error:
      return f"{_SUMS}: {_one_line(error)}"
    return None

  def restore_latest(self, abstract: PyTree) -> tuple[int, PyTree, dict] | None:
    """The newest checkpoint that can be read, on any mesh.

    A damaged one is passed over with a warning, and removed by the next save.

    Args:
      abstract: pytree like the state, of `jax.ShapeDtypeStruct` with `sharding`.

    Returns:
      (step, state, metadata), or None if there is no checkpoint.

    Raises:
      UserError: if there are checkpoints and none can be read.
    """
    wanted = {"state": ocp.args.StandardRestore(abstract), "metadata": ocp.args.JsonRestore()}
    found = self._first_readable(wanted)
    if found is None:
      return None
    self._newest, restored, reasons = found
    self._unreadable = list(reasons)
    if reasons:
      listed = ", ".join(f"{step} ({why})" for step, why in reasons.items())
      logging.warning(
        "cannot read checkpoint %s in %s: going on from checkpoint %d", listed, self._folder,
        self._newest,
      )  # fmt: skip
    return self._newest, restored["state"], restored["metadata"]

  def latest_metadata(self) -> dict | None:
    """The metadata of the newest checkpoint that can be read; None if there is no checkpoint.

    Raises:
      UserError: if there are checkpoints and none can be read.
    """
    found = self._first_readable({"metadata": ocp.args.JsonRestore()})
    return found and found[1]["metadata"]

  def _first_readable(self, wanted: dict):
    """(step, items, {newer step: why it could not be read}), or None without checkpoints."""
    if not self._folder.is_dir():
      return None
    manager = self._open()
    self.wait()
    reasons = {}
    for step in sorted(manager.all_steps(), reverse=True):
      reasons[step] = self._damage(step)
      if reasons[step] is None:
        try:
          items = manager.restore(step, args=ocp.args.Composite(**wanted))
        except Exception as error:  # orbax and tensorstore raise whatever they like
          reasons[step] = _one_line(error)
        else:
          del reasons[step]
          return step, items, reasons
    if reasons:
      listed = ", ".join(f"{step} ({why})" for step, why in reasons.items())
      raise errors.UserError(
        f"no checkpoint in {self._folder} can be read: {listed}: {_START_ANEW}"
      )
    return None

  def check_errors(self) -> None:
    """Raises what a save in the background has raised by now, without waiting for it.

    Raises:
      UserError: if the disk is full.
    """
    if self._manager is not None:
      with self._reporting():
        if self._manager.is_saving_in_progress():
          self._manager.check_for_errors()
        else:
          self._manager.wait_until_finished()  # it has; this raises its error

  def wait(self) -> None:
    """Returns when the last save is on disk.

    Raises:
      UserError: if the disk is full.
    """
    if self._manager is not None:
      with self._reporting():
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and ends the background threads.

    Raises:
      UserError: if the disk is full.
    """
    if self._manager is not None:
      manager, self._manager = self._manager, None
      with self._reporting():
        manager.close()

  def _sweep(self) -> None:
    """Removes what saves that were cut short have left."""
    self._swept = True
    if jax.process_index() == 0:
      for path in self._folder.glob(f"*{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)

  @contextlib.contextmanager
  def _reporting(self):
    """Turns a full or unwritable disk into one line."""
    try:
      yield
    except (OSError, ValueError) as error:
      text = str(error)
      code = getattr(error, "errno", None)
      if code is None and "os_error_code=" not in text:  # tensorstore's way to name one
        raise
      full = code in (errno.ENOSPC, errno.EDQUOT) or any(
        os.strerror(c) in text for c in (errno.ENOSPC, errno.EDQUOT)
      )
      what = "no space left on device" if full else _one_line(error)
      advice = "free some space" if full else "mend it"
      self._sweep()
      steps = [int(p.name) for p in self._folder.glob("*") if p.name.isdigit()]
      intact = f"checkpoint {max(steps)} is intact" if steps else "there is none before it"
      step, self._newest = self._newest, None
      raise errors.UserError(
        f"{what} while saving checkpoint {step} in {self._folder}: {advice} and run the same "
        f"command again; {intact}"
      ) from error
