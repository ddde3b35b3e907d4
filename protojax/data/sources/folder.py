"""Image files in a folder, at any depth; a sub-folder of it is a class."""

import collections
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from absl import logging
from PIL import features

from protojax import errors
from protojax.data.sources import source

EXTENSIONS = (
  *(".jpg", ".jpeg", ".png", ".webp", ".bmp"),
  *(".tif", ".tiff", ".gif", ".avif", ".npy"),
)
_KINDS = 5  # of files that are left out, named
_NEEDS = {".webp": "webp", ".avif": "avif"}  # parts that a Pillow may have been built without
_TRAIN = ("train", "training")
# In this order: of a folder with val/ and test/, the first is the one to look at during training.
HELD_OUT = ("val", "validation", "valid", "test", "testing")


@functools.cache
def _tell(said: str) -> None:
  """Logs what was found in a folder, once: a report looks at the same one several times."""
  logging.info("%s", said)


def build(split: str | None, data_dir: str | os.PathLike | None) -> source.Source:
  """The images below `data_dir/split`, or below `data_dir` where it is not divided into splits.

  Labelled by their first-level folder unless there is only one or images lie beside them. Names
  that start with a dot are left out, and so are links to a folder above; what was found and what
  was left out is logged. The name of a split is never a class: of a divided folder as a whole,
  `split=None`, the classes are the folders within the splits. Only "train" may be missing: a test
  split that is silently the training set would flatter.

  Args:
    split: name of a sub-folder in any case, see `find_split`; or None.
    data_dir: any nesting of files with one of EXTENSIONS; `.npy` where there are no others.

  Raises:
    UserError: if there is no such folder, or no image in it.
  """
  root = source.folder_of(data_dir, "folder")
  if split and (found := _sub_folder(root, split)) is not None:
    root = found
  elif split:
    names = [p.name for p in _folders(root)]
    if split != "train" or any(n.lower() in (*_TRAIN, *HELD_OUT) for n in names):
      raise errors.UserError(f"no folder {split!r} in {root}: there are {source.listed(names)}")
  left: collections.Counter[str] = collections.Counter()
  found_files = list(files_below(root, left))
  paths, others = _images(found_files, left)
  if not paths:
    extensions = sorted({_extension(p) for p in others})
    raise errors.UserError(
      f"{root} holds no images ({' '.join(EXTENSIONS)}): files skipped: "
      f"{source.listed(sorted(others))}; extensions seen: {source.listed(extensions, 10)}"
      + (f"; left out: {_counts(left)}" if left else "")
    )
  paths.sort()
  classes, labels = _classes(paths)
  counts = collections.Counter(map(_extension, paths))
  _tell(
    f"folder {root}: {len(paths):,} images ("
    + ", ".join(f"{n:,} {extension}" for extension, n in counts.most_common())
    + "), "
    + (
      f"{len(classes):,} classes, its folders: {source.listed(classes)}"
      if classes
      else "no classes"
    )
    + f"; left out: {_counts(left) or 'nothing'}"
  )
  paths = [os.path.join(root, p) for p in paths]
  read = functools.partial(source.read_items, paths, labels)
  describe = functools.partial(_shown, paths)
  return source.Source(
    f"folder {root}", np.arange(len(paths)), read, labels, describe, list(map(_text, classes))
  )


def find_split(split: str | None, data_dir: str | os.PathLike | None) -> str | None:
  """The folder of labelled images that is meant by `split`, if it means held-out ones.

  That of this name, if it is there and has class folders; else the first with class folders of
  val, validation, valid, test, testing; else the first that is there at all, or `split`.

  Raises:
    UserError: if `data_dir` is no folder.
  """
  root = source.folder_of(data_dir, "folder")
  if split is None or split.lower() not in HELD_OUT:
    return split
  there = [_exact(root, name) for name in (split, *HELD_OUT)]
  found = [p for p in there if p is not None]
  labelled = [p for p in found if len(_folders(p)) > 1]
  return (labelled or found)[0].name if found else split


def _exact(root: pathlib.Path, name: str) -> pathlib.Path | None:
  """The sub-folder called `name`, or so but for upper and lower case."""
  if (root / name).is_dir():
    return root / name
  return next((p for p in _folders(root) if p.name.lower() == name.lower()), None)


def _sub_folder(root: pathlib.Path, split: str) -> pathlib.Path | None:
  """The folder of a split; "train" may be called training, "val" validation or valid, and so on."""
  for alike in (_TRAIN, HELD_OUT[:3], HELD_OUT[3:]):
    if split.lower() in alike:
      found = [_exact(root, name) for name in (split, *alike)]
      return next((p for p in found if p is not None), None)
  return _exact(root, split)


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
  try:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
  except OSError as error:
    raise errors.UserError(f"{root} cannot be looked into: {error}") from None


def _shown(paths: list[str], record: int) -> str:
  return _text(paths[record])


def _text(name: str) -> str:
  """A file's name that can be printed and written; bytes in it that are no UTF-8 are replaced."""
  return os.fsencode(name).decode("utf-8", "replace")


def files_below(root: pathlib.Path, left: collections.Counter[str]) -> Iterator[str]:
  """Every file below, relative to root; counts what is not one in `left`. Links are followed."""

  def identity(path: str | os.PathLike) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_dev, info.st_ino

  here = root.resolve()
  above = tuple(identity(folder) for folder in (here, *here.parents))
  folders: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", above)]
  while folders:
    below, above = folders.pop()
    try:
      entries = list(os.scandir(root / below))
    except OSError:
      left["folder that cannot be opened"] += 1
      continue
    for entry in entries:
      path = os.path.join(below, entry.name)
      if entry.name.startswith("."):
        left["hidden"] += 1
        continue
      try:
        this = identity(entry.path) if entry.is_dir() else None
        if this is None and entry.is_symlink():
          os.stat(entry.path)
        plain = this is not None or entry.is_file()
      except OSError:
        left["broken link"] += 1
        continue
      if not plain:  # reading one might never end
        left["pipe, socket or device"] += 1
      elif this is None:
        yield path
      elif this in above:
        left["link to a folder above it"] += 1
      else:
        folders.append((path, (*above, this)))


def _images(files: Iterable[str], left: collections.Counter[str]) -> tuple[list[str], list[str]]:
  """(images, all other files), the latter counted in `left` with the reason."""
  images, others = [], []
  lacking = {e for e, part in _NEEDS.items() if not features.check(part)}
  known = set(EXTENSIONS) - lacking
  pictures = known - {".npy"}
  files = list(files)
  arrays_too = not any(_extension(path) in pictures for path in files)
  for path in files:
    extension = _extension(path)
    if extension in pictures or (extension == ".npy" and arrays_too):
      images.append(path)
      continue
    others.append(path)
    if extension in lacking:
      left[f"{extension} (this Pillow cannot read it: pip install -U pillow)"] += 1
    elif extension == ".npy":
      left[".npy (arrays beside pictures)"] += 1
    else:
      left[f"{extension} (not read)"] += 1
  return images, others


def _extension(path: str) -> str:
  return os.path.splitext(path)[1].lower() or "(no extension)"


def _counts(left: collections.Counter[str]) -> str:
  """ "4 .heic (not read), 1 hidden": of many kinds the most frequent."""
  kinds = left.most_common()
  listed, others = kinds[:_KINDS], kinds[_KINDS:]
  if len(others) == 1:  # as short as to say that there is one
    listed, others = kinds, []
  said = [f"{n:,} {what}" for what, n in listed]
  if others:
    said.append(f"and {sum(n for _, n in others):,} more of {len(others)} other kinds")
  return ", ".join(said)


def _classes(paths: list[str]) -> tuple[list[str], np.ndarray]:
  """(names, int32 label of each path); no names where the folders are no classes."""
  parts = [p.split(os.sep) for p in paths]
  first = {p[0].lower() for p in parts if len(p) > 1}
  divided = first <= {*_TRAIN, *HELD_OUT} or not (
    first.isdisjoint(_TRAIN) or first.isdisjoint(HELD_OUT)
  )
  level = 1 if first and divided else 0
  # A file beside the class folders, or beside the splits, has no class.
  of_split = {*_TRAIN, *HELD_OUT} if level else first
  names = [p[level] if len(p) > level + 1 and p[0].lower() in of_split else "" for p in parts]
  classes, labels = np.unique(names, return_inverse=True)
  no_classes = "" in classes or len(classes) < 2
  return [] if no_classes else classes.tolist(), labels.astype(np.int32)
