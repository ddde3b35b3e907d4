"""WebDataset shards: tar files in which an image and its label have the same name.

A shard is indexed once, where every image begins and how long it is; afterwards any image is one
seek and one read.
"""

import functools
import hashlib
import json
import os
import pathlib
import tarfile
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging

from protojax import errors, files
from protojax.data.sources import folder, shards, source

_FORM = 2  # of the index file
_LABEL = 1 << 20  # bytes at most


class _Sample(NamedTuple):
  name: str
  offset: int
  size: int
  label: str | None


def build(split: str | None, data_dir: str | os.PathLike | None) -> source.Source:
  """The images in the tar shards of one split, in the order of their names.

  Members of one shard with the same path up to the first dot of the file name are a sample: the
  first with an image extension is its image, `.npy` only in a shard without pictures; its label is
  the text of `.cls`, or "label" of `.json`, or there is none. A sample without an image is left
  out. Classes are those of all splits together.

  The index lies beside the shard, or in `~/.cache/protojax/tar` where that folder cannot be
  written, and is made anew when the shard's size or time has changed.

  Args:
    split: as `shards.of_split` takes it: "train" of train-000.tar, imagenet-train-000.tar.
    data_dir: folder of the shards, at any depth.

  Raises:
    UserError: if there is no such folder, split or image.
  """
  splits = shards.found(data_dir, ".tar")
  paths = shards.of_split(splits, split)
  indices = {path: _index(path) for path in paths}
  names: list[str] = []
  if any(sample.label is not None for index in indices.values() for sample in index):
    everywhere = [p for of_one in splits.values() for p in of_one]
    known = (indices[p] if p in indices else _index(p) for p in everywhere)
    names = shards.classes([sample.label for index in known for sample in index])
  samples = [sample for path in paths for sample in indices[path]]
  if not samples:
    raise errors.UserError(
      f"{source.listed([str(path) for path in paths])}: no image ({' '.join(folder.EXTENSIONS)}) "
      "in these shards"
    )
  shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(indices[p]) for p in paths])
  where = np.array([(sample.offset, sample.size) for sample in samples], np.int64)
  labels = shards.numbers([sample.label for sample in samples], names)
  read = functools.partial(_read, [str(p) for p in paths], shard, where, labels)
  describe = functools.partial(
    _describe, [str(p) for p in paths], shard, [sample.name for sample in samples]
  )
  name = f"tar {pathlib.Path(data_dir or '')}" + (f"/{split}" if split else "")
  return source.Source(name, np.arange(len(samples)), read, labels, describe, names)


def _read(
  paths: list[str], shard: np.ndarray, where: np.ndarray, labels: np.ndarray, records: list[int]
) -> list[tuple[bytes, int]]:
  found = []
  for record in records:
    offset, size = where[record].tolist()
    with open(paths[shard[record]], "rb") as file:
      file.seek(offset)
      found.append((file.read(size), int(labels[record])))
  return found


def _describe(paths: list[str], shard: np.ndarray, names: list[str], record: int) -> str:
  return f"{paths[shard[record]]}: {names[record]}"


def _index(path: pathlib.Path) -> list[_Sample]:
  """The samples of a shard, from its index file or from the shard, which then gets one."""
  about = path.stat()
  state = {"form": _FORM, "size": about.st_size, "mtime": about.st_mtime_ns}
  beside = path.with_name(f".{path.name}.index.json")
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  key = hashlib.sha256(str(path.absolute()).encode()).hexdigest()
  places = (beside, cache / "protojax" / "tar" / f"{key}.json")
  for place in places:
    try:
      known = files.parse_json(place.read_text())
      if {name: known[name] for name in state} == state:
        samples = [_Sample(*sample) for sample in known["samples"]]
        if all(_plausible(sample, about.st_size) for sample in samples):
          return samples
    except (OSError, ValueError, KeyError, TypeError):
      continue  # none, or half of one, or another form
  logging.info("indexing %s, once", path)
  samples = _samples(path)
  for place in places:
    try:
      files.write(place, json.dumps(state | {"samples": samples}))
      break
    except errors.UserError:
      continue  # not to be written to; without any index it is made again next time
  return samples


def _plausible(sample: _Sample, size: int) -> bool:
  """Whether a sample of an index that anybody may have written lies in a shard of `size` bytes."""
  name, begin, length, label = sample
  words = isinstance(name, str) and isinstance(label, str | None)
  numbers = type(begin) is int and type(length) is int
  return words and numbers and 0 <= begin <= begin + length <= size


class _Whole:
  """A shard for `tarfile`, which reads as many bytes as a header says, be it fewer than none."""

  def __init__(self, file: IO[bytes], size: int):
    self._file, self._size = file, size
    self.tell = file.tell

  def read(self, count: int) -> bytes:
    if count < 0:
      raise tarfile.ReadError("a length below zero")
    return self._file.read(min(count, max(0, self._size - self._file.tell())))

  def seek(self, place: int, whence: int = 0) -> int:
    if whence == 0 and place > self._size + tarfile.RECORDSIZE:
      raise tarfile.ReadError("a member that ends outside of the file")
    return self._file.seek(place, whence)


def _archive(file: IO[bytes], size: int) -> tarfile.TarFile:
  whole: Any = _Whole(file, size)  # tell, seek and read are all that is asked of it
  return tarfile.open(fileobj=whole, mode="r:")


def _samples(path: pathlib.Path) -> list[_Sample]:
  images: dict[str, tuple[str, int, int]] = {}
  arrays: dict[str, tuple[str, int, int]] = {}
  labels: dict[str, str] = {}
  dotted: list[tuple[str, str]] = []
  size, last = path.stat().st_size, -1
  try:
    with open(path, "rb") as shard, _archive(shard, size) as archive:
      for member in archive:
        if member.offset <= last or member.size < 0:
          raise tarfile.ReadError("a member that begins before the one before it")
        last = member.offset
        if member.issparse() or member.offset_data + member.size > size:
          continue
        directory, _, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if not member.isreg() or not stem:
          continue
        key, extension = f"{directory}/{stem}", extension.lower()
        if f".{extension}" in folder.EXTENSIONS:
          kind = arrays if extension == "npy" else images
          kind.setdefault(key, (member.name, member.offset_data, member.size))
        elif pathlib.PurePath(extension).suffix in folder.EXTENSIONS:
          dotted.append((key, member.name))
        elif extension in ("cls", "json") and (label := _label(archive, member)) is not None:
          if extension == "cls" or key not in labels:
            labels[key] = label
  except Exception as error:  # what is in a damaged header fails in many ways
    before, said = len(images or arrays), errors.in_line(error)
    logging.warning("%s is damaged (%s): %d images before that", path, said, before)
  if alone := [name for key, name in dotted if key not in images and key not in arrays]:
    logging.warning(
      "%s: %d images are left out, for in WebDataset a name ends at its first dot: %s",
      path,
      len(alone),
      source.listed(alone),
    )
  images = images or arrays  # beside pictures an array is something about them, as in a folder
  return [_Sample(*image, labels.get(key)) for key, image in images.items()]


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
  """The text of a label, or None; a damaged one is none."""
  if member.size > _LABEL:
    return None
  file = archive.extractfile(member)
  text = file.read().decode("utf-8", "replace").strip() if file else ""
  if member.name.lower().endswith(".json"):
    try:
      content = files.parse_json(text)
    except ValueError:
      return None
    label = content.get("label") if isinstance(content, dict) else None
    return str(label) if isinstance(label, int | str) else None
  return text or None
