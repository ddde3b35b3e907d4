"""Sources: digits, prepared TFDS data, folders, long tails; checked against Pillow and tfds."""

import errno
import functools
import importlib
import io
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from sklearn import datasets
from tensorflow_datasets.proto import tf_example_pb2

import protojax
from protojax import config as configs
from protojax import errors
from protojax.data import pipeline, sources
from protojax.data.sources import pixels, source
from protojax.training import loop

_REPO = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data_dir():
  folder = os.environ.get("PROTOJAX_DATA_DIR") or _REPO.parent / "shared" / "data"
  if not (pathlib.Path(folder) / "cifar10").is_dir():
    pytest.skip("no prepared CIFAR-10: set PROTOJAX_DATA_DIR")
  return str(folder)


def write(path, color=(10, 20, 30), size=(6, 4), mode="RGB", **options):
  """One image of a single colour; `size` is (width, height)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, color).save(path, **options)


@pytest.fixture
def animals(tmp_path):
  names = ("cat/b.png", "cat/deep/a.PNG", "dog/z.bmp", "ant/q.webp", "dog/a.jpeg")
  for i, path in enumerate(names):
    write(tmp_path / path, (40 * i, 0, 0))
  (tmp_path / "dog" / "notes.txt").write_text("no image")
  write(tmp_path / "cat" / "._b.png")
  write(tmp_path / ".cache" / "x.png")
  return tmp_path


def prepare(folder, version="1.0.0", key="image", classes=None):
  """Writes the TFDS data set "tiny_gray": seven grey images, 3 + i by 5, of level 30 i."""
  folder = folder / "tiny_gray" / version
  folder.mkdir(parents=True)
  label = tfds.features.ClassLabel(names=classes) if classes else np.int64
  image = tfds.features.Image(shape=(None, None, 1))
  tfds.features.FeaturesDict({key: image, "label": label}).save_config(folder)
  split = {
    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    "name": "train",
    "numBytes": "0",
    "shardLengths": ["7"],
  }
  info = {
    "fileFormat": "array_record",
    "name": "tiny_gray",
    "splits": [split],
    "version": version,
    "moduleName": "none",
  }
  (folder / "dataset_info.json").write_text(json.dumps(info))
  writer = array_record_module.ArrayRecordWriter(
    str(folder / "tiny_gray-train.array_record-00000-of-00001"), "group_size:1"
  )
  for i in range(7):
    file = io.BytesIO()
    Image.new("L", (3 + i, 5), 30 * i).save(file, "png")
    example = tf_example_pb2.Example()
    example.features.feature[key].bytes_list.value.append(file.getvalue())
    example.features.feature["label"].int64_list.value.append(int(i > 3))
    writer.write(example.SerializeToString())
  writer.close()


def test_digits_are_enlarged_by_bicubic_from_sixteen_levels():
  train = sources.build("digits", split="train")
  first = np.round(datasets.load_digits().images[0] * 255 / 16).astype(np.uint8)
  want = np.asarray(Image.fromarray(first).resize((32, 32), Image.Resampling.BICUBIC))
  image = train[0]["image"]
  assert image.shape == (32, 32, 3) and image.dtype == np.uint8
  for channel in range(3):
    np.testing.assert_array_equal(image[..., channel], want)
  assert train.num_classes == 10 and train.class_names[3] == "3"
  assert train.describe(17) == "digits/train[17]"


def test_digits_split_is_disjoint_complete_and_stratified():
  train, test = (sources.build("digits", split=s) for s in ("train", "test"))
  total = np.bincount(datasets.load_digits().target)
  counts = [np.bincount(s.labels) for s in (train, test)]
  np.testing.assert_array_equal(counts[0] + counts[1], total)
  np.testing.assert_array_less(np.abs(counts[1] / total - 0.2), 0.006)
  pixels = [{s[i]["image"].tobytes() for i in range(len(s))} for s in (train, test)]
  assert len(pixels[0]) == len(train) == 1442 and not pixels[0] & pixels[1]
  assert train.labels.dtype == np.int32
  assert [train[i]["label"] for i in range(50)] == train.labels[:50].tolist()


def test_cifar10_is_complete_and_balanced(data_dir):
  for split, number in (("train", 50_000), ("test", 10_000)):
    data = sources.build("cifar10", split=split, data_dir=data_dir)
    assert len(data) == len(data.labels) == number
    assert data.labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(data.labels), number // 10)
  assert data.class_names[:2] == ("airplane", "automobile") and data.num_classes == 10


def test_tfds_records_are_those_that_tfds_itself_decodes(data_dir):
  data = sources.build("cifar10", split="train[100:1000]", data_dir=data_dir)
  reference = tfds.builder("cifar10", data_dir=data_dir).as_data_source("train[100:1000]")
  assert len(data) == 900
  for i in (0, 17, 899):
    np.testing.assert_array_equal(data[i]["image"], reference[i]["image"])
    assert data[i]["label"] == data.labels[i] == reference[i]["label"]
  assert data.describe(17) == "cifar10/train[100:1000][17]"
  with pytest.raises(IndexError):
    data[900]


def test_sources_survive_pickling(data_dir, animals):
  for data in (
    sources.build("cifar10", split="test", data_dir=data_dir),
    sources.build("cifar10", split="test", data_dir=data_dir, imbalance=10),
    sources.build("folder", split=None, data_dir=animals),
    sources.build("digits", split="test"),
  ):
    before = data[3]
    copy = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(copy[3]["image"], before["image"])
    assert copy[3]["label"] == before["label"] and len(copy) == len(data)
    assert copy.describe(3) == data.describe(3)


def test_reading_a_tfds_source_leaves_tensorflow_out(data_dir):
  code = (
    "import sys; from protojax.data import sources; "
    f"s = sources.build('cifar10', split='train', data_dir={data_dir!r}); s[5]; s.labels; "
    "assert 'tensorflow_datasets' in sys.modules; assert 'tensorflow' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=_REPO)


def test_tfds_gray_images_of_any_shape_get_three_channels(tmp_path):
  prepare(tmp_path, classes=["low", "high"])
  data = sources.build("tiny_gray", split="train", data_dir=tmp_path)
  for i in range(7):
    record = data[i]
    assert record["image"].shape == (5, 3 + i, 3) and record["image"].dtype == np.uint8
    assert np.all(record["image"] == 30 * i) and record["label"] == int(i > 3)
  assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
  assert data.class_names == ("low", "high")


def test_tfds_data_without_class_labels_is_unlabelled(tmp_path):
  prepare(tmp_path)
  data = sources.build("tiny_gray", split="train", data_dir=tmp_path)
  assert data.num_classes == 0 and data.labels is None and data.class_names == ()
  assert {data[i]["label"] for i in range(7)} == {-1}


def test_a_version_can_be_named_and_else_the_newest_is_taken(tmp_path):
  for version in ("9.0.0", "10.0.0"):
    prepare(tmp_path, version, classes=["low", "high"] if version == "10.0.0" else None)
  assert sources.build("tiny_gray", split="train", data_dir=tmp_path).num_classes == 2
  assert sources.build("tiny_gray:9.0.0", split="train", data_dir=tmp_path).num_classes == 0


def test_folder_is_sorted_and_labelled_by_its_first_level(animals):
  data = sources.build("folder", split="train", data_dir=str(animals))
  names = [os.path.relpath(data.describe(i), animals) for i in range(len(data))]
  assert names == ["ant/q.webp", "cat/b.png", "cat/deep/a.PNG", "dog/a.jpeg", "dog/z.bmp"]
  assert data.class_names == ("ant", "cat", "dog")
  assert data.labels.tolist() == [0, 1, 1, 2, 2] and data.labels.dtype == np.int32
  assert [data[i]["label"] for i in range(5)] == [0, 1, 1, 2, 2]
  assert data[4]["image"].shape == (4, 6, 3) and data[4]["image"].dtype == np.uint8
  assert np.all(data[4]["image"] == (80, 0, 0))


def test_folder_takes_the_sub_folder_of_the_split(tmp_path):
  for i, path in enumerate(["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"]):
    write(tmp_path / path, (i, i, i))
  test = sources.build("folder", split="test", data_dir=tmp_path)
  assert [int(test[i]["image"][0, 0, 0]) for i in range(len(test))] == [2, 3]
  assert test.class_names == ("a", "b")


@pytest.mark.parametrize("paths", [("a.png",), ("x/a.png", "y/b.png", "c.png"), ("x/a.png",)])
def test_folder_without_class_folders_is_unlabelled(tmp_path, paths):
  for path in paths:
    write(tmp_path / path)
  data = sources.build("folder", split=None, data_dir=tmp_path)
  assert len(data) == len(paths) and data.labels is None and data.num_classes == 0
  assert data[0]["label"] == -1


def test_every_pixel_format_becomes_three_channels_of_eight_bits():
  def encoded(image, form="png", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()

  deep = Image.fromarray(np.full((2, 3), 51_400, np.uint16))  # 200 * 257
  palette = Image.new("P", (3, 2), 1)
  palette.putpalette([0, 0, 0, 250, 100, 50])
  cases = {
    (200, 200, 200): [
      encoded(deep),
      encoded(Image.new("L", (3, 2), 200)),
      encoded(Image.new("LA", (3, 2), (200, 128))),
    ],
    (250, 100, 50): [
      encoded(palette),
      encoded(palette, transparency=bytes([255, 128])),
      encoded(Image.new("RGBA", (3, 2), (250, 100, 50, 128))),
      encoded(Image.new("RGB", (3, 2), (250, 100, 50)), "bmp"),
      encoded(Image.new("RGB", (3, 2), (250, 100, 50)), "webp", lossless=True),
    ],
    (255, 255, 255): [
      encoded(Image.new("1", (3, 2), 1)),
      encoded(Image.new("CMYK", (3, 2)), "jpeg", quality=100),
    ],
  }
  for color, files in cases.items():
    for data in files:
      image = sources.decode(data)
      assert image.shape == (2, 3, 3) and image.dtype == np.uint8
      np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(color), (2, 3, 3)))


def test_exif_orientation_is_respected(tmp_path):
  pixels = np.zeros((4, 6, 3), np.uint8)
  pixels[:, :3] = 255  # left half white
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees clockwise
  Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
  image = sources.build("folder", split=None, data_dir=tmp_path)[0]["image"]
  np.testing.assert_array_equal(image, np.rot90(pixels, -1))


def test_a_corrupt_image_raises_its_own_exception_with_its_name(animals):
  good = (animals / "cat" / "b.png").read_bytes()
  (animals / "cat" / "b.png").write_bytes(good[: len(good) // 2])
  (animals / "dog" / "z.bmp").write_text("not\nan image")
  data = sources.build("folder", split=None, data_dir=animals)
  (animals / "ant" / "q.webp").unlink()
  for row, name in ((0, "q.webp"), (1, "b.png"), (4, "z.bmp")):
    with pytest.raises(sources.CorruptImage, match=name) as caught:
      data[row]
    assert "\n" not in str(caught.value) and not isinstance(caught.value, errors.UserError)
  records = list(data.read([1, 2, 0, 3]))
  assert [isinstance(r, sources.CorruptImage) for r in records] == [True, False, True, False]


def test_an_unreadable_tfds_record_does_not_take_its_neighbours_along(data_dir):
  data = sources.build("cifar10", split="test[:10]", data_dir=data_dir)
  read = data._read

  def failing(rows):
    if 3 in rows:
      raise RuntimeError("bad\nblock")
    return read(rows)

  want = data[4]["image"]
  data._read = failing
  records = list(data.read([2, 3, 4]))
  assert isinstance(records[1], sources.CorruptImage)
  assert "test[:10][3]" in str(records[1]) and "\n" not in str(records[1])
  np.testing.assert_array_equal(records[2]["image"], want)


def test_imbalance_follows_the_exponential_formula(data_dir):
  data = sources.build("cifar10", split="train", data_dir=data_dir, imbalance=200, seed=1)
  counts = [int(5000 * 200 ** (-c / 9) + 1e-6) for c in range(10)]
  assert np.bincount(data.labels).tolist() == counts and counts[0] == 200 * counts[9] == 5000
  assert data.tail_split == {"many": list(range(7)), "medium": [7, 8, 9], "few": []}
  assert [c for c in range(10) if 20 <= counts[c] <= 100] == data.tail_split["medium"]
  assert data[len(data) - 1]["label"] == data.labels[-1]


def test_imbalance_of_unequal_classes_keeps_the_factor_and_names_the_tail():
  data = sources.build("digits", split="train", imbalance=20)
  counts = np.bincount(data.labels)
  want = counts[0] * 20.0 ** (-np.arange(10) / 9)
  np.testing.assert_array_less(np.abs(counts - want), 1.0 + 1e-6)
  assert data.tail_split == {
    "many": np.flatnonzero(counts > 100).tolist(),
    "medium": [c for c in range(10) if 20 <= counts[c] <= 100],
    "few": np.flatnonzero(counts < 20).tolist(),
  }
  assert data.tail_split["few"] and data.tail_split["many"]


def test_imbalance_draws_a_subset_that_the_seed_decides():
  def names(seed, **options):
    data = sources.build("digits", split="train", seed=seed, **options)
    return [data.describe(i) for i in range(len(data))]

  first, again, other = (names(seed, imbalance=5) for seed in (0, 0, 1))
  assert first == again and set(first) != set(other) and len(first) == len(other)
  assert len(set(first)) == len(first) < len(names(0))
  rows = [int(name[13:-1]) for name in first]
  labels = sources.build("digits", split="train").labels
  kept = sources.build("digits", split="train", imbalance=5)
  np.testing.assert_array_equal(kept.labels, labels[rows])


def test_require_labels_names_the_source_and_who_asks(tmp_path):
  write(tmp_path / "a.png")
  data = sources.build("folder", split=None, data_dir=tmp_path)
  with pytest.raises(errors.UserError) as caught:
    sources.require_labels(data, "probe.train_split")
  assert "probe.train_split" in str(caught.value) and str(tmp_path) in str(caught.value)
  sources.require_labels(sources.build("digits", split="test"), "probe.test_split")


def refuse(*words, **arguments):
  with pytest.raises(errors.UserError) as caught:
    sources.build(**arguments)
  message = str(caught.value)
  assert "\n" not in message
  for word in words:
    assert word in message, message


def test_wrong_digits_are_refused_in_one_line():
  refuse("'val'", "train, test", name="digits", split="val")
  refuse("0.5", "at least 1", name="digits", split="train", imbalance=0.5)
  refuse("imbalance=9999", "lower", name="digits", split="train", imbalance=9999)


_OWN = """
import functools
import numpy as np
from protojax import data

def build(split, data_dir):
  labels = np.arange(6) % 2
  read = functools.partial(_read, len(str(data_dir)))
  return data.Source(f"own/{split}", np.arange(6), read, labels, class_names=("even", "odd"))

def _read(level, records):
  return [(np.full((4, 5, 3), level + i, np.uint8), i % 2) for i in records]
"""


@pytest.fixture
def own_package(tmp_path, monkeypatch):
  """A package of the user's that is on the path, with a module `images`."""
  package = tmp_path / "own_package"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "images.py").write_text(_OWN)
  monkeypatch.syspath_prepend(tmp_path)
  yield package
  for name in [name for name in sys.modules if name.split(".")[0] == "own_package"]:
    del sys.modules[name]


def test_a_module_of_the_users_is_a_source_without_a_fork(own_package):
  source = sources.build("own_package.images", split="dev", data_dir="/here", imbalance=2)
  assert source.name == "own/dev (imbalance 2)" and source.class_names == ("even", "odd")
  assert source.labels.tolist() == [0, 0, 0, 1] and source.labels.dtype == np.int32
  copy = pickle.loads(pickle.dumps(source))
  for i in range(4):
    assert copy[i]["label"] == source.labels[i] and copy.describe(i) == source.describe(i)
    number = int(source.describe(i)[len("own/dev[") : -1])
    np.testing.assert_array_equal(copy[i]["image"], np.full((4, 5, 3), 5 + number, np.uint8))
  (batch,) = pipeline.sequential(source, batch_size=4, image_size=8)
  assert batch["image"].shape == (4, 8, 8, 3) and batch["label"].tolist() == [0, 0, 0, 1]


def test_deep_files_of_a_module_take_the_range_that_is_given_or_measured(own_package, tmp_path):
  Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "a.png")
  (own_package / "deep.py").write_text(
    "import numpy as np\nfrom protojax.data import Source\n"
    "def read(records):\n"
    f"  return [({str(tmp_path / 'a.png')!r}, 0) for _ in records]\n"
    "def build(split, data_dir):\n  return Source('deep', np.arange(3), read)\n"
  )
  given = sources.build("own_package.deep", split="train", value_range=(0, 8000))
  assert given[0]["image"].max() == 128 and given.value_range == (0, 8000)
  assert sources.build("own_package.deep", split="train").value_range == (0.0, 4095.0)


def test_the_source_in_the_architecture_is_one(own_package):
  (text,) = re.findall(r"```python\n(.*?)```", (_REPO / "docs/architecture.md").read_text(), re.S)
  (own_package / "cells.py").write_text(text)
  images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
  np.savez(own_package / "train.npz", images=images, labels=np.arange(6) % 2)
  arguments = {"name": "own_package.cells", "data_dir": str(own_package)}
  source = sources.build(split="train", **arguments)
  assert len(source) == 6 and source.labels.tolist() == [0, 1] * 3 and source.num_classes == 2
  for i, record in enumerate(pickle.loads(pickle.dumps(source)).read(range(6))):
    np.testing.assert_array_equal(record["image"], images[i])
    assert record["image"].dtype == np.uint8 and record["label"] == i % 2
  refuse("no file", "test.npz", "config.data.data_dir", split="test", **arguments)


def test_a_module_that_is_no_source_is_refused_in_one_line(own_package):
  name = "own_package.wrong"
  refuse(f"data.name='{name}'", "no module", "PYTHONPATH", name=name, split="dev")
  refuse("no module 'nobody'", name="nobody.images", split="dev")
  for text, words in (
    ("", "no build(split, data_dir) -> Source"),
    ("def build(split, data_dir): return [1]", "returned list"),
    ("import not_there", "No module named 'not_there'; python -c 'import own_package.wrong' shows"),
    ("1 / 0", "ZeroDivisionError"),
  ):
    (own_package / "wrong.py").write_text(text)
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    refuse(words, name=name, split="dev")


_READ = """
import functools
import numpy as np
from protojax import data

def build(split, data_dir):
  read = functools.partial(data.sources.read_items, {images}, {labels})
  return data.Source("mine", np.arange({count}), read, class_names=("a", "b"))
"""


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (
      "def build(split, data_dir):\n  return helper(\n    data_dir)\n\n"
      "def helper(path):\n  return open(path + '/gone')\n",
      r"its build\('train', '/nowhere'\) failed with FileNotFoundError: .*wrong.py:6\)$",
    ),
    (
      "import json\ndef build(split, data_dir):\n  json.loads('{')",
      r"JSONDecodeError.*wrong.py:3\)$",
    ),
    ("def build(split): pass", r"failed with TypeError: .*wrong.py\)$"),
    ("def build(split, data_dir):\n  raise ValueError('two\\nlines')", "ValueError: two lines"),
    (
      _READ.format(images="np.zeros((9, 4, 4, 3))", labels="np.zeros(9)", count=9),
      r"no image of mine can be read: mine\[0\] .*uint8 \[H, W, 3\], not float64 \[4, 4, 3\]",
    ),
    (
      _READ.format(images="np.zeros((9, 4, 4), np.uint8)", labels="np.zeros(9)", count=9),
      r"uint8 \[H, W, 3\], not uint8 \[4, 4\]",
    ),
    (
      _READ.format(images="np.zeros((9, 4, 4, 3), np.uint8)", labels="'abcdefghi'", count=9),
      r"mine\[0\] .ValueError: .*'a'",
    ),
    (_READ.format(images="()", labels="()", count=0), "no image of mine is there"),
  ],
  ids=["own_line", "library", "signature", "two_lines", "dtype", "shape", "label", "empty"],
)
def test_a_mistake_in_a_source_of_ones_own_is_one_line_before_anything_is_made(
  own_package, tmp_path, text, words
):
  (own_package / "wrong.py").write_text(text)
  importlib.invalidate_caches()
  config = configs.default()
  config.num_steps = 1
  config.data.update({"name": "own_package.wrong", "data_dir": "/nowhere"})
  with pytest.raises(errors.UserError, match=words) as caught:
    loop.run(config, str(tmp_path / "run"))
  assert "\n" not in str(caught.value) and "data.name='own_package.wrong'" in str(caught.value)
  assert not (tmp_path / "run").exists()


def test_one_damaged_image_is_no_mistake_in_a_source_of_ones_own(own_package):
  images = "[b'damaged', *np.zeros((8, 4, 4, 3), np.uint8)]"
  text = _READ.format(images=images, labels="np.arange(9) % 2", count=9)
  (own_package / "nearly.py").write_text(text)
  importlib.invalidate_caches()
  source = sources.build("own_package.nearly", split="train")
  assert isinstance(next(source.read([0])), sources.CorruptImage) and source[1]["label"] == 1


def test_a_label_that_is_no_number_takes_no_neighbour_along():
  read = functools.partial(sources.source.read_items, np.zeros((3, 4, 4, 3), np.uint8), [0, "x", 1])
  source = sources.Source("own", np.arange(3), read, class_names=("a", "b"))
  records = list(source.read(range(3)))
  assert [isinstance(record, sources.CorruptImage) for record in records] == [False, True, False]


def test_a_disk_that_is_away_is_waited_for_and_no_damaged_image(tmp_path, monkeypatch):
  write(tmp_path / "a.png")
  data, asked = sources.build("folder", split=None, data_dir=tmp_path), []
  read = pixels.read

  def away(file, channels, *, times):
    asked.append(file)
    if len(asked) <= times:
      raise OSError(errno.ESTALE, "Stale file handle")
    return read(file, channels)

  monkeypatch.setattr(source, "_PAUSES", (0.0, 0.0, None))
  monkeypatch.setattr(pixels, "read", functools.partial(away, times=2))
  np.testing.assert_array_equal(data[0]["image"][0, 0], (10, 20, 30))
  assert len(asked) == 3
  asked.clear()
  monkeypatch.setattr(pixels, "read", functools.partial(away, times=9))
  with pytest.raises(errors.UserError, match="any more .*Stale file handle.*, tried 3 times"):
    next(data.read([0]))


@pytest.mark.survives(
  "an image of 16 bits among thousands of 8",
  "the first looks see images of 8 bits alone",
  "left out and named, with the setting to give: taken as it is it would be almost black",
)
def test_a_deep_image_among_others_is_left_out_and_says_what_to_set(tmp_path):
  for i in range(130):
    write(tmp_path / f"{i:03}.png")
  Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "001.png")
  data = sources.build("folder", split=None, data_dir=tmp_path)
  assert data.value_range is None  # every second image was looked at
  with pytest.raises(sources.CorruptImage, match=r"001.png .*value_range=\(LOW, HIGH\) says what"):
    data[1]
  given = sources.build("folder", split=None, data_dir=tmp_path, value_range=(0, 4000))
  assert given[1]["image"].min() == 255


def test_an_array_that_is_no_image_is_corrupt_and_says_why():
  read = functools.partial(sources.source.read_items, np.zeros((2, 4, 4, 3)), np.zeros(2))
  source = sources.Source("own", np.arange(2), read)
  with pytest.raises(sources.CorruptImage, match=r"own\[1\] .*uint8 \[H, W, 3\], not float64"):
    source[1]


def test_build_is_public_in_the_room():
  assert protojax.data.build is sources.build and protojax.data.Source is sources.Source


def test_wrong_tfds_data_is_refused_in_one_line(data_dir, tmp_path):
  refuse("cifar10", "config.data.data_dir", name="cifar10", split="train")
  refuse("/nowhere", "not a folder", name="cifar10", split="train", data_dir="/nowhere")
  refuse("'cifar'", "there are cifar10", name="cifar", split="train", data_dir=data_dir)
  refuse("cifar10:1.0.0", name="cifar10:1.0.0", split="train", data_dir=data_dir)
  for split in ("val", None, "train[", "train[:0]", "train[:70000]"):
    refuse(repr(split), "test, train", name="cifar10", split=split, data_dir=data_dir)
  refuse("none", name="cifar10", split="train", data_dir=tmp_path)
  prepare(tmp_path, key="picture")
  refuse("'image'", "picture", name="tiny_gray", split="train", data_dir=tmp_path)


def test_tfds_data_in_another_format_is_refused_in_one_line(tmp_path):
  prepare(tmp_path)
  path = tmp_path / "tiny_gray" / "1.0.0" / "dataset_info.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
  refuse("array_record", name="tiny_gray", split="train", data_dir=tmp_path)


def test_wrong_folders_are_refused_in_one_line(tmp_path):
  refuse("/nowhere", name="folder", split="train", data_dir="/nowhere")
  refuse("no images", "none", name="folder", split="train", data_dir=tmp_path)
  for name in ("a.txt", "b.svg", "c.heic", "d.txt"):
    (tmp_path / name).write_text("")
  refuse(
    "a.txt, b.svg, c.heic and 1 more",
    ".heic, .svg, .txt",
    ".webp",
    name="folder",
    split=None,
    data_dir=tmp_path,
  )
  write(tmp_path / "pictures" / "a.png")
  refuse("'test'", "pictures", name="folder", split="test", data_dir=tmp_path)
  refuse("imbalance", "labels", name="folder", split=None, data_dir=tmp_path, imbalance=10)
  write(tmp_path / "val" / "a.png")
  refuse("'train'", "val", name="folder", split="train", data_dir=tmp_path)
