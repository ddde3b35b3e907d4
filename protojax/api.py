"""Calls that join rooms: what `import protojax` offers beside its modules."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from protojax import errors, files
from protojax.diagnosing import runs, weights
from protojax.interop import tensor_files
from protojax.metrics import diagnosis
from protojax.reports import of_run
from protojax.training import loop

_LISTED = 10  # arrays of a file of embeddings that are named


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
  """Trains a run, or goes on with it, and writes its report.

      config = protojax.config.debug(protojax.config.default("dino"))
      measures = protojax.train(config, "runs/first")

  Args:
    config: of a recipe or `protojax.config.default()`, not resolved.
    workdir: folder of this run, made if missing.

  Returns:
    The measures of the final state, as written to eval/final/result.json.

  Raises:
    errors.UserError: for a mistake in the config or the data; nothing is written then.
    errors.Interrupted: on SIGTERM, SIGHUP or Ctrl-C, after a checkpoint was written.
  """
  return loop.run(config, os.fspath(workdir), report=of_run.after_training)


def diagnose(
  what: Any,
  *,
  embeddings: Any = None,
  key: str | None = None,
  transpose: bool = False,
  which: str | None = None,
  data: str | None = None,
  data_dir: str | None = None,
  split: str | None = None,
  limit: int = 0,
  heads: int | None = None,
  step: int | None = None,
  rows: str | None = None,
  cosine: bool | None = None,
) -> diagnosis.Diagnosis:
  """Says what is wrong with prototypes, a run or a log; `print` it to read all of it.

  >>> import numpy as np
  >>> from protojax import api
  >>> found = api.diagnose(np.repeat(np.eye(16), 4, axis=0))
  >>> found.verdict.label, found.measures["collapse/unique_0.025"]
  ('partial prototype collapse', 0.25)

  Args:
    what: prototypes [K, D] (NumPy, JAX, or a tensor of PyTorch in the host's memory); or the path
      of a run's workdir or its exported/, of a checkpoint or a file of arrays (.pth, .pt, .ckpt,
      .safetensors, .npy, .npz), or of a log (metrics.jsonl, DINO's, DINOv2's, any text with
      losses).
    embeddings: [N, D], what comes out of the head just before the prototypes, or a file of it, to
      see which prototypes are used.
    key: of a file: the array that holds the prototypes, where its name says nothing; or their layer
      by the name that a diagnosis gives it.
    transpose: of a file: the prototypes in it are stored [D, K].
    which: of a file: "teacher" or "student"; None takes the teacher's where there is one.
    data: encodes images for the embeddings, of a run its own ("run") or "digits", "folder", the
      name of a TFDS data set. Of a file of another library, too, if its backbone, head and
      prototypes are of a known layout: those of DINO, iBOT, DINOv2 (class tokens of both) and SwAV.
    data_dir, split: of the images; None takes the run's own and "train", which is all of a folder
      that is not divided.
    limit: images at most, evenly spread; 0 takes all.
    heads: of attention, of a file whose network `data` is run through; None: width / 64.
    step: checkpoint of a run; None takes the newest.
    rows: what the rows of a file's lone matrix are, where nothing in it says so: "prototypes", or
      "features" of images, which are described and not judged.
    cosine: of arrays and files: whether embeddings are compared with the directions of prototypes
      alone (True) or by products, in which norms count (False); None takes what the names in a file
      say, products where they say nothing.

  Raises:
    UserError: if there is no such thing, no prototypes are found, or an argument says nothing about
      this kind of thing.
  """
  arguments = {"embeddings": embeddings, "key": key, "transpose": transpose or None}
  arguments |= {"which": which, "data": data, "data_dir": data_dir, "split": split}
  arguments |= {"limit": limit or None, "heads": heads, "step": step, "rows": rows}
  arguments |= {"cosine": cosine}
  given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
  idle = next((name for name in ("data_dir", "split", "limit", "heads") if name in given), "")
  if idle and data is None:
    raise errors.UserError(f"{idle} says nothing without data: add data=run, or leave it out")
  if data is not None and embeddings is not None:
    raise errors.UserError("data and embeddings are two sources of embeddings: give one")
  if limit < 0:
    raise errors.UserError(f"limit={limit} must not be negative (0: all images)")
  examine: Callable[..., diagnosis.Diagnosis]
  allowed: tuple[str, ...]
  if not isinstance(what, str | os.PathLike):
    kind, examine, allowed = "an array", diagnosis.diagnose, ("embeddings", "cosine")
  else:
    what = pathlib.Path(what).expanduser()
    if not what.exists():
      raise errors.UserError(f"there is no {what}: give a workdir, a checkpoint or a log")
    beside = what.parent / "config.json"
    if what.name in ("encoder.safetensors", "prototypes.safetensors") and beside.is_file():
      what = what.parent  # of exported weights, which are one thing
    if what.is_dir():
      kind, examine = f"{what}, a workdir", runs.diagnose
      allowed = ("embeddings", "data", "data_dir", "split", "limit", "step")
    elif what.suffix not in tensor_files.SUFFIXES and _is_text(what):
      kind, examine, allowed = f"{what}, a log", runs.diagnose_log, ()
    else:
      kind, examine = f"{what}, a file of arrays", weights.diagnose
      allowed = ("embeddings", "key", "transpose", "which", "data", "data_dir", "split", "limit")
      allowed += ("heads", "rows", "cosine")
  for name in given:
    if name not in allowed:
      raise errors.UserError(f"{name} means nothing for {kind}: leave it out")
  if isinstance(embeddings, str | os.PathLike):
    given["embeddings"] = _embeddings(embeddings)
  return examine(what, **given)


def _is_text(path: pathlib.Path) -> bool:
  with open(path, "rb") as file:
    head = file.read(4096)
  if files.pointer(head):
    return False  # whatever it stands for is more likely an array
  try:
    head.decode()
  except UnicodeDecodeError as error:
    return error.start > len(head) - 4  # a character cut in two
  return b"\0" not in head and bool(head)


def _embeddings(path: str | os.PathLike) -> np.ndarray:
  """The one matrix of a file that is named as `protojax embed` names embeddings, or is alone."""
  arrays = tensor_files.read(path)
  name = next((name for name in ("embedding", "embeddings") if name in arrays), "")
  if not name and len(arrays) == 1:
    name = next(iter(arrays))
  if not name or name == "features" or arrays[name].ndim != 2:
    there = ", ".join(f"{key} {list(x.shape)}" for key, x in list(arrays.items())[:_LISTED])
    raise errors.UserError(
      f"embeddings={path}: no matrix [N, D] called embedding in it, there is {there}: name what "
      "comes out of the head just before the prototypes so, or give it alone (numpy.save)"
    )
  if len(arrays) > 1:
    logging.info("embeddings: %s %s of %s", name, list(arrays[name].shape), path)
  return arrays[name]
