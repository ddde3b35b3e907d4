"""The encoder as plain files: encoder.safetensors and config.json, readable without JAX.

The weights file carries the configuration in its header too, and is replaced in one move, so that
whatever happens a reader finds weights and the configuration that made them.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from protojax import errors, files, trees

PyTree = Any
_WEIGHTS, _CONFIG = "encoder.safetensors", "config.json"


def write(folder: str | os.PathLike, tree: PyTree, info: dict) -> None:
  """Writes `folder`/encoder.safetensors and config.json, over those of an earlier step.

  Args:
    folder: made if missing.
    tree: {"params": ..., "batch_stats": ...} of host arrays; a tensor's name is its path with dots.
    info: JSON: what is needed to build the encoder again, and where it comes from.

  Raises:
    UserError: if the disk is full or the folder cannot be written; what was there stays whole.
  """
  folder = pathlib.Path(folder)
  tensors = {name: np.ascontiguousarray(leaf) for name, leaf in trees.flat(tree).items()}
  content = safetensors.numpy.save(tensors, metadata={"info": json.dumps(info)})
  try:
    files.write(folder / _WEIGHTS, content)
    files.write_json(folder / _CONFIG, info)
  except OSError as error:
    raise errors.UserError(
      f"no space left on device while exporting the encoder to {folder}: free some space and run "
      "the same command again; what was exported before is intact"
    ) from error


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
  """Reads what `write` wrote.

  Args:
    path: the folder, or the weights file itself.

  Returns:
    ({name: array}, info).

  Raises:
    UserError: if there is no such file or it is not one of ours.
  """
  path = pathlib.Path(path)
  file = path / _WEIGHTS if path.is_dir() else path
  if not file.is_file():
    raise errors.UserError(
      f"there is no {_WEIGHTS} at {path}: give the folder exported/ of a finished run"
    )
  try:
    with safetensors.safe_open(file, framework="numpy") as opened:
      info = json.loads(opened.metadata()["info"])
      return {name: opened.get_tensor(name) for name in opened.keys()}, info
  except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
    raise errors.UserError(
      f"{file} is damaged or was not exported by protojax: export it again from its run"
    ) from None


def load(path: str | os.PathLike, template: PyTree) -> PyTree:
  """The exported parameters as a pytree like `template`.

  Args:
    path: the folder, or the weights file itself.
    template: pytree of anything with shape and dtype, like the "params" that were written.

  Returns:
    Pytree of NumPy arrays with the dtypes of `template`; None in the place of a parameter that the
    file says it lacks, as one does that was converted from a backbone without a head.

  Raises:
    UserError: if the file cannot be read, or a parameter is missing, left over or of another shape.
  """
  tensors, info = read(path)
  there = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("params.")}
  wanted = trees.flat({"params": template})
  here = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
  lacks = tuple(f"params.{name}." for name in info.get("lacks", ()))
  fresh = {k for k in here.keys() - there.keys() if f"{k}.".startswith(lacks)}
  wrong = sorted(k for k in (there.keys() | here.keys()) - fresh if there.get(k) != here.get(k))
  if wrong:
    first, more = wrong[0], f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise errors.UserError(
      f"{_WEIGHTS} at {path} does not fit this encoder: {first.removeprefix('params.')} has shape "
      f"{there.get(first, 'none')} there and {here.get(first, 'none')} here{more}: use the model "
      "and head settings it was trained with (config.json beside it)"
    )
  leaves = [None if k in fresh else tensors[k].astype(v.dtype) for k, v in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)
