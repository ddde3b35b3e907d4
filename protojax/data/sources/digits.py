"""Handwritten digits that come with scikit-learn: a data set that needs no download."""

import functools
import os

import numpy as np
from PIL import Image

from protojax import errors
from protojax.data.sources import source


def build(split: str | None, data_dir: str | os.PathLike | None = None) -> source.Source:
  """1,797 grey images of 8 x 8 pixels and 16 levels, enlarged to 32 x 32 (bicubic); ten classes.

  Args:
    split: "train" or "test"; every fifth image of a class is a test image.
    data_dir: not looked at.

  Raises:
    UserError: for another split.
  """
  del data_dir
  from sklearn import datasets  # slow to import, and only for this source

  if split not in ("train", "test"):
    raise errors.UserError(f"digits has no split {split!r}: there are train, test")
  data = datasets.load_digits()
  labels = data.target.astype(np.int32)
  test = np.sort(np.concatenate([np.flatnonzero(labels == d)[4::5] for d in range(10)]))
  chosen = test if split == "test" else np.setdiff1d(np.arange(len(labels)), test)
  small, labels = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8), labels[chosen]
  large = [Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC) for x in small]
  images = np.stack([np.asarray(x.convert("RGB")) for x in large])
  read = functools.partial(source.read_items, images, labels)
  classes = [str(d) for d in range(10)]
  return source.Source(f"digits/{split}", np.arange(len(labels)), read, labels, class_names=classes)
