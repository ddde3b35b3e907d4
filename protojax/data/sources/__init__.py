"""Where images come from: one file a kind of source, and `build`, which finds them by name.

A new kind is a file with a function like `folder.build`, its import and its entry of `KINDS`
below. Without a fork, `data.name=my_package.my_source` takes any module that is on the path and has
such a function.
"""

import difflib
import os
import pathlib
import re
import traceback
import types

import numpy as np

from protojax import errors, own_modules
from protojax.data.sources import digits, folder, parquet, shards, tar, tfds
from protojax.data.sources.folder import EXTENSIONS, HELD_OUT
from protojax.data.sources.imbalance import long_tail
from protojax.data.sources.pixels import Range, decode, range_words
from protojax.data.sources.source import (
  CorruptImage,
  Source,
  measured_range,
  read_items,
  require_labels,
  shared,
)

__all__ = [
  "EXTENSIONS",
  "HELD_OUT",
  "KINDS",
  "SHARDS",
  "CorruptImage",
  "Range",
  "Source",
  "build",
  "decode",
  "find_split",
  "is_prepared",
  "range_words",
  "read_items",
  "require_labels",
  "shards",
  "shared",
  "tfds",
]

SHARDS = ("parquet", "tar")  # kinds whose files say by their names which split they are

KINDS = {  # (split, data_dir) -> Source
  "digits": digits.build,
  "folder": folder.build,
  "parquet": parquet.build,
  "tar": tar.build,
}
_MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)+"  # my_package.my_source
_FIRST = 8  # images of a user's source that are read at once: one damaged file is no mistake in it


def build(
  name: str,
  *,
  split: str | None,
  data_dir: str | os.PathLike | None = None,
  imbalance: float | None = None,
  seed: int = 0,
  channels: int = 3,
  value_range: Range | None = None,
) -> Source:
  """The source called `name`.

  >>> source = build("digits", split="test")
  >>> len(source), source.num_classes, source[0]["image"].shape, source[0]["label"]
  (355, 10, (32, 32, 3), 5)

  Args:
    name: "digits" (shipped inside scikit-learn); "folder", image files (`EXTENSIONS`) at any depth
      of `data_dir/split`, or of `data_dir` where it is not divided, labelled by their first-level
      folder unless there is only one or images lie beside them; "parquet", files as Hugging Face
      writes them; "tar", WebDataset shards; a name with a dot,
      "my_package.my_source", a module of the user's with `build(split, data_dir) -> Source`; else a
      TFDS data set prepared in `data_dir` as array_record, "name[/config][:version]".
    split: "train", "test"; for TFDS also "train[:1000]"; for a folder a sub-folder, or None.
    data_dir: where the data is; "~" is understood.
    imbalance: factor rho > 1 of an exponential long tail, n_0 rho^(-c / (C - 1)) images of class c
      (arXiv 1901.05555), n_0 the most with which no class runs out; None keeps all images.
    seed: draws the images that an imbalanced source keeps.
    channels: of every image: 3, 1, or what the files have; see `decode`.
    value_range: (low, high), what becomes 0 and 255 of images of more than 8 bits; None takes it
      from a sample of them, and `source.value_range` says it.

  Raises:
    UserError: if there is no such data, split or image, no labels for `imbalance`, channels or a
      range that are none, or a mistake in
      the user's module: it cannot be imported, its `build` fails, or none of its first 8 images is
      one.
  """
  if channels < 1:
    raise errors.UserError(f"data.channels={channels} must be at least 1 (3: colour)")
  _check_range(value_range, channels)
  if name in KINDS:
    source = KINDS[name](split, data_dir)
  elif re.fullmatch(_MODULE, name):
    source = _of_module(name, split, data_dir, channels, value_range)
  else:
    near = difflib.get_close_matches(name, KINDS, 1, 0.7)
    if near and not (data_dir and (pathlib.Path(data_dir).expanduser() / name).is_dir()):
      raise errors.UserError(f"data.name={name!r} is unknown: did you mean {near[0]}?")
    source = tfds.build(name, split, data_dir)
  if not re.fullmatch(_MODULE, name):  # of a module its first images have been read by now
    _take(source, channels, value_range)
  return source if imbalance is None else long_tail(source, imbalance, seed)


def is_prepared(name: str) -> bool:
  """Whether `name` is that of a TFDS data set, whose splits can be sliced."""
  return name not in KINDS and not re.fullmatch(_MODULE, name)


def find_split(
  name: str | None, split: str | None, data_dir: str | os.PathLike | None = None
) -> str | None:
  """What the source calls the labelled images that `split` means.

  Of a folder see `folder`. A prepared data set that lacks a held-out split of this name has it
  under another: the first that is there of `HELD_OUT`.
  """
  if name == "folder":
    return folder.find_split(split, data_dir)
  if name is not None and split in HELD_OUT and is_prepared(name):
    there = tfds.splits(name, data_dir)
    return next((one for one in (split, *HELD_OUT) if one in there), split)
  return split


def _check_range(value_range: Range | None, channels: int) -> None:
  """Refuses what is not (low, high), low < high, numbers or one for each channel."""
  if value_range is None:
    return
  try:
    low, high = (np.asarray(end, np.float64) for end in value_range)
    right = bool(np.all(low < high)) and all(x.shape in ((), (channels,)) for x in (low, high))
  except (TypeError, ValueError):
    right = False
  if not right:
    raise errors.UserError(
      f"data.value_range={value_range} must be (low, high) with low < high, each a number or one "
      f"for each of {channels} channels: what becomes black and what white"
    )


def _take(source: Source, channels: int, value_range: Range | None) -> None:
  """Sets how images are decoded; the range of deep ones is measured unless it is given."""
  source.channels, source.value_range = channels, value_range
  if value_range is None and len(source):
    source.value_range = measured_range(source)


def _of_module(
  name: str,
  split: str | None,
  data_dir: str | os.PathLike | None,
  channels: int,
  value_range: Range | None,
) -> Source:
  """What `build(split, data_dir)` of the user's own module `name` returns."""
  module = own_modules.load(name, "data.name")
  if not callable(getattr(module, "build", None)):
    raise errors.UserError(
      f"data.name={name!r}: {module.__file__ or name} defines no build(split, data_dir) -> Source"
    )
  try:
    built = module.build(split, data_dir)
  except errors.UserError:
    raise
  except Exception as error:
    said = " ".join(str(error).split())
    raise errors.UserError(
      f"data.name={name!r}: its build({split!r}, {data_dir!r}) failed with "
      f"{type(error).__name__}: {said} ({_place(error, module)})"
    ) from error
  if not isinstance(built, Source):
    raise errors.UserError(
      f"data.name={name!r}: its build returned {type(built).__name__}: return a data.Source"
    )
  _take(built, channels, value_range)
  first = list(built.read(range(min(len(built), _FIRST))))
  if not any(isinstance(record, dict) for record in first):
    said = f"can be read: {first[0]}" if first else "is there"
    raise errors.UserError(f"data.name={name!r}: no image of {built.name} {said}")
  return built


def _place(error: Exception, module: types.ModuleType) -> str:
  """The last line of the user's module that an exception came through, as "file:line"."""
  frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call
  own = [frame for frame in frames if frame.filename == module.__file__] or frames
  return f"{own[-1].filename}:{own[-1].lineno}" if own else str(module.__file__)
