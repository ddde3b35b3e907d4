"""What a run leaves behind, and who may write into it."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from protojax import __version__, environment, errors, files, sizes, trees
from protojax import config as configs
from protojax.training import checkpoint, continuation, export, train_step, wandb_run

REPORT = "report.html"  # the page about a run
BAD_STEPS = "bad_steps.jsonl"  # updates whose loss or gradient was not finite, for replay
_OURS = (
  "config.json",
  "env.json",
  "checkpoints",
  "exported",
  "metrics.jsonl",
  BAD_STEPS,
  "train.log",
  "eval",
  "report.png",
  REPORT,
  "comparison.html",
  wandb_run.RUN_ID,
)


def metadata(config, seconds: float, *, unseen: bool = False) -> dict:
  """What a checkpoint says about its run.

  Args:
    config: resolved.
    seconds: of all processes that worked on it so far.
    unseen: whether the look at this state was left, so that who goes on looks first.
  """
  return {
    "unseen": unseen,
    "config": config.to_dict(),
    "version": __version__,
    "seconds": seconds,
    "devices": jax.device_count(),
  }


def place(workdir: str, config) -> pathlib.Path:
  """The folder of a run, absolute; made by `lock.held`.

  Args:
    workdir: any path.
    config: resolved.

  Raises:
    UserError: if it cannot be one: a file, an address, in the folder of images.
  """
  if config.resume not in ("auto", "never", "extend"):
    raise errors.UserError(f"resume={config.resume!r} is unknown: choose auto, never or extend")
  if "://" in workdir:
    raise errors.UserError(
      f"workdir={workdir} is an address: give a folder; a bucket can be mounted (gcsfuse)"
    )
  folder = pathlib.Path(workdir).expanduser().absolute()
  if folder.exists() and not folder.is_dir():
    raise errors.UserError(f"workdir={workdir} is a file: give a folder")
  if config.data.name == "folder" and config.data.data_dir:
    images = pathlib.Path(config.data.data_dir).expanduser().absolute()
    if images in (folder, *folder.parents):
      raise errors.UserError(
        f"workdir={workdir} lies in the folder of images {config.data.data_dir}, which would hold "
        "its pictures then; choose a workdir elsewhere"
      )
  return folder


def claim(workdir: str, config) -> pathlib.Path:
  """Makes the folder this run's own, or finds that it is.

  Writes config.json and env.json when the folder is new. Else what has changed of `config.probe`,
  and this machine behind those of env.json's "resumed".

  Args:
    workdir: any path, made if missing.
    config: resolved.

  Raises:
    UserError: if the folder holds another run, or a run while `config.resume` is "never"; as
      `place`.
  """
  folder = place(workdir, config)
  lead = jax.process_index() == 0
  if config.overwrite and lead and (folder / "env.json").exists():
    try:
      for path in (*(folder / name for name in _OURS), *folder.glob("events.out.tfevents.*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
      raise errors.UserError(f"cannot overwrite workdir={workdir}: {error.strerror}") from None
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("workdir")
  known = folder / "config.json"
  if (old := _settings(folder)) is not None:
    if config.resume == "never":
      raise errors.UserError(
        f"workdir={workdir} already holds a run and resume=never: choose another workdir or "
        "set config.overwrite=True, which deletes the whole run"
      )
    continuation.refuse_mismatch(old, config)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("workdir_checked")
  if not lead:
    return folder
  if old is None:
    _write(workdir, folder / "env.json", environment.describe())
    _write(workdir, known, config.to_dict())
    return folder
  first = {}
  with contextlib.suppress(OSError, ValueError):  # nothing that a run needs
    first = files.parse_json((folder / "env.json").read_text())
  first = first if isinstance(first, dict) else {}
  before = resumed if isinstance(resumed := first.get("resumed"), list) else []
  _write(workdir, folder / "env.json", first | {"resumed": [*before, environment.describe()]})
  _write(workdir, known, old | {"probe": json.loads(json.dumps(config.probe.to_dict()))})
  return folder


def _settings(folder: pathlib.Path) -> dict[str, Any] | None:
  """The config of the run in a folder: config.json, or a checkpoint's where that cannot be read.

  None where there is no run.

  Raises:
    UserError: if there is a run and nothing says with which settings.
  """
  path, there = folder / "config.json", checkpoint.steps(folder)
  if not path.exists() and not there:
    return None
  try:
    return _read_settings(path)
  except OSError as error:
    why = str(error.strerror)
  except (ValueError, TypeError, KeyError) as error:
    why = errors.in_line(error)
  for step in reversed(there):
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, errors.UserError):
      found = _read_settings(folder / "checkpoints" / str(step) / "metadata" / "metadata", "config")
      logging.warning("%s cannot be read (%s): made again from checkpoint %d", path, why, step)
      return found
  raise errors.UserError(
    f"{path} is not readable JSON of a run ({why}), and no checkpoint has its settings: bring it "
    "back from a backup, choose another workdir or set config.overwrite=True, which deletes the "
    "whole run"
  )


def _read_settings(path: pathlib.Path, *keys: str) -> dict[str, Any]:
  """Settings of a run that JSON holds, under these keys.

  Raises:
    OSError, ValueError, TypeError, KeyError: if it does not.
    UserError: for a method that there is not.
  """
  found = files.parse_json(path.read_text())
  for key in keys:
    found = found[key]
  configs.restored(found)
  return found


def _write(workdir: str, path: pathlib.Path, content: dict) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)
  except OSError as error:
    what, advice = files.trouble(error) or (error.strerror, "mend it")
    raise errors.UserError(
      f"cannot write to workdir={workdir}: {what}: {advice} or choose another workdir"
    ) from None


@contextlib.contextmanager
def reporting(folder: pathlib.Path) -> Iterator[None]:
  """Turns what the disk of a run refuses into one line, which says what is still there.

  Args:
    folder: from `claim`.

  Raises:
    UserError: for a full disk, one that cannot be written, a folder that is gone.
  """
  try:
    yield
  except OSError as error:
    trouble = files.trouble(error)
    where = pathlib.Path(error.filename) if isinstance(error.filename, str) else folder
    if trouble is None or not where.is_relative_to(folder):
      raise
    what, advice = trouble
    raise errors.UserError(
      f"{what} while writing {where}: {advice} and run the same command again; "
      f"{checkpoint.intact(folder)}"
    ) from error


def export_encoder(folder: pathlib.Path, step: int, state, program) -> None:
  """Writes exported/: the encoder, the teacher where there is one, and its prototypes."""
  config, exported = program.config, program.exported(state)
  if jax.process_index() == 0:
    tree, prototypes = jax.device_get(exported)
    which, _ = train_step.encoder_of(state)
    info = {"weights": which, "step": step, "version": __version__}
    for section in ("model", "head", "method"):
      info[section] = config[section].to_dict()
    info["precision"] = config.precision
    info["image"] = {k: config.augment[k] for k in ("global_size", "mean", "std")}
    info["image"] |= {"crop": config.probe.crop, "image_size": config.data.image_size}
    info["image"] |= {k: config.data[k] for k in ("channels", "value_range")}
    export.write(folder / "exported", tree, info, prototypes)


def bank_size(config, bank) -> str:
  """How many images of the bank `probe.limit` leaves: "1442", or "512 of 1442"."""
  limit = config.probe.limit
  return f"{limit} of {len(bank)}" if 0 < limit < len(bank) else f"{len(bank)}"


def protocol(config, bank, test) -> dict[str, object]:
  """How the accuracies and the usage at the end of a run are measured, for result.json."""
  return {
    "bank": f"{bank.name} ({bank_size(config, bank)} images)",
    "test": None if test is None else f"{test.name} ({len(test)} images)",
    "limit": config.probe.limit,
    "k": config.probe.k,
    "temperature": config.probe.temperature,
    "features": "backbone of the teacher (of the encoder where there is none), last layer",
    "transform": f"{sizes.text(config.augment.global_size)} px, centre crop {config.probe.crop:g}",
    "knn": "cosine, weights exp(similarity / temperature)",
    "linear": "logistic regression on frozen features, strength chosen on a tenth of the bank",
    "usage": "share of prototypes that are the argmax of any bank image",
  }


def write_result(folder: pathlib.Path, result: dict, arrays: dict, config, *, bank, test) -> None:
  """Writes eval/final/: arrays.npz, and result.json, each number with how it was made."""
  final = folder / "eval" / "final"

  def save_arrays(path):
    with open(path, "wb") as file:  # given a name, NumPy would append .npz
      np.savez(file, **arrays)

  files.write(final / "arrays.npz", save_arrays)
  files.write_json(
    final / "result.json",
    {
      "measures": result,
      "protocol": protocol(config, bank, test),
      "environment": environment.describe(),
    },
  )


def read_result(folder: pathlib.Path) -> dict[str, float] | None:
  """The measures that `write_result` wrote, or None."""
  path = folder / "eval" / "final" / "result.json"
  with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: it is measured again
    measures = files.parse_json(path.read_text())["measures"] if path.exists() else None
    return measures if isinstance(measures, dict) else None
  return None


def page_is_due(folder: pathlib.Path) -> bool:
  """Whether there is no page, or one older than a result; every process gets the same answer."""
  page, results = folder / REPORT, [*folder.glob("eval/*/result.json")]
  times = [path.stat().st_mtime_ns for path in results]
  due = not page.exists() or page.stat().st_mtime_ns < max(times, default=0)
  if jax.process_count() == 1:
    return due
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))


def unseen(folder: pathlib.Path, metadata: dict, step: int) -> bool:
  """Whether the look at a restored state is still to be made; every process gets the same answer.

  Args:
    folder: from `claim`.
    metadata: of the checkpoint.
    step: of the checkpoint.
  """
  if not metadata.get("unseen"):
    return False
  records, _ = files.json_lines(folder / "metrics.jsonl")
  seen = any(r.get("step") == step and any(k.startswith("collapse/") for k in r) for r in records)
  if jax.process_count() == 1:
    return not seen
  return not multihost_utils.broadcast_one_to_all(np.asarray(seen))


def read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays that `write_result` wrote."""
  with np.load(folder / "eval" / "final" / "arrays.npz", allow_pickle=False) as arrays:
    return dict(arrays)


def warm_start(state: Any, params: Any, stats: Any = None) -> Any:
  """State 0 with the encoder, student and teacher, of an exported one.

  Args:
    state: fresh `train_step.TrainState`.
    params: from `export.load`, host arrays; where it has None the state's own stay.
    stats: from `export.load_stats`, likewise; None of a network without batch norm.
  """
  fresh = [name for name, leaf in trees.flat(params).items() if leaf is None]
  if fresh:
    logging.info("init_from has none of these, they start fresh: %s", ", ".join(fresh))

  def placed(found, old):  # once each: student and teacher must not share buffers
    return jax.tree.map(
      lambda new, old: old if new is None else jax.device_put(new, old.sharding),
      found,
      old,
      is_leaf=lambda x: x is None,
    )

  if stats:
    own = {net: placed(stats, old) for net, old in state.carry["batch_stats"].items()}
    state = state.replace(carry={**state.carry, "batch_stats": own})
  if state.teacher == ():
    return state.replace(encoder=placed(params, state.encoder))
  teacher = {**state.teacher, "encoder": placed(params, state.teacher["encoder"])}
  return state.replace(encoder=placed(params, state.encoder), teacher=teacher)
