"""Parquet files as Hugging Face writes them: a column of encoded images, a column of labels."""

import collections
import functools
import os
import pathlib
import threading
from typing import Any

import numpy as np

from protojax import errors, files
from protojax.data.sources import shards, source

_IMAGES = ("image", "img", "jpg", "png", "picture", "bytes")
_LABELS = ("label", "fine_label", "labels", "cls", "class", "target", "class_name")
_KEPT = 128 * 2**20  # bytes of the last row groups that a process keeps


def build(split: str | None, data_dir: str | os.PathLike | None) -> source.Source:
  """The images in the parquet files of one split, in the order of the files' names and rows.

  Images are a column of {bytes, path} or of bytes, of the type Image in Hugging Face's metadata or
  named image, img, jpg, png, picture or bytes. Labels are the column label, or fine_label, labels,
  cls, class, target, class_name, or the only one of the type ClassLabel, which has names; whole
  numbers and strings without names are classes in their order, over all splits together.

  An image is read with its row group. A process keeps the last ones, 128 MiB; a set that is larger
  than that reads a row group for each image of a shuffled batch: `protojax.prepare parquet` makes
  a copy that is read image by image.

  Args:
    split: as `shards.of_split` takes it: "train" of train-00000-of-00002.parquet.
    data_dir: folder of the files, at any depth.

  Raises:
    UserError: if there is no such folder or split, a file is no parquet, or no column has images.
  """
  splits = shards.found(data_dir, ".parquet")
  paths = shards.of_split(splits, split)
  files = [(str(path), path.stat().st_mtime_ns) for path in paths]
  metadata = [_metadata(*file) for file in files]
  schema = metadata[0].schema.to_arrow_schema()
  kinds = _features(schema)
  image = _column_of_images(schema, kinds, paths[0])
  for path, one in zip(paths, metadata, strict=True):
    if image not in one.schema.to_arrow_schema().names:
      raise errors.UserError(f"{path} has no column {image!r}, as {paths[0]} has")
  groups = [(file, g) for file, one in enumerate(metadata) for g in range(one.num_row_groups)]
  sizes = [metadata[file].row_group(g).num_rows for file, g in groups]
  starts = np.cumsum([0, *sizes])
  if not starts[-1]:
    raise errors.UserError(f"{source.listed([str(path) for path in paths])}: no rows in these")
  label = _column_of_labels(schema, kinds)
  labels, names = np.full(starts[-1], -1, np.int32), []
  if label:
    values = {path: _values(path, label) for path in paths}
    given = kinds.get(label, {}).get("names")
    here = [value for path in paths for value in values[path]]
    if given:
      names = [str(name) for name in given]
      labels = np.array([-1 if value is None else value for value in here], np.int32)
      if labels.max(initial=-1) < 0:  # a test set whose labels are kept back
        names = []
    else:
      others = [p for of_one in splits.values() for p in of_one if p not in values]
      everywhere = here + [value for path in others for value in _values(path, label)]
      names = shards.classes(everywhere)
      labels = shards.numbers(here, names)
  read = functools.partial(_read, files, np.array(groups, np.int32), starts, image, labels)
  first_rows = starts[np.searchsorted([file for file, _ in groups], range(len(paths)))]
  describe = functools.partial(_describe, files, first_rows)
  name = f"parquet {pathlib.Path(data_dir or '')}" + (f"/{split}" if split else "")
  return source.Source(name, np.arange(starts[-1]), read, labels, describe, names)


def _features(schema: Any) -> dict[str, dict]:
  """{column: what Hugging Face says of it}, {} where nothing is said."""
  try:
    said = files.parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = said.get("info", {}).get("features", {})
  except (ValueError, AttributeError):
    return {}
  if not isinstance(features, dict):
    return {}
  return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def _column_of_images(schema: Any, kinds: dict[str, dict], path: pathlib.Path) -> str:
  import pyarrow as pa

  def holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
      return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

  possible = [field.name for field in schema if holds_bytes(field.type)]
  said = [name for name in possible if kinds.get(name, {}).get("_type") == "Image"]
  known = [name for name in _IMAGES if name in (said or possible)]
  chosen = known or said or possible
  if len(chosen) == 1 or known:
    return chosen[0]
  raise errors.UserError(
    f"{path}: {'several columns hold' if possible else 'no column holds'} bytes of images: there "
    f"are {source.listed(schema.names, 10)}; call that of the images 'image'"
  )


def _column_of_labels(schema: Any, kinds: dict[str, dict]) -> str | None:
  import pyarrow as pa

  def plain(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return pa.types.is_integer(kind) or text

  possible = [field.name for field in schema if plain(field.type)]
  said = [name for name in possible if kinds.get(name, {}).get("_type") == "ClassLabel"]
  return next((n for n in _LABELS if n in possible), said[0] if len(said) == 1 else None)


@functools.lru_cache(maxsize=4096)
def _metadata(path: str, changed: int) -> Any:
  """The footer of a file as it was at the time `changed`: what is where in it."""
  import pyarrow as pa  # slow to import, and only for this source
  from pyarrow import parquet

  try:
    found = parquet.read_metadata(path)
    _ = found.schema.to_arrow_schema().names  # may be no text
    return found
  except (pa.ArrowException, OSError, ValueError) as error:
    raise errors.UserError(
      f"{path} is no parquet file that can be read: {errors.in_line(error)}"
    ) from None


def _values(path: pathlib.Path, column: str) -> list:
  import pyarrow as pa
  from pyarrow import parquet

  try:
    return parquet.read_table(path, columns=[column], partitioning=None)[column].to_pylist()
  except (pa.ArrowException, OSError, KeyError, ValueError) as error:
    raise errors.UserError(
      f"{path}: the column {column!r} cannot be read: {errors.in_line(error)}"
    ) from None


class _Groups:
  """The last row groups that this process has read, up to `_KEPT` bytes; for threads, too."""

  def __init__(self) -> None:
    self._kept: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
    self._bytes, self._lock = 0, threading.Lock()

  def get(self, path: str, changed: int, group: int, column: str) -> Any:
    """pyarrow's array of the images of one row group."""
    key = (path, changed, group, column)
    with self._lock:
      if key in self._kept:
        self._kept.move_to_end(key)
        return self._kept[key]
    from pyarrow import parquet

    with parquet.ParquetFile(path, metadata=_metadata(path, changed), memory_map=True) as file:
      array = file.read_row_group(group, columns=[column], use_threads=False)[column]
    with self._lock:
      if key not in self._kept:
        self._kept[key] = array
        self._bytes += array.nbytes
      while self._bytes > _KEPT and len(self._kept) > 1:
        self._bytes -= self._kept.popitem(last=False)[1].nbytes
    return array


_groups = _Groups()


def _read(
  files: list[tuple[str, int]],
  groups: np.ndarray,
  starts: np.ndarray,
  column: str,
  labels: np.ndarray,
  records: list[int],
) -> list[tuple[bytes, int]]:
  """Images of the same row group are read together, whatever their order."""
  images: dict[int, bytes] = {}
  which = np.searchsorted(starts, records, side="right") - 1
  for group in sorted(set(which.tolist())):
    file, number = (int(n) for n in groups[group])
    array = _groups.get(*files[file], number, column)
    for record, of_group in zip(records, which.tolist(), strict=True):
      if of_group == group:
        value = array[record - int(starts[group])].as_py()
        images[record] = value["bytes"] if isinstance(value, dict) else value
  return [(images[record], int(labels[record])) for record in records]


def _describe(files: list[tuple[str, int]], first_rows: np.ndarray, record: int) -> str:
  file = int(np.searchsorted(first_rows, record, side="right")) - 1
  return f"{files[file][0]}, row {record - int(first_rows[file])}"
