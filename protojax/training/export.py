"""The encoder and its prototypes as plain files, readable without JAX.

encoder.safetensors holds backbone and head, prototypes.safetensors the prototypes and what scoring
needs, config.json describes both. The weights file carries the configuration in its header too, and
is replaced in one move, so that whatever happens a reader finds weights and the configuration that
made them; prototypes of another step than the weights' are not read.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from protojax import errors, files, trees
from protojax.prototypes import scoring

PyTree = Any
_SHOWN = 4  # names of tensors that one line shows
_WEIGHTS, _CONFIG, _PROTOTYPES = "encoder.safetensors", "config.json", "prototypes.safetensors"


def write(
  folder: str | os.PathLike,
  tree: PyTree,
  info: dict,
  prototypes: Mapping[str, scoring.Scoring] | None = None,
) -> None:
  """Writes encoder.safetensors, config.json and, with prototypes, prototypes.safetensors.

  Those of an earlier step are replaced. prototypes.safetensors has for every set NAME a matrix NAME
  [K, D] and, where there are some, NAME.mean [D] and NAME.bias [K]; `prototypes` in config.json has
  the rest of what `prototypes.scoring` says of a set.

  Args:
    folder: made if missing.
    tree: {"params": ..., "batch_stats": ...} of host arrays; a tensor's name is its path with dots.
    info: JSON: what is needed to build the encoder again, and where it comes from.
    prototypes: {set: what scores with it} of host arrays; None for a method without.

  Raises:
    UserError: if the disk is full or the folder cannot be written; what was there stays whole.
  """
  folder = pathlib.Path(folder)
  tensors = {name: np.ascontiguousarray(leaf) for name, leaf in trees.flat(tree).items()}
  of_sets = {}
  for name, one in (prototypes or {}).items():
    arrays = {name: one.rows, f"{name}.mean": one.mean, f"{name}.bias": one.bias}
    of_sets |= {k: np.ascontiguousarray(v) for k, v in arrays.items() if v is not None}
  if prototypes:
    info = {**info, "prototypes": {name: _described(one) for name, one in prototypes.items()}}
  content = safetensors.numpy.save(tensors, metadata={"info": json.dumps(info)})
  try:
    if of_sets:
      of_sets_content = safetensors.numpy.save(of_sets, metadata={"of": _identity(info)})
      files.write(folder / _PROTOTYPES, of_sets_content)
    files.write(folder / _WEIGHTS, content)
    files.write_json(folder / _CONFIG, info)
    if not of_sets:
      (folder / _PROTOTYPES).unlink(missing_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"no space left on device while exporting the encoder to {folder}: free some space and run "
      "the same command again; what was exported before is intact"
    ) from error


def _described(one: scoring.Scoring) -> dict[str, Any]:
  """What config.json says of a set."""
  num, dim = one.rows.shape
  return {"num": num, "dim": dim, "tokens": one.tokens, "place": one.place, "scale": one.scale}


def _identity(info: dict) -> str:
  """Which weights the prototypes belong to."""
  return json.dumps([info["weights"], info["step"], info["prototypes"]], sort_keys=True)


def read_prototypes(path: str | os.PathLike, info: dict) -> dict[str, scoring.Scoring]:
  """The prototypes that `write` put beside an encoder; {} without them.

  Args:
    path: as for `read`.
    info: from `read`.

  Returns:
    {set: what scores with it}, NumPy arrays; {} too where the file was not copied along, or is of
    another step: a reader may come between two files.

  Raises:
    UserError: if the file is damaged.
  """
  path = pathlib.Path(path)
  file = (path if path.is_dir() else path.parent) / _PROTOTYPES
  if "prototypes" not in info or not file.is_file():
    return {}
  try:
    with safetensors.safe_open(file, framework="numpy") as opened:
      if opened.metadata()["of"] != _identity(info):
        return {}
      arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    return {
      name: scoring.Scoring(
        arrays[name],
        arrays.get(f"{name}.mean"),
        arrays.get(f"{name}.bias"),
        **{k: said[k] for k in ("tokens", "place", "scale")},
      )
      for name, said in info["prototypes"].items()
    }
  except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError):
    raise errors.UserError(
      f"{file} is damaged or was not exported by protojax: export it again from its run, or move "
      "it away to use the encoder alone"
    ) from None


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
  """Reads what `write` wrote.

  Args:
    path: the folder, or the weights file itself.

  Returns:
    ({name: array}, info).

  Raises:
    UserError: if there is no such file or it is not one of ours.
  """
  with _opened(path) as (opened, info):
    return {name: opened.get_tensor(name) for name in opened.keys()}, info


def describe(path: str | os.PathLike) -> dict:
  """The info of `read` alone, and as it raises; the weights stay on the disk."""
  with _opened(path) as (_, info):
    return info


def of_other_library(folder: pathlib.Path) -> str:
  """What a folder holds that `protojax convert` has written for others, and what to do; else ""."""
  if (folder / "model.safetensors").is_file():
    return (
      f"{folder} holds model.safetensors, weights for timm or Hugging Face: give the run they are "
      f"of, or bring them in first, protojax convert {folder} OUT, and give OUT"
    )
  for name in ("features.jax", "encoder.onnx"):
    if (folder / name).is_file():
      return f"{folder} holds {name}, a compiled function without weights: give the run it is of"
  return ""


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Any, dict]]:
  path = pathlib.Path(path)
  file = path / _WEIGHTS if path.is_dir() else path
  if not file.is_file():
    if other := of_other_library(path):
      raise errors.UserError(other)
    raise errors.UserError(
      f"there is no {_WEIGHTS} at {path}: give the folder exported/ of a finished run"
    )
  with open(file, "rb") as start:
    if said := files.pointer(start.read(64)):
      raise errors.UserError(f"{file} is {said}")
  try:
    with safetensors.safe_open(file, framework="numpy") as opened:
      yield opened, files.parse_json(opened.metadata()["info"])
  except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
    raise errors.UserError(
      f"{file} is not weights as protojax exports them: those of other libraries are converted "
      "first (protojax convert FILE FOLDER); a damaged export is made again from its run"
    ) from None


def lacked(info: Mapping[str, Any]) -> tuple[str, ...]:
  """Tensors that were missing when weights were converted, by the names of that file.

  `initialised` in config.json is {name in encoder.safetensors: name in the file}; what stands for
  them is what a new encoder starts with.

  Args:
    info: from `read`.
  """
  return tuple(info.get("initialised", {}).values())


def initialised(names: Sequence[str]) -> str:
  """A sentence about what `lacked` gives; "" of none."""
  if not names:
    return ""
  what = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
  more = f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
  return (
    f"{what} freshly initialised, missing in the file that was converted: "
    f"{', '.join(names[:_SHOWN])}{more}"
  )


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
  if said := initialised(lacked(info)):
    logging.warning("%s: %s", path, said)
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


def load_stats(path: str | os.PathLike, template: PyTree) -> PyTree:
  """The exported running statistics of batch norm, as `load` gives parameters.

  Args:
    path: the folder, or the weights file itself.
    template: pytree of anything with shape and dtype, like the "batch_stats" that were written.

  Returns:
    Pytree of NumPy arrays with the dtypes of `template`; None in the place of what the file lacks.

  Raises:
    UserError: if the file cannot be read.
  """
  tensors, _ = read(path)
  wanted = trees.flat({"batch_stats": template})
  leaves = [tensors[k].astype(v.dtype) if k in tensors else None for k, v in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)
