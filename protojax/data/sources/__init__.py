"""Images by row number: the digits of scikit-learn, prepared TFDS data sets, folders of files.

TensorFlow is never imported: TFDS records are read as bytes and decoded by Pillow, like any file.
"""

import contextlib
import functools
import io
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from protojax import errors

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SPLIT_FOLDERS = {"test", "train", "val", "valid", "validation"}


class CorruptImage(Exception):
  """A record that cannot be read or decoded; the message names it and the reason."""


class Source:
  """Random access to images; can be pickled into worker processes.

  `source[i]` is {"image": uint8 [H, W, 3], "label": int}, the label -1 where there is none. It
  raises `CorruptImage` if record i cannot be decoded and IndexError if there is no record i.

  Attributes:
    name: for messages.
    class_names, num_classes: names in the order of the labels; (), 0 if unlabelled.
    tail_split: with `imbalance`, {"many", "medium", "few": [classes]} of more than 100, 20 to 100
      and fewer than 20 images (arXiv 1904.05160); else None.

  Args:
    rows: int array [N], the records that there are.
    read: list of records -> list of (what `decode` takes or uint8 [H, W, 3], label).
    labels: int32, of all records; None reads them when they are asked for.
    describe: record -> str.
  """

  def __init__(self, name, rows, read, labels, describe, class_names=(), tail_split=None):
    self.name = name
    self.class_names = tuple(class_names)
    self.num_classes = len(self.class_names)
    self.tail_split = tail_split
    self._rows, self._read, self._labels, self._describe = rows, read, labels, describe

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index) -> dict:
    record = next(self.read([index]))
    if isinstance(record, CorruptImage):
      raise record
    return record

  def read(self, indices) -> Iterator[dict | CorruptImage]:
    """`self[i]` of each index, but faster, and a `CorruptImage` is given, not raised."""
    rows = [self._row(i) for i in indices]
    try:
      yield from map(self._finish, rows, self._read(rows))
    except Exception as error:  # one unreadable record must not take the others along
      if len(rows) > 1:
        yield from (next(self.read([i])) for i in indices)
      else:
        yield self._bad(rows[0], error)

  def _finish(self, row: int, pair) -> dict | CorruptImage:
    image, label = pair
    try:
      image = image if isinstance(image, np.ndarray) else decode(image)
    except Exception as error:  # Pillow's plugins raise almost anything on a damaged file
      return self._bad(row, error)
    return {"image": image, "label": int(label) if self.num_classes else -1}

  def _bad(self, row: int, error: Exception) -> CorruptImage:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return CorruptImage(f"{self._describe(row)} ({reason})")

  @functools.cached_property
  def labels(self) -> np.ndarray | None:
    """int32 [N], or None if unlabelled. No image is decoded, but TFDS records are all read."""
    if not self.num_classes or self._labels is not None:
      return self._labels[self._rows] if self.num_classes else None
    parts = np.array_split(self._rows, -(-len(self) // 1024))
    return np.array([label for p in parts for _, label in self._read(p.tolist())], np.int32)

  def describe(self, index: int) -> str:
    """A short name of record `index`: the path of a file, or "cifar10/train[17]"."""
    return self._describe(self._row(index))

  def _row(self, index) -> int:
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)} in {self.name}")
    return int(self._rows[index])


def build(name: str, *, split, data_dir=None, imbalance=None, seed: int = 0) -> Source:
  """The source called `name`.

  Args:
    name: "digits" (shipped inside scikit-learn); "folder", images (jpg, jpeg, png, webp, bmp) at
      any depth of `data_dir/split`, or of `data_dir` where it is not divided, labelled by their
      first-level folder unless there is only one or images lie beside them; else a TFDS data set
      prepared in `data_dir` as array_record, "name[/config][:version]".
    split: "train", "test"; for TFDS also "train[:1000]"; for a folder a sub-folder, or None.
    data_dir: where the data is; "~" is understood.
    imbalance: factor rho > 1 of an exponential long tail, n_0 rho^(-c / (C - 1)) images of class c
      (arXiv 1901.05555), n_0 the most with which no class runs out; None keeps all images.
    seed: draws the images that an imbalanced source keeps.

  Raises:
    UserError: if there is no such data, split or image, or no labels for `imbalance`.
  """
  if name == "digits":
    source = _digits(split)
  elif name == "folder":
    source = _folder(_existing(data_dir, name), split)
  else:
    source = _tfds(name, _existing(data_dir, name), split)
  return source if imbalance is None else _long_tail(source, imbalance, seed)


def require_labels(source: Source, who: str) -> None:
  """Raises UserError if `source` has no labels, naming it and who asks for them."""
  if not source.num_classes:
    raise errors.UserError(
      f"{who} needs labels and {source.name} has none: name labelled images (a folder is labelled "
      "if all its images lie in two or more sub-folders, one a class)"
    )


def decode(file: str | bytes) -> np.ndarray:
  """A path or encoded bytes -> uint8 [H, W, 3], upright as EXIF says.

  16 bits keep their upper eight; alpha is dropped; grey becomes three equal channels.
  """
  with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
    image.load()
    with contextlib.suppress(Exception):  # junk beside the pixels is no reason to lose them
      image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
      grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
      return np.repeat(grey[..., None], 3, axis=-1)
    if "transparency" in image.info:
      image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _digits(split) -> Source:
  """Every fifth image of a class is a test image."""
  from sklearn import datasets  # slow to import, and only for this source

  if split not in ("train", "test"):
    raise errors.UserError(f"digits has no split {split!r}: there are train, test")
  data = datasets.load_digits()
  labels = data.target.astype(np.int32)
  test = np.sort(np.concatenate([np.flatnonzero(labels == d)[4::5] for d in range(10)]))
  rows = test if split == "test" else np.setdiff1d(np.arange(len(labels)), test)
  small, labels = np.round(data.images[rows] * (255 / 16)).astype(np.uint8), labels[rows]
  large = [Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC) for x in small]
  images = np.stack([x.convert("RGB") for x in large])
  name, classes = f"digits/{split}", [str(d) for d in range(10)]
  read = functools.partial(_read_items, images, labels)
  return Source(name, np.arange(len(rows)), read, labels, (name + "[{}]").format, classes)


def _read_items(images, labels: np.ndarray, rows: list[int]):
  return [(images[row], labels[row]) for row in rows]


def _folder(root: pathlib.Path, split) -> Source:
  """Only "train" may be missing: a test split that is silently the training set would flatter."""
  if split and (root / split).is_dir():
    root = root / split
  else:
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if split and (split != "train" or not _SPLIT_FOLDERS.isdisjoint(names)):
      raise errors.UserError(f"no folder {split!r} in {root}: there are {_some(names)}")
  paths, others = [], []
  for folder, folders, files in os.walk(root, followlinks=True):
    folders[:] = [f for f in folders if not f.startswith(".")]
    for file in files:
      image = not file.startswith(".") and file.lower().endswith(EXTENSIONS)
      (paths if image else others).append(os.path.relpath(os.path.join(folder, file), root))
  if not paths:
    seen = sorted({os.path.splitext(p)[1].lower() or "(none)" for p in others})
    raise errors.UserError(
      f"{root} holds no images ({' '.join(EXTENSIONS)}): files skipped: {_some(sorted(others))}; "
      f"extensions seen: {_some(seen, 10)}"
    )
  paths.sort()
  first = [p.split(os.sep, 1)[0] if os.sep in p else "" for p in paths]
  classes, labels = np.unique(first, return_inverse=True)
  classes = [] if "" in classes or len(classes) < 2 else classes.tolist()
  paths, labels = [os.path.join(root, p) for p in paths], labels.astype(np.int32)
  read = functools.partial(_read_items, paths, labels)
  return Source(f"folder {root}", np.arange(len(paths)), read, labels, paths.__getitem__, classes)


def _tfds(name: str, root: pathlib.Path, split) -> Source:
  """Reads the folder alone, so that no builder looks for newer versions or other hosts."""
  wanted, _, version = name.partition(":")
  folders = [i.parent for i in (root / wanted).glob(f"{version or '*'}/dataset_info.json")]
  if not folders:
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    prepared = sorted({i.parent.parent.relative_to(root).as_posix() for i in infos})
    raise errors.UserError(
      f"no data set {name!r} is prepared in {root}: there are {_some(prepared, 10)} "
      "(for image files, the name is folder)"
    )
  import tensorflow_datasets as tfds  # slow to import, and only for this source

  newest = max(folders, key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)])
  builder = tfds.builder_from_directory(newest)
  features, splits = builder.info.features, builder.info.splits
  image = features["image"] if "image" in features else None
  if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype).kind != "u":
    raise errors.UserError(
      f"{name} in {root} has no feature 'image' of 8 or 16 bits: there are {_some(list(features))}"
    )
  try:
    size = splits[str(split)].num_examples
  except (KeyError, TypeError, ValueError):
    size = 0
  if size < 1:
    raise errors.UserError(
      f"{name} in {root} has no split {split!r} with images in it: there are "
      f"{_some(sorted(splits), 10)}, and slices such as train[:1000] or train[80%:]"
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
  read, name = functools.partial(_read_records, data), f"{name}/{split}"
  return Source(name, np.arange(size), read, None, (name + "[{}]").format, classes)


def _read_records(data, rows: list[int]):
  """Records asked for together are read in parallel: half the time of one after another."""
  from tensorflow_datasets.proto import tf_example_pb2

  examples = map(tf_example_pb2.Example.FromString, data.__getitems__(rows))
  features = [example.features.feature for example in examples]
  return [(f["image"].bytes_list.value[0], (*f["label"].int64_list.value, -1)[0]) for f in features]


def _long_tail(source: Source, factor: float, seed: int) -> Source:
  """Keeps the first n_c images of class c in an order drawn from (seed, c)."""
  require_labels(source, f"imbalance={factor}")
  if not factor >= 1.0 or source.num_classes < 2:
    raise errors.UserError(
      f"imbalance={factor} must be at least 1, largest class over smallest, of two classes or more"
    )
  members = [np.flatnonzero(source.labels == c) for c in range(source.num_classes)]
  share = float(factor) ** (-np.arange(len(members)) / (len(members) - 1))
  # A hair above: 5000 * 100 ** -1 must be 50, not 49.
  counts = np.floor(min(np.array([len(m) for m in members]) / share) * share + 1e-6).astype(int)
  if counts.min() < 1:
    raise errors.UserError(
      f"imbalance={factor} leaves a class of {source.name} without images: lower it"
    )
  rows = []
  for c, (member, count) in enumerate(zip(members, counts, strict=True)):
    # Raw words of a SeedSequence: NumPy promises that they never change.
    draw = np.random.SeedSequence([seed % 2**32, c]).generate_state(len(member), np.uint64)
    rows.append(member[np.argsort(draw, kind="stable")[:count]])
  split = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
  return Source(
    f"{source.name} (imbalance {factor:g})",
    np.sort(np.concatenate(rows)),
    source._read,
    source.labels,
    source._describe,
    source.class_names,
    {name: np.flatnonzero(members).tolist() for name, members in split.items()},
  )


def _existing(data_dir, name: str) -> pathlib.Path:
  if data_dir and (root := pathlib.Path(data_dir).expanduser()).is_dir():
    return root
  raise errors.UserError(
    f"data_dir={data_dir} of data set {name!r} is not a folder: name one with "
    "config.data.data_dir (config.probe.data_dir for the probe's own)"
  )


def _some(names: list[str], most: int = 3) -> str:
  """At most `most` names and how many more."""
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more if names else "none"
