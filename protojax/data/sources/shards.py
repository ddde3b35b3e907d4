"""What parquet and tar shards share: which files are which split, and classes from raw labels."""

import collections
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from protojax import errors, files
from protojax.data.sources import folder, source

SPLITS = ("train", "val", "valid", "validation", "dev", "test")  # what names of splits look like
_POINTER = 1024  # bytes, more than a pointer to a file has


def found(data_dir: str | os.PathLike | None, ending: str) -> dict[str, list[pathlib.Path]]:
  """The shards below a folder by the split that their names say, {split: [paths], sorted}.

  `train-00000-of-00002.parquet`, `train_000.tar`, `imagenet-train-000.tar`, `train/0000.parquet`
  are of the split "train"; `shard-000.tar` is of "shard" and `000.tar` of its folder. Links are
  followed, names that start with a dot are left out.

  Args:
    data_dir: "~" is understood.
    ending: ".parquet" or ".tar".

  Raises:
    UserError: if there is no such folder, or no such file in it.
  """
  root = source.folder_of(data_dir, ending[1:])
  splits: dict[str, list[pathlib.Path]] = {}
  seen = set()
  for inside in sorted(map(pathlib.Path, folder.files_below(root, collections.Counter()))):
    if inside.suffix == ending and (file := os.path.realpath(root / inside)) not in seen:
      seen.add(file)  # once, though a link such as "latest" leads to it, too
      splits.setdefault(_split_of(inside), []).append(root / inside)
  if not splits:
    raise errors.UserError(f"{root} holds no {ending} files: name their folder with data_dir")
  return splits


def _split_of(path: pathlib.Path) -> str:
  match = re.fullmatch(r"(.*?)[-_.]?(\d+(-of-\d+)?([-_.][0-9a-f]+)?)?", path.stem)
  name, above = match[1] if match else path.stem, path.parent.name
  words = [word for word in re.split(r"[-_.]", name) if word in SPLITS]
  if words or above in SPLITS:
    return words[-1] if words else above
  return name or above or "all"


def of_split(splits: dict[str, list[pathlib.Path]], split: str | None) -> list[pathlib.Path]:
  """The shards of one split; None, and "train" where no name says a split, take all.

  Raises:
    UserError: if there is no such split; a test split that is silently the training set would
      flatter. Or if one of them is a pointer of Git LFS.
  """
  if split in splits:
    return [_whole(path) for path in splits[split]]
  if split is None or (split == "train" and not set(SPLITS) & set(splits)):
    return sorted(_whole(path) for paths in splits.values() for path in paths)
  first = next(iter(splits.values()))[0]
  raise errors.UserError(
    f"no shards of the split {split!r} beside {first}: their names say "
    f"{source.listed(sorted(splits), 10)}"
  )


def _whole(path: pathlib.Path) -> pathlib.Path:
  if path.stat().st_size < _POINTER and (said := files.pointer(path.read_bytes())):
    raise errors.UserError(f"{path} is {said}")
  return path


def classes(labels: Sequence) -> list[str]:
  """Names of the classes from the labels of all splits, whole numbers in their order or strings.

  None and whole numbers below 0 are no label.
  """
  names = {_name(label) for label in labels if label is not None}
  names -= {name for name in names if re.fullmatch(r"-\d+", name)}
  return sorted(names, key=int if all(map(str.isdecimal, names)) else None)


def numbers(labels: Sequence, names: Sequence[str]) -> np.ndarray:
  """int32 [N]: the class of each label, as `classes` names them; -1 for no label."""
  number = {name: i for i, name in enumerate(names)}
  return np.array([number.get(_name(label), -1) for label in labels], np.int32)


def _name(label: object) -> str:
  text = str(label)
  return str(int(text)) if re.fullmatch(r"-?[0-9]+", text) else text
