"""CIFAR-10 and CIFAR-100 from their authors' archives: downloaded, checked, read without pickle.

The binary version of the archives (Krizhevsky, 2009; https://www.cs.toronto.edu/~kriz/cifar.html):
records of one or two labels and 3,072 bytes, the red, green and blue plane. The version for Python
holds the same in pickles, which are programs.
"""

import errno
import hashlib
import http.client
import io
import os
import pathlib
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from protojax import errors

_BLOCK = 2**20


class Archive(NamedTuple):
  """An archive and where things are in it; size and sha256 as TFDS lists them, too."""

  url: str
  size: int
  sha256: str
  folder: str
  splits: dict[str, tuple[str, ...]]
  labels: dict[str, str]  # {feature: file of its names}, in the order of the bytes of a record


ARCHIVES = {
  "cifar10": Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-batches-bin",
    {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    {"label": "batches.meta.txt"},
  ),
  "cifar100": Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    168_513_733,
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    "cifar-100-binary",
    {"train": ("train.bin",), "test": ("test.bin",)},
    {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
  ),
}
VERSION = "3.0.2"  # of the same data in TFDS, whose builders of that name read it


def download(archive: Archive, folder: pathlib.Path) -> pathlib.Path:
  """The archive in `folder`, checked; goes on with what an earlier attempt has left there.

  Raises:
    UserError: if it cannot be downloaded, or is not what its authors published.
  """
  import tqdm

  path = folder / archive.url.rpartition("/")[2]
  if path.exists() and path.stat().st_size == archive.size:
    return check(archive, path)
  part = path.with_name(path.name + ".part")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    part.touch()
  except OSError as error:
    raise errors.UserError(f"cannot write to {folder}: {error.strerror}") from None
  have = part.stat().st_size
  if have > archive.size:  # of something else: from the start
    os.truncate(part, 0)
    have = 0
  if have < archive.size:
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"})
    try:
      with urllib.request.urlopen(request, timeout=60) as answer:
        have = have if answer.status == 206 else 0  # a server may send it from the start
        bar = tqdm.tqdm(
          desc=path.name, initial=have, total=archive.size, unit="B", unit_scale=True, disable=None
        )
        with bar, open(part, "ab" if have else "wb") as file:
          while block := answer.read(_BLOCK):
            file.write(block)
            bar.update(len(block))
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
      if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        raise
      raise errors.UserError(
        f"cannot download {archive.url} ({getattr(error, 'reason', None) or error}): run the "
        "same command again, it goes on where it stopped; or download it elsewhere and give "
        "--archive=FILE"
      ) from None
    if part.stat().st_size < archive.size:
      raise errors.UserError(
        f"the download of {archive.url} ended after {part.stat().st_size:,} of {archive.size:,} "
        "bytes: run the same command again, it goes on from there"
      )
  try:
    check(archive, part)
  except errors.UserError:
    part.unlink()
    raise
  os.replace(part, path)
  return path


def check(archive: Archive, path: str | os.PathLike) -> pathlib.Path:
  """`path`, if that is the archive to the last bit.

  Raises:
    UserError: if it is not.
  """
  path = pathlib.Path(path).expanduser()
  digest = hashlib.sha256()
  try:
    with open(path, "rb") as file:
      while block := file.read(_BLOCK):
        digest.update(block)
  except OSError as error:
    raise errors.UserError(f"cannot read the archive {path}: {error.strerror}") from None
  if digest.hexdigest() != archive.sha256:
    raise errors.UserError(
      f"{path} is not the archive that {archive.url} should be (sha256 {digest.hexdigest()} "
      f"instead of {archive.sha256}): download it from there, the binary version, not the one for "
      "Python"
    )
  return path


def features(archive: Archive, path: pathlib.Path) -> dict[str, Any]:
  """The features of `examples`, as those of the data set of that name in TFDS."""
  import tensorflow_datasets as tfds

  with tarfile.open(path) as files:
    names = {
      feature: _member(archive, files, file).decode().split()
      for feature, file in archive.labels.items()
    }
  return {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(32, 32, 3)),
    **{feature: tfds.features.ClassLabel(names=found) for feature, found in names.items()},
  }


def examples(archive: Archive, path: pathlib.Path, split: str) -> Iterator[dict[str, int | bytes]]:
  """The images of a split as PNG, which loses nothing, in the order of the archive."""
  width, number = len(archive.labels), 0
  with tarfile.open(path) as files:
    for file in archive.splits[split]:
      records = np.frombuffer(_member(archive, files, file), np.uint8).reshape(-1, width + 3072)
      pixels = records[:, width:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
      for labels, image in zip(records[:, :width].tolist(), pixels, strict=True):
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(png, "png")
        found = dict(zip(archive.labels, labels, strict=True))
        yield {"id": f"{split}_{number:05d}".encode(), "image": png.getvalue()} | found
        number += 1


def _member(archive: Archive, files: tarfile.TarFile, name: str) -> bytes:
  member = files.extractfile(f"{archive.folder}/{name}")
  return member.read() if member else b""
