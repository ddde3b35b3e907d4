"""Writes data sets as TFDS prepares them, array_record in a folder, without TensorFlow."""

import errno
import functools
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any

import numpy as np
from PIL import Image

from protojax import errors
from protojax.data import decoding, pipeline, sources

QUALITY = 95  # of JPEG
_FULL_COLOUR = 95  # quality from which on chroma is not subsampled
_SHARD = 2**30  # bytes after which a new file begins
_BATCH = 256  # images encoded at a time
_MANY = 10_000  # images for which processes are worth their start


def folder(root: str | os.PathLike, name: str, version: str) -> pathlib.Path:
  """Where data set `name` goes below `root`.

  Raises:
    UserError: if it is there already.
  """
  place = pathlib.Path(root).expanduser() / name / version
  if place.exists():
    raise errors.UserError(
      f"{place} is there already: it is used as it is; delete it to have it made again"
    )
  return place


def write(
  root: str | os.PathLike,
  name: str,
  version: str,
  features: Mapping[str, Any],
  splits: Mapping[str, Iterable[Mapping[str, int | bytes]]],
) -> dict[str, int]:
  """Writes a data set whole or not at all, `root/name/version`.

  Args:
    root: the `data_dir` to train with.
    name: lower case, "my_photos".
    version: "1.0.0".
    features: {name: of `tfds.features`}.
    splits: {split: examples}, an example is {name of a feature: number or bytes}, an image encoded.

  Returns:
    {split: number of examples}.

  Raises:
    UserError: if it is there already, cannot be written, or a split has no example.
  """
  import tensorflow_datasets as tfds  # slow to import, and without TensorFlow

  place = folder(root, name, version)
  unfinished = place.parent.parent / f".{name}-{version}.unfinished"
  try:
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    tfds.features.FeaturesDict(features).save_config(unfinished)
    infos = [_split(unfinished, name, split, examples) for split, examples in splits.items()]
    info = {
      "fileFormat": "array_record",
      "moduleName": "protojax.prepare",
      "name": name,
      "splits": infos,
      "version": version,
    }
    (unfinished / "dataset_info.json").write_text(json.dumps(info, indent=2))
    place.parent.mkdir(exist_ok=True)
    os.replace(unfinished, place)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise errors.UserError(f"cannot write to {root}: {error.strerror or error}") from None
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return {info["name"]: sum(map(int, info["shardLengths"])) for info in infos}


def _split(place: pathlib.Path, name: str, split: str, examples: Iterable) -> dict:
  """Writes the files of one split; returns what dataset_info.json says of it."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  lengths, size, in_shard, writer = [], 0, 0, None
  for content in examples:
    example = tf_example_pb2.Example()
    for key, value in content.items():
      feature = example.features.feature[key]
      if isinstance(value, bytes):
        feature.bytes_list.value.append(value)
      else:
        feature.int64_list.value.append(value)
    if writer is None or in_shard > _SHARD:
      if writer is not None:
        writer.close()
      writer = array_record_module.ArrayRecordWriter(
        str(place / f"{split}-{len(lengths)}"), "group_size:1"
      )
      lengths.append(0)
      in_shard = 0
    record = example.SerializeToString()
    writer.write(record)
    lengths[-1] += 1
    in_shard += len(record)
    size += len(record)
  if writer is None:
    raise errors.UserError(f"{name} has no image for the split {split!r}: nothing was written")
  writer.close()
  for i in range(len(lengths)):
    of_all = f"{i:05d}-of-{len(lengths):05d}"
    (place / f"{split}-{i}").rename(place / f"{name}-{split}.array_record-{of_all}")
  return {
    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    "name": split,
    "numBytes": str(size),
    "shardLengths": [str(length) for length in lengths],
  }


def features_of(source: sources.Source) -> dict[str, Any]:
  """The features of what `smaller` yields.

  Raises:
    UserError: if its images are not of three channels, which is what a JPEG holds.
  """
  if source.channels != 3:
    raise errors.UserError(
      f"{source.name} has {source.channels} channels, a prepared data set 3: train from its files"
    )
  import tensorflow_datasets as tfds

  found = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(None, None, 3))}
  if source.num_classes:
    found["label"] = tfds.features.ClassLabel(names=list(source.class_names))
  return found | dict.fromkeys(sources.tfds.ORIGINAL, tfds.features.Scalar(np.int64))


def smaller(
  source: sources.Source,
  *,
  root: str,
  size: int,
  num_workers: int | None,
  skipped: list[str],
  quality: int = QUALITY,
) -> Iterator[dict[str, int | bytes]]:
  """Every readable image of a source as a JPEG of the size that training stores, in its order.

  Sides longer than `size` are shrunk as `decoding.store` does it, so that with `data.image_size` of
  the same number training gets the same pixels but for what JPEG loses; height and width before
  that go along, so crops are drawn as from the original.

  Args:
    source: from `sources.build`.
    root: folder of the source; the "id" of an image is its name below that.
    size: pixels.
    num_workers: processes that decode; 0 uses threads, None chooses.
    skipped: takes the names of images that cannot be read.
    quality: of JPEG, 1 to 100; below 95 its colours have half the resolution.

  Raises:
    UserError: if 100 images in a row cannot be read.
  """
  above = pathlib.Path(root).expanduser()
  if num_workers is None:  # nothing else needs the cores
    wanted = decoding.cores() if len(source) > _MANY else 0
    shape = {"batch_size": _BATCH, "image_size": size, "channels": source.channels}
    num_workers = decoding.fit(wanted, asked=False, **shape)
  batches = pipeline.sequential(source, batch_size=_BATCH, image_size=size, num_workers=num_workers)
  log = pipeline.SkippedLog(source.describe)
  encode = functools.partial(_jpeg, quality=quality)
  with futures.ThreadPoolExecutor() as pool:
    for batch in batches:
      skipped += log.update(batch["skipped"])
      rows = batch["mask"].nonzero()[0]
      shapes = [decoding.stored_shape(batch["size"][row], size) for row in rows]
      images = [
        batch["image"][row, :height, :width]
        for row, (height, width) in zip(rows, shapes, strict=True)
      ]
      for row, jpeg in zip(rows, pool.map(encode, images), strict=True):
        name = source.describe(int(batch["index"][row])).removeprefix(f"{above}/")
        example: dict[str, int | bytes] = {"id": name.encode(), "image": jpeg}
        if source.num_classes:
          example["label"] = int(batch["label"][row])
        sides = zip(sources.tfds.ORIGINAL, batch["size"][row].tolist(), strict=True)
        yield example | dict(sides)


def _jpeg(image: np.ndarray, quality: int) -> bytes:
  file = io.BytesIO()
  colour = "4:4:4" if quality >= _FULL_COLOUR else "4:2:0"
  Image.fromarray(image).save(file, "jpeg", quality=quality, subsampling=colour)
  return file.getvalue()
