"""What a source is: images and labels by number."""

import errno
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from protojax import errors
from protojax.data.sources import pixels

_SAMPLE = 64  # images that the range of deep ones is taken from
_PASSING = {  # what comes and goes: no handles or memory, a network's disk that is away
  *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EIO, errno.ESTALE),
  *(errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EREMOTEIO),
}
_PAUSES = (0.1, 0.5, 2.0, 8.0, 30.0, 60.0, 120.0, None)  # seconds
_DEEP = (  # taken for 0 to 65,535 it might be all black
  "more than 8 bits a channel, which no image has that was looked at first: "
  "config.data.value_range=(LOW, HIGH) says what becomes black and white"
)


class CorruptImage(Exception):
  """A record that cannot be read or decoded; the message names it and the reason."""


class Source:
  """Random access to images; can be pickled into worker processes.

  `source[i]` is {"image": uint8 [H, W, channels], "label": int, "size": (height, width)}: the label
  -1 where there is none, the size that of the image, or of its original where the source holds a
  copy of another size and shape. It raises `CorruptImage` if record i cannot be decoded and
  IndexError if there is no record i.

  Attributes:
    name: for messages.
    class_names, num_classes: names in the order of the labels; (), 0 if unlabelled.
    tail_split: of a long tail, {"many", "medium", "few": [classes]}, see `imbalance`; else None.
    channels: of every image, 3 unless `sources.build` sets it.
    value_range: (low, high) that images of more than 8 bits are scaled by, see `pixels.decode`;
      `sources.build` sets it.

  Args:
    records: int array [N], numbers of the records that there are.
    read: list of these numbers -> list of (what `decode` takes or uint8 [H, W, C], label) or of
      (that, label, size of the original). Of a module or a `functools.partial` of such a function,
      for it is pickled too.
    labels: int32 [M], indexed by the numbers of the records; None reads them when they are asked
      for.
    describe: number of a record -> str; None makes it "name[number]".
  """

  def __init__(
    self,
    name: str,
    records: np.ndarray,
    read: Callable[[list[int]], Sequence[tuple]],
    labels: np.ndarray | None = None,
    describe: Callable[[int], str] | None = None,
    class_names: Sequence[str] = (),
    tail_split: dict[str, list[int]] | None = None,
  ):
    self.name = name
    self.class_names = tuple(class_names)
    self.num_classes = len(self.class_names)
    self.tail_split = tail_split
    self.channels = 3
    self.value_range: pixels.Range | None = None
    self._records, self._read, self._labels = records, read, labels
    self._describe = describe or functools.partial("{}[{}]".format, name)

  def subset(self, indices: np.ndarray, name: str, tail_split: dict[str, list[int]]) -> "Source":
    """A source of these indices of `self`, with another name and `tail_split`."""
    records = self._records[indices]
    names = self.class_names
    chosen = Source(name, records, self._read, self._labels, self._describe, names, tail_split)
    chosen.channels, chosen.value_range = self.channels, self.value_range
    if self.labels is not None:
      chosen.labels = self.labels[indices]  # those of TFDS have been read by now
    return chosen

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = next(self.read([index]))
    if isinstance(record, CorruptImage):
      raise record
    return record

  def read(self, indices: Sequence[int]) -> Iterator[dict[str, Any] | CorruptImage]:
    """`self[i]` of each index, but faster, and a `CorruptImage` is given, not raised.

    A disk that does not answer is no damaged image: it is asked again for three minutes or more.

    Raises:
      UserError: if it does not answer then.
    """
    records = [self._record(i) for i in indices]
    try:
      yield from map(self._finish, records, _patiently(self._read, records))
    except errors.UserError:
      raise
    except Exception as error:  # one unreadable record must not take the others along
      if len(records) > 1:
        yield from (next(self.read([i])) for i in indices)
      else:
        yield self._corrupt(records[0], error)

  def _finish(self, record: int, found: tuple) -> dict[str, Any] | CorruptImage:
    try:
      image, label, *size = found
      if not isinstance(image, np.ndarray):
        image = _patiently(pixels.read, image, self.channels)
        if image.dtype not in (np.uint8, np.bool_) and self.value_range is None:
          raise ValueError(_DEEP)
        image = pixels.to_uint8(image, self.channels, self.value_range)
      elif image.dtype == np.uint8 and image.ndim == 3:
        image = pixels.to_uint8(image, self.channels, None)  # colour of one channel is luma
      if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != self.channels:
        kind = f"uint8 [H, W, {self.channels}]"
        raise TypeError(f"an image is {kind}, not {image.dtype} {list(image.shape)}")
      height, width = size[0] if size else image.shape[:2]
      label = int(label) if self.num_classes else -1
      return {"image": image, "label": label, "size": (int(height), int(width))}
    except errors.UserError:
      raise
    except Exception as error:  # Pillow's plugins raise almost anything on a damaged file
      return self._corrupt(record, error)

  def _corrupt(self, record: int, error: Exception) -> CorruptImage:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return CorruptImage(f"{self._describe(record)} ({reason})")

  @functools.cached_property
  def labels(self) -> np.ndarray | None:
    """int32 [N], or None if unlabelled. No image is decoded, but TFDS records are all read."""
    if not self.num_classes:
      return None
    if self._labels is not None:
      return np.asarray(self._labels, np.int32)[self._records]
    parts = np.array_split(self._records, -(-len(self) // 1024))
    return np.array([found[1] for p in parts for found in self._read(p.tolist())], np.int32)

  @property
  def in_memory(self) -> bool:
    """Whether the images lie in memory, decoded."""
    read: Any = self._read
    plain = isinstance(read, functools.partial) and read.func is read_items and bool(read.args)
    return plain and isinstance(read.args[0], np.ndarray)

  def describe(self, index: int) -> str:
    """A short name of record `index`: the path of a file, or "cifar10/train[17]"."""
    return self._describe(self._record(index))

  def _record(self, index: int) -> int:
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)} in {self.name}")
    return int(self._records[index])


def _patiently(read: Callable, *args: Any) -> Any:
  """`read(*args)`, asked again while the machine or a network's disk is to blame, not the file."""
  for number, pause in enumerate(_PAUSES):
    try:
      return read(*args)
    except OSError as error:
      damaged = error.errno in (errno.EIO, errno.EREMOTEIO)  # or a mount that does not wait
      if error.errno not in _PASSING or (damaged and number):
        raise
      if pause is None:
        raise errors.UserError(
          f"images cannot be read any more ({error}), tried {len(_PAUSES)} times: nothing is wrong "
          "with the run, and the same command goes on when the disk is back"
        ) from None
      time.sleep(pause)
  raise AssertionError("the last pause is None")


def require_labels(source: Source, who: str) -> None:
  """Raises UserError if `source` has no labels, naming it and who asks for them."""
  if not source.num_classes:
    raise errors.UserError(
      f"{who} needs labels and {source.name} has none: name labelled images (a folder is labelled "
      "if all its images lie in two or more sub-folders, one a class)"
    )


def shared(one: Source, other: Source) -> int:
  """How many images two sources have in common, as their descriptions say: files, or records."""
  fewer, more = sorted((one, other), key=len)
  described = {fewer.describe(i) for i in range(len(fewer))}
  return sum(more.describe(i) in described for i in range(len(more)))


def measured_range(source: Source) -> pixels.Range | None:
  """`pixels.common_range` of the deep ones among 64 evenly spread images; None if none is deep.

  A function of the files alone, so that every process of a run comes to the same numbers.
  """
  deep, cut = [], 0
  records = np.unique(np.arange(_SAMPLE) * len(source) // _SAMPLE)
  for record in source._records[records].tolist():
    try:
      file = source._read([record])[0][0]
      if isinstance(file, np.ndarray):
        return None  # arrays are of eight bits
      depth = pixels.depth(file)
      cut += depth == "cut"
      if depth == "deep":
        image = pixels.read(file, source.channels)
        if source.channels in (1, 3):  # grey or colour: one range for all
          image = image.reshape(len(image), -1, 1)
        deep.append(image)
    except Exception:  # a damaged file is told when it is drawn
      continue
  if cut:
    logging.warning(
      "%d of %d images looked at in %s are colour of 16 bits a channel, of which Pillow keeps the "
      "upper eight: what holds fewer bits gets dark; save those as .npy",
      cut,
      len(records),
      source.name,
    )
  return pixels.common_range(deep) if deep else None


def read_items(
  images: Sequence | np.ndarray, labels: np.ndarray, records: list[int]
) -> list[tuple[Any, int]]:
  """The `read` of a source whose images, or their paths, and labels lie in memory."""
  return [(images[record], labels[record]) for record in records]


def folder_of(data_dir: str | os.PathLike | None, name: str) -> pathlib.Path:
  """`data_dir` as a path, "~" understood; a UserError that names data set `name` unless it is one.

  Raises:
    UserError: if there is no such folder.
  """
  try:
    if data_dir and (root := pathlib.Path(data_dir).expanduser()).is_dir():
      return root
  except OSError as error:  # of a folder above it
    raise errors.UserError(f"data_dir={data_dir} cannot be looked into: {error}") from None
  if data_dir is None:
    raise errors.UserError(
      f"data_dir=None of data set {name!r} is not a folder: give data_dir=FOLDER (in training "
      "config.data.data_dir, and config.probe.data_dir for the probe's own)"
    )
  raise errors.UserError(
    f"data_dir={data_dir} of data set {name!r} is not a folder, seen from {pathlib.Path.cwd()}: "
    "name one that is"
  )


def listed(names: Sequence[str], most: int = 3) -> str:
  """At most `most` names and how many more, for a message."""
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more if names else "none"
