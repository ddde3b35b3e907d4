"""Data sets prepared by TFDS, read without TensorFlow: records are bytes that Pillow decodes."""

import functools
import os
import pathlib
import re
from typing import Any

import numpy as np

from protojax import errors
from protojax.data.sources import source

# Features beside an image that `protojax.prepare` has made smaller: what it was before, in pixels.
ORIGINAL = ("original_height", "original_width")


def build(name: str, split: str | None, data_dir: str | os.PathLike | None) -> source.Source:
  """A data set that TFDS has prepared as array_record; of no other place and no other version.

  Reads the folder alone, so that no builder looks for newer versions or other hosts.

  Args:
    name: "name[/config][:version]"; the newest version there is unless one is named.
    split: "train", "train[:1000]", "train[80%:]".
    data_dir: where it was prepared.

  Raises:
    UserError: if there is no such data set or split, or no images in it.
  """
  builder, root = _builder(name, data_dir)
  import tensorflow_datasets as tfds

  features, splits = builder.info.features, builder.info.splits
  image = features["image"] if "image" in features else None
  if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype).kind != "u":
    raise errors.UserError(
      f"{name} in {root} has no feature 'image' of 8 or 16 bits: there are "
      f"{source.listed(list(features))}"
    )
  try:
    size = splits[str(split)].num_examples
  except (KeyError, TypeError, ValueError):
    size = 0
  if size < 1:
    raise errors.UserError(
      f"{name} in {root} has no split {split!r} with images in it: there are "
      f"{source.listed(sorted(splits), 10)}, and slices, such as train[:80%] to search and "
      "train[80%:] to test on"
    )
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  try:
    data = builder.as_data_source(split, deserialize_method=raw, file_format="array_record")
  except (NotImplementedError, ValueError):
    raise errors.UserError(
      f"{name} in {root} is not stored as array_record: prepare it again with "
      "tfds build --file_format=array_record"
    ) from None
  label = features["label"] if "label" in features else None
  classes = label.names if isinstance(label, tfds.features.ClassLabel) else ()
  smaller = all(side in features for side in ORIGINAL)
  read = functools.partial(_read, data, smaller)
  describe = functools.partial(_id, data, f"{name}/{split}") if smaller else None
  return source.Source(
    f"{name}/{split}", np.arange(size), read, describe=describe, class_names=classes
  )


def _builder(name: str, data_dir: str | os.PathLike | None) -> tuple[Any, pathlib.Path]:
  """(what TFDS knows of a prepared data set, the folder it is in)."""
  root = source.folder_of(data_dir, name)
  wanted, _, version = name.partition(":")
  folders = [i.parent for i in (root / wanted).glob(f"{version or '*'}/dataset_info.json")]
  if not folders:
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    prepared = sorted({i.parent.parent.relative_to(root).as_posix() for i in infos})
    raise errors.UserError(
      f"no data set {name!r} is prepared in {root}: there are {source.listed(prepared, 10)} "
      "(for image files, the name is folder)"
    )
  import tensorflow_datasets as tfds  # slow to import, and only for this source

  newest = max(folders, key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)])
  return tfds.builder_from_directory(newest), root


def overlap(name: str, pair: tuple[str, str], data_dir: str | os.PathLike | None) -> int:
  """How many records two splits of a data set share, such as train and train[80%:].

  Both are splits that `build` takes; a UserError for a data set that is not there.
  """
  import tensorflow_datasets as tfds

  known = _builder(name, data_dir)[0].info.splits

  def spans(split: str) -> list[tuple[str, int, int]]:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(known)
    return [
      (p.splitname, p.from_ or 0, known[p.splitname].num_examples if p.to is None else p.to)
      for p in parts
    ]

  return sum(
    max(0, min(end, other_end) - max(begin, other_begin))
    for one, begin, end in spans(pair[0])
    for other, other_begin, other_end in spans(pair[1])
    if one == other
  )


def splits(name: str, data_dir: str | os.PathLike | None) -> list[str]:
  """The splits of a prepared data set."""
  return sorted(_builder(name, data_dir)[0].info.splits)


def _id(data: Any, name: str, record: int) -> str:
  """The file that `protojax prepare` made a record of, below the folder that it was in."""
  from tensorflow_datasets.proto import tf_example_pb2

  example = tf_example_pb2.Example.FromString(data.__getitems__([record])[0])
  found = example.features.feature["id"].bytes_list.value
  return found[0].decode() if found else f"{name}[{record}]"


def _read(data: Any, smaller: bool, records: list[int]) -> list[tuple]:
  """Records asked for together are read in parallel: half the time of one after another."""
  from tensorflow_datasets.proto import tf_example_pb2

  examples = map(tf_example_pb2.Example.FromString, data.__getitems__(records))
  return [_parts(example.features.feature, smaller) for example in examples]


def _parts(feature: Any, smaller: bool) -> tuple:
  """(bytes of the image, label or -1), and (height, width) of the original where they are there."""
  found = feature["image"].bytes_list.value[0], (*feature["label"].int64_list.value, -1)[0]
  if not smaller:
    return found
  return *found, tuple(feature[side].int64_list.value[0] for side in ORIGINAL)
