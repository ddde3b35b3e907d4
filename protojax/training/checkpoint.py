"""Checkpoints of a run: saved in the background, restored to the bit, never half-written.

The only file that imports orbax. Folder <workdir>/checkpoints/<step> holds the state, a small JSON
(`metadata`) and `seal.json`, checksums of the files and shapes of the leaves. It gets its name when
all of that is on disk. Without our seal, orbax would read a flipped bit as if nothing had happened.
"""

import contextlib
import errno
import functools
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from protojax import errors, files

PyTree = Any
_SEAL = "seal.json"
_TEMPORARY = ".orbax-checkpoint-tmp"  # orbax's own suffix
_WORDS = 512  # bytes of what processes tell each other
_START_ANEW = (
  "bring these files back from a backup, choose another workdir, or set config.overwrite=True, "
  "which deletes the whole run"
)


def _not_from_orbax(record) -> bool:
  return f"{os.sep}orbax{os.sep}" not in record.pathname


def _sum(path: pathlib.Path) -> int:
  """CRC-32 of a file."""
  crc = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 22):
      crc = zlib.crc32(block, crc)
  return crc


def _size(tree: PyTree) -> int:
  """Bytes of all leaves, over all processes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shapes(tree: PyTree) -> dict[str, str]:
  """{"encoder/head/kernel": "float32[4, 6]"}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  return {name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def leaves(workdir: str | os.PathLike) -> dict[str, str] | None:
  """{"carry/probe/params/bias": "float32[10]", ...} of the newest sealed checkpoint, or None."""
  folder = pathlib.Path(workdir) / "checkpoints"
  for step in reversed(steps(workdir)):
    with contextlib.suppress(ValueError, OSError):
      return _sealed(folder / str(step))[1]
  return None


def _sealed(folder: pathlib.Path) -> tuple[dict[str, int], dict[str, str]]:
  """({file: its sum}, {leaf: its shape}) as a checkpoint's seal says; ValueError if damaged."""
  said = files.parse_json((folder / _SEAL).read_text())
  if isinstance(said, dict):
    sums, shapes = said.get("files"), said.get("leaves")
    if isinstance(sums, dict) and isinstance(shapes, dict):
      inside = folder.resolve()
      for name in sums:
        if "\0" in name or not (folder / name).resolve().is_relative_to(inside):
          raise ValueError(f"a file outside of the checkpoint: {errors.in_line(name)}")
      return sums, {name: str(shape) for name, shape in shapes.items()}
  raise ValueError("it lacks files or leaves")


def steps(workdir: str | os.PathLike) -> list[int]:
  """The steps whose checkpoints are in a run's folder, in order; read or not, whole or not."""
  folder = pathlib.Path(workdir).expanduser() / "checkpoints"
  return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def on_host(workdir: str | os.PathLike) -> dict[str, np.ndarray]:
  """{"teacher/encoder/head/fc1/kernel": array} of a run's newest checkpoint, of whatever program.

  Raises:
    UserError: if there is none.
  """
  folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
  there = steps(workdir)
  if not there:
    raise errors.UserError(f"there is no checkpoint in {folder}")
  handler = ocp.PyTreeCheckpointHandler()
  state = folder / str(there[-1]) / "state"
  as_numpy = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(state).tree
  )
  tree = handler.restore(state, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
  name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  return {name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def intact(workdir: str | os.PathLike) -> str:
  """What there is to go on from, where a run breaks off: "checkpoint 30 is intact"."""
  there = steps(workdir)
  return f"checkpoint {there[-1]} is intact" if there else "there is no checkpoint yet"


def _one_line(error: Exception) -> str:
  first, *_ = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {errors.in_line(first, 200)}"


def of_first(find: Callable[[], str | None]) -> str | None:
  """What process 0 finds, in every process: a pod's hosts would read the same files again."""
  if jax.process_count() == 1:
    return find()
  found = (find() or "" if jax.process_index() == 0 else "").encode()[:_WORDS]
  told = multihost_utils.broadcast_one_to_all(np.frombuffer(found.ljust(_WORDS, b"\0"), np.uint8))
  return bytes(told).rstrip(b"\0").decode(errors="replace") or None


class Checkpoints:
  """The checkpoints of one run. Every process makes the same calls in the same order.

  A save runs in the background; if it fails because of the disk, the next call of any method says
  so in one line (UserError).

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
    self._newest = None  # step of the last save or restore
    self._unreadable = []  # newer than the restored one
    self._shapes = {}  # of the state that is being saved
    self._saving = False  # what nobody has waited for yet
    self._swept = False
    if keep < 2:
      raise errors.UserError(f"keep_checkpoints={keep}: keep at least 2, in case one is damaged")
    if self._folder.is_file():
      raise errors.UserError(f"{self._folder} is not a folder: choose another workdir")
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
      ValueError: if a later step is there already.
    """
    self.wait()
    self._newest = step
    with self._reporting():
      manager = self._open()
      if not self._swept:
        self._sweep()
      while self._unreadable:
        manager.delete(self._unreadable.pop())
      steps = manager.all_steps()
      if steps and max(steps) > step:
        raise ValueError(f"{self._folder} holds step {max(steps)}, later than {step}")
      if step not in steps:
        self._require_space(state)
        self._shapes = _shapes(state)
        items = {"state": ocp.args.StandardSave(state), "metadata": ocp.args.JsonSave(metadata)}
        self._saving = True
        manager.save(step, args=ocp.args.Composite(**items), force=True)

  def room(self, state: PyTree) -> tuple[int, int]:
    """Whether the checkpoints of a run will fit on its disk.

    Args:
      state: pytree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      (bytes that they may still take: those kept and one that is being written, less those that
      are there; bytes that are free).

    Raises:
      UserError: if not a single one fits.
    """
    size, free = _size(state), self._free()
    there = len(steps(self._folder.parent))
    if of_first(lambda: "full" if free < size else None):
      raise errors.UserError(
        f"a checkpoint takes up to {size / 1e6:,.3g} MB and {free / 1e6:,.3g} MB of the disk of "
        f"{self._folder.parent} are free: free some space, or copy the workdir to another disk and "
        f"name it there; {intact(self._folder.parent)}"
      )
    return max(1, self._keep + 1 - there) * size, free

  def _free(self) -> int:
    """Bytes; of the folder, or of what will hold it."""
    there = next(path for path in (self._folder, *self._folder.parents) if path.exists())
    return shutil.disk_usage(there).free

  def _require_space(self, state: PyTree) -> None:
    """Refuses beforehand, all processes at once: orbax leaves a mess if space ends half-way."""
    if of_first(lambda: "full" if self._free() < _size(state) else None):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def _seal(self) -> None:
    """orbax calls it in process 0, when all is written but not yet named."""
    folder = self._folder / f"{self._newest}{_TEMPORARY}"
    files = sorted(f for item in ("state", "metadata") for f in (folder / item).rglob("*"))
    sums = {f.relative_to(folder).as_posix(): _sum(f) for f in files if f.is_file()}
    (folder / _SEAL).write_text(json.dumps({"files": sums, "leaves": self._shapes}))

  def _damage(self, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, if anything."""
    folder = self._folder / str(step)
    try:
      for name, expected in _sealed(folder)[0].items():
        if not (folder / name).is_file():
          return f"{errors.in_line(name)} is missing"
        if _sum(folder / name) != expected:
          return f"{errors.in_line(name)} is damaged"
    except FileNotFoundError as error:
      return f"{pathlib.Path(error.filename).relative_to(folder)} is missing"
    except ValueError as error:
      return f"{_SEAL}: {_one_line(error)}"
    except OSError as error:
      said = f"checkpoint {step} in {self._folder}: {self._away(step, error)}"
      raise errors.UserError(said) from error
    return None

  def _away(self, step: int, error: Exception) -> str:
    return (
      f"reading it failed ({_one_line(error)}): the same command tries again; if it never can, "
      f"delete {self._folder / str(step)} to go on from the one before"
    )

  def _require_fit(self, step: int, abstract: PyTree, there: dict[str, str]) -> None:
    here = _shapes(abstract)
    wrong = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    if wrong:
      leaf, its = (errors.in_line(text) for text in (wrong[0], there.get(wrong[0], "missing")))
      raise errors.UserError(
        f"checkpoint {step} in {self._folder} is of another program: {leaf} is "
        f"{its} there and {here.get(wrong[0], 'missing')} here, "
        f"{len(wrong)} differences in all: {_START_ANEW}"
      )

  def restore_latest(
    self, abstract: PyTree | Callable[[dict[str, str]], PyTree], step: int | None = None
  ) -> tuple[int, PyTree, dict] | None:
    """The newest checkpoint that can be read, on any mesh.

    A damaged one is passed over with a warning, and removed by the next save; one that is whole and
    cannot be read at the moment is not.

    Args:
      abstract: pytree like the state, of `jax.ShapeDtypeStruct` with `sharding`; or a function that
        gives it for the `leaves` of a checkpoint.
      step: take this one and no other.

    Returns:
      (step, state, metadata), or None if there is no checkpoint.

    Raises:
      UserError: if there are checkpoints and none can be read, or the newest that is not damaged
        cannot be read now (`Missing` with several processes), `step` is not there, or the state has
        other leaves.
    """
    if (found := self._restore(abstract, step)) is None:
      return None
    self._newest, restored, reasons = found
    self._unreadable = list(reasons)
    if reasons:
      logging.warning(
        "cannot read checkpoint %s in %s: going on from checkpoint %d",
        ", ".join(reasons.values()),
        self._folder,
        self._newest,
      )
    return self._newest, restored["state"], restored["metadata"]

  def _restore(self, abstract: PyTree | Callable, only: int | None):
    """(step, items, {newer step: "step (why it could not be read)"}); None without checkpoints."""
    if not self._folder.is_dir():
      return None
    manager = self._open()
    self.wait()
    reasons, steps = {}, sorted(manager.all_steps(), reverse=True)
    if only is not None and only not in steps:
      raise errors.UserError(
        f"there is no checkpoint {only} in {self._folder}: there are {', '.join(map(str, steps))}"
      )
    for step in steps if only is None else [only]:
      reason = of_first(lambda step=step: self._damage(step))
      if reason is None:
        _, there = _sealed(self._folder / str(step))
        target = abstract(there) if callable(abstract) else abstract
        self._require_fit(step, target, there)
        wanted = {"metadata": ocp.args.JsonRestore(), "state": ocp.args.StandardRestore(target)}
        try:
          return step, manager.restore(step, args=ocp.args.Composite(**wanted)), reasons
        except Exception as error:  # orbax and tensorstore raise whatever they like
          # No damage, for the files are those that were written: not to be passed over, and
          # deleted by the next save. Perhaps it befell this process alone.
          said = f"checkpoint {step} in {self._folder} is whole, but {self._away(step, error)}"
          raise (errors.UserError if jax.process_count() == 1 else errors.Missing)(said) from error
      reasons[step] = f"{step} ({reason})"
    if reasons:
      raise errors.UserError(
        f"no checkpoint in {self._folder} can be read: {', '.join(reasons.values())}: bring these "
        "files back from a backup, or train again in another workdir, with the same numbers; "
        "config.overwrite=True deletes the whole run, its log and exported/, too"
      )
    return None

  def check_errors(self) -> None:
    """Raises what a save in the background has raised by now, without waiting for it.

    orbax's own `check_for_errors` forgets the error it raises. Asked in the moment before orbax's
    last thread looks, it lets that one believe in the save and delete the oldest checkpoint for it.
    """
    if self._saving and self._manager is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when the last save is on disk."""
    if self._manager is not None:
      with self._reporting():
        self._manager.wait_until_finished()
      self._saving = False

  def close(self) -> None:
    """Waits for the last save and ends the background threads."""
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
      if not isinstance(error, OSError) and "os_error_code=" not in text:  # as tensorstore says it
        raise
      what, advice = _one_line(error), "mend it"
      codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # tensorstore has them as text alone
      known = error.errno if isinstance(error, OSError) and error.errno in codes else None
      known = known or next((code for code in codes if os.strerror(code) in text), None)
      if known is not None and (trouble := files.trouble(OSError(known, ""))):
        what, advice = trouble
      self._sweep()
      raise errors.UserError(
        f"{what} while saving checkpoint {self._newest} in {self._folder}: {advice} and run the "
        f"same command again; {intact(self._folder.parent)}"
      ) from error
