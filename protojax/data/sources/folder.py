"""Image files in a folder, at any depth; a sub-folder of it is a class."""

import functools
import os

import numpy as np

from protojax import errors
from protojax.data.sources import source

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SPLIT_FOLDERS = {"test", "train", "val", "valid", "validation"}


def build(split: str | None, data_dir: str | os.PathLike | None) -> source.Source:
  """The images below `data_dir/split`, or below `data_dir` where it is not divided into splits.

  Labelled by their first-level folder unless there is only one or images lie beside them. Names
  that start with a dot are left out. Only "train" may be missing: a test split that is silently the
  training set would flatter.

  Args:
    split: name of a sub-folder, or None.
    data_dir: any nesting of files with one of EXTENSIONS.

  Raises:
    UserError: if there is no such folder, or no image in it.
  """
  root = source.folder_of(data_dir, "folder")
  if split and (root / split).is_dir():
    root = root / split
  else:
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if split and (split != "train" or not _SPLIT_FOLDERS.isdisjoint(names)):
      raise errors.UserError(f"no folder {split!r} in {root}: there are {source.listed(names)}")
  paths: list[str] = []
  others: list[str] = []
  for folder, folders, files in os.walk(root, followlinks=True):
    folders[:] = [f for f in folders if not f.startswith(".")]
    for file in files:
      image = not file.startswith(".") and file.lower().endswith(EXTENSIONS)
      (paths if image else others).append(os.path.relpath(os.path.join(folder, file), root))
  if not paths:
    seen = sorted({os.path.splitext(p)[1].lower() or "(none)" for p in others})
    raise errors.UserError(
      f"{root} holds no images ({' '.join(EXTENSIONS)}): files skipped: "
      f"{source.listed(sorted(others))}; extensions seen: {source.listed(seen, 10)}"
    )
  paths.sort()
  first = [p.split(os.sep, 1)[0] if os.sep in p else "" for p in paths]
  classes, labels = np.unique(first, return_inverse=True)
  classes = [] if "" in classes or len(classes) < 2 else classes.tolist()
  paths, labels = [os.path.join(root, p) for p in paths], labels.astype(np.int32)
  read = functools.partial(source.read_items, paths, labels)
  return source.Source(
    f"folder {root}", np.arange(len(paths)), read, labels, paths.__getitem__, classes
  )
