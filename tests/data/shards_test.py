"""A thousand odd images as files, parquet and tar: equal to Pillow's pixels, whoever reads them."""

import io
import itertools
import json
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from pyarrow import parquet

from protojax import config as configs
from protojax import errors, prepare
from protojax.data import pipeline, sources
from protojax.data.sources import tar
from protojax.training import datasets

_COUNT = 1000
_NAMES = ["bee", "ant", "cat"]  # not in the order of the alphabet


def _file(i, rng):
  """(extension, bytes, uint8 [H, W, 3] as Pillow reads them) of image i: every mode in turn."""
  mode = ("RGB", "L", "P", "CMYK", "RGBA", "1", "LA", "EXIF")[i % 8]
  height, width = rng.integers(6, 20, 2)
  image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
  exif = Image.Exif()
  if mode == "EXIF":
    exif[0x0112] = 1 + i // 8 % 8
  elif mode != "RGB":
    image = image.convert(mode)
  form = "jpeg" if mode == "CMYK" or i % 16 in (0, 1, 7) else "png"
  file = io.BytesIO()
  image.save(file, form, exif=exif)
  want = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
  return form.replace("e", ""), file.getvalue(), want


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return [_file(i, rng) for i in range(_COUNT)]


def _table(images, start, stop):
  rows = [{"bytes": images[i][1], "path": f"{i}.{images[i][0]}"} for i in range(start, stop)]
  table = pa.table({"image": rows, "label": [i % 3 for i in range(start, stop)]})
  kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": _NAMES}}
  said = json.dumps({"info": {"features": kinds}})
  return table.replace_schema_metadata({"huggingface": said})


def _add(archive, name, content):
  info = tarfile.TarInfo(name)
  info.size = len(content)
  archive.addfile(info, io.BytesIO(content))


def _tar(path, samples):
  """Writes members [(name, bytes)]."""
  with tarfile.open(path, "w") as archive:
    for name, content in samples:
      _add(archive, name, content)


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
  """A folder that holds the images as train and ten of them as test, in both kinds of shards."""
  root = tmp_path_factory.mktemp("shards")
  for k, (start, stop) in enumerate([(0, 300), (300, _COUNT)]):
    name = f"train-{k:05d}-of-00002"
    parquet.write_table(_table(images, start, stop), root / f"{name}.parquet", row_group_size=64)
    members = []
    for i in range(start, stop):
      label = ("cls", str(i % 3)) if i % 2 else ("json", json.dumps({"label": i % 3, "x": [1]}))
      members += [(f"{i % 2}/{i:04d}.{images[i][0]}", images[i][1])]
      members += [(f"{i % 2}/{i:04d}.{label[0]}", label[1].encode())]
    _tar(root / f"own-train-{k:03d}.tar", [("readme.txt", b"x"), ("._0.jpg", b"x"), *members])
  parquet.write_table(_table(images, 0, 10), root / "test-00000-of-00001.parquet")
  _tar(root / "own-test-000.tar", [(f"{i}.{images[i][0]}", images[i][1]) for i in range(10)])
  return root


@pytest.fixture(params=["parquet", "tar"])
def kind(request):
  return request.param


def take(stream, number):
  try:
    return list(itertools.islice(stream, number))
  finally:
    stream.close()


def assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key])


def test_a_thousand_odd_images_are_those_that_pillow_reads(kind, shards, images):
  data = sources.build(kind, split="train", data_dir=shards)
  assert len(data) == _COUNT
  assert data.class_names == (tuple(_NAMES) if kind == "parquet" else ("0", "1", "2"))
  np.testing.assert_array_equal(data.labels, np.arange(_COUNT) % 3)
  records = pickle.loads(pickle.dumps(data)).read(range(_COUNT))
  for i, record in enumerate(records):
    np.testing.assert_array_equal(record["image"], images[i][2], str(i))
    assert record["label"] == i % 3
  for i in (999, 0, 301, 64, 63):
    np.testing.assert_array_equal(data[i]["image"], images[i][2])
  test = sources.build(kind, split="test", data_dir=shards)
  assert len(test) == 10 and len(sources.build(kind, split=None, data_dir=shards)) == _COUNT + 10


def test_records_are_named_by_shard_and_place(shards):
  data = sources.build("parquet", split="train", data_dir=shards)
  assert data.describe(299).endswith("train-00000-of-00002.parquet, row 299")
  assert data.describe(305).endswith("train-00001-of-00002.parquet, row 5")
  data = sources.build("tar", split="train", data_dir=shards)
  assert data.describe(301).endswith("own-train-001.tar: 1/0301.png")


def test_batches_of_shards_are_equal_for_any_workers_and_hosts_and_resume_exactly(kind, shards):
  data = sources.build(kind, split="train", data_dir=shards)
  options = {"seed": 1, "batch_size": 160, "image_size": 16}
  whole = take(pipeline.batches(data, step=0, **options), 8)
  workers = 1 if kind == "parquet" else 0  # one start of a process is enough
  assert_same(take(pipeline.batches(data, step=6, num_workers=workers, **options), 2), whole[6:])
  parts = [
    take(pipeline.batches(data, step=6, process_index=h, process_count=2, **options), 2)
    for h in range(2)
  ]
  joined = [{key: np.concatenate([p[n][key] for p in parts]) for key in whole[0]} for n in range(2)]
  assert_same(joined, whole[6:])


def test_prepared_shards_give_the_same_batches_but_for_the_loss_of_jpeg(kind, shards, tmp_path):
  prepare.main([kind, str(shards), str(tmp_path), "--size=16", "--name=odd", "--splits=train"])
  before = sources.build(kind, split="train", data_dir=shards)
  after = sources.build("odd", split="train", data_dir=tmp_path)
  assert after.class_names == before.class_names and len(after) == _COUNT
  options = {"seed": 1, "step": 3, "batch_size": 320, "image_size": 16}
  wants, gots = (take(pipeline.batches(data, **options), 2) for data in (before, after))
  for want, got in zip(wants, gots, strict=True):
    for key in ("index", "label", "size", "skipped"):
      np.testing.assert_array_equal(got[key], want[key])
    assert np.abs(got["image"].astype(int) - want["image"]).mean() < 4  # of noise; 0 to 255


def test_what_is_no_image_is_corrupt_and_its_neighbours_are_read(kind, tmp_path, images):
  broken = [images[0][1], b"no image", images[2][1][:40], images[3][1]]
  if kind == "parquet":
    parquet.write_table(pa.table({"img": [*broken, None]}), tmp_path / "train.parquet")
  else:
    members = [(f"{i}.png", content) for i, content in enumerate([*broken, b""])]
    _tar(tmp_path / "train.tar", members)
  data = sources.build(kind, split="train", data_dir=tmp_path)
  assert data.labels is None and data.num_classes == 0
  records = list(data.read(range(5)))
  assert [isinstance(r, sources.CorruptImage) for r in records] == [False, True, True, False, True]
  assert "train" in str(records[1]) and "\n" not in str(records[1])
  np.testing.assert_array_equal(records[3]["image"], images[3][2])
  (batch,) = take(pipeline.sequential(data, batch_size=5, image_size=8), 1)
  assert batch["skipped"].tolist() == [-1, 1, 2, -1, 4]


def test_deep_images_of_n_channels_are_those_of_a_folder(kind, tmp_path):
  rng, root = np.random.default_rng(0), tmp_path / "folder"
  root.mkdir()
  for i in range(3):
    np.save(root / f"{i}.npy", rng.integers(0, [900, 4000], (6, 7, 2)).astype(np.uint16))
  files = [(path.name, path.read_bytes()) for path in sorted(root.iterdir())]
  if kind == "tar":
    _tar(tmp_path / "train-0.tar", files)
  else:
    parquet.write_table(pa.table({"image": [f for _, f in files]}), tmp_path / "train-0.parquet")
  want = sources.build("folder", split=None, data_dir=root, channels=2)
  got = sources.build(kind, split="train", data_dir=tmp_path, channels=2)
  assert got.value_range == want.value_range == ((0.0, 0.0), (1023.0, 4095.0))
  for i in range(3):
    np.testing.assert_array_equal(got[i]["image"], want[i]["image"])


def test_an_array_beside_the_pictures_of_a_tar_is_no_image(tmp_path, images):
  files = [("0.npy", b"what a network made of it"), (f"0.{images[0][0]}", images[0][1])]
  _tar(tmp_path / "train-0.tar", [*files, ("1.npy", b"x")])
  data = sources.build("tar", split="train", data_dir=tmp_path)
  assert len(data) == 1
  np.testing.assert_array_equal(data[0]["image"], images[0][2])


def test_labels_without_names_are_classes_in_their_order_over_all_splits(tmp_path, images):
  def write(name, labels):
    column = {"jpg": [images[i][1] for i in range(len(labels))], "cls": labels}
    parquet.write_table(pa.table(column), tmp_path / name)

  write("train-0.parquet", ["dog", "ant", None])
  write("test-0.parquet", ["bee", "dog"])
  train, test = (sources.build("parquet", split=s, data_dir=tmp_path) for s in ("train", "test"))
  assert train.class_names == test.class_names == ("ant", "bee", "dog")
  assert train.labels.tolist() == [2, 0, -1] and test.labels.tolist() == [1, 2]
  write("train-0.parquet", [30, 4, 100])
  write("test-0.parquet", [4, -1])
  train, test = (sources.build("parquet", split=s, data_dir=tmp_path) for s in ("train", "test"))
  assert train.class_names == test.class_names == ("4", "30", "100")
  assert train.labels.tolist() == [1, 0, 2] and test.labels.tolist() == [0, -1]


@pytest.mark.parametrize("own_folder", [True, False])
def test_a_tar_is_indexed_once_and_again_when_it_has_changed(
  tmp_path, images, monkeypatch, own_folder
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  folder = tmp_path / "shards"
  folder.mkdir()
  write = tar.files.write

  def refused(path, content):  # permissions do not bind who is root
    if path.parent == folder and not own_folder:
      raise errors.UserError("cannot write")
    write(path, content)

  monkeypatch.setattr(tar.files, "write", refused)
  _tar(folder / "a.tar", [("0.png", images[2][1])])
  calls = []
  scan = tar._samples
  monkeypatch.setattr(tar, "_samples", lambda path: calls.append(path) or scan(path))
  for _ in range(2):
    assert len(sources.build("tar", split="train", data_dir=folder)) == 1
  assert len(calls) == 1
  assert (folder / ".a.tar.index.json").exists() == own_folder
  assert bool(list(tmp_path.glob("cache/protojax/tar/*.json"))) != own_folder
  _tar(folder / "a.tar", [("0.png", images[2][1]), ("1.png", images[4][1])])
  os.utime(folder / "a.tar", (1, 1))
  data = sources.build("tar", split="train", data_dir=folder)
  assert len(data) == 2 and len(calls) == 2
  np.testing.assert_array_equal(data[1]["image"], images[4][2])


@pytest.mark.survives(
  "a tar that was cut",
  "in the middle",
  "a warning; the images before it",
)
def test_a_tar_that_ends_too_soon_keeps_what_is_whole(tmp_path, images):
  _tar(tmp_path / "a.tar", [(f"{i}.png", images[i][1]) for i in (2, 4, 10)])
  content = (tmp_path / "a.tar").read_bytes()
  (tmp_path / "a.tar").write_bytes(content[:2000])  # inside of the second or third
  data = sources.build("tar", split=None, data_dir=tmp_path)
  np.testing.assert_array_equal(data[0]["image"], images[2][2])
  assert isinstance(list(data.read(range(len(data))))[-1], (dict, sources.CorruptImage))


def test_wrong_shards_are_refused_in_one_line(kind, tmp_path, shards, images):
  def refuse(*words, split, folder=tmp_path):
    with pytest.raises(errors.UserError) as caught:
      sources.build(kind, split=split, data_dir=folder)
    assert "\n" not in str(caught.value)
    for word in words:
      assert word in str(caught.value), str(caught.value)

  refuse("/nowhere", "not a folder", split="train", folder="/nowhere")
  refuse(str(tmp_path), f"no .{kind} files", split="train")
  refuse("'val'", "test, train", split="val", folder=shards)
  pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
  (tmp_path / f"a.{kind}").write_text(pointer)
  refuse(f"a.{kind} is a pointer of Git LFS", "git lfs pull", split="train")
  if kind == "parquet":
    (tmp_path / "a.parquet").write_text("not one")
    refuse("a.parquet", "no parquet file", split="train")
    parquet.write_table(pa.table({"x": [1], "label": [0]}), tmp_path / "a.parquet")
    refuse("a.parquet", "no column", "x, label", split="train")
    parquet.write_table(pa.table({"left": [b"1"], "right": [b"2"]}), tmp_path / "a.parquet")
    refuse("several columns", "left, right", split="train")
    parquet.write_table(_table(images, 0, 1)[:0], tmp_path / "a.parquet")
    refuse("no rows", split="train")
  else:
    _tar(tmp_path / "a.tar", [("x.txt", b"1")])
    refuse("a.tar", "no image", ".png", split="train")


def test_shards_without_test_images_train_without_a_probe(kind, tmp_path, shards):
  config = configs.default()
  config.data.update({"name": kind, "data_dir": str(shards)})
  if kind == "parquet":
    train, bank, test = datasets.of_run(config)
    assert train is bank and len(test) == 10 and test.class_names == tuple(_NAMES)
  for path in shards.glob(f"*train*.{kind}"):
    (tmp_path / path.name).symlink_to(path)
  config.data.data_dir = str(tmp_path)
  train, bank, test = datasets.of_run(config)
  assert train is bank and len(train) == _COUNT and test is None


def test_folders_of_shards_may_be_links(kind, tmp_path, shards):
  away = tmp_path / "away"
  away.mkdir()
  for path in shards.glob(f"*.{kind}"):
    (away / path.name).symlink_to(path)
  (tmp_path / "here").mkdir()
  (tmp_path / "here" / "data").symlink_to(away, target_is_directory=True)
  (tmp_path / "here" / "latest").symlink_to(tmp_path / "here" / "data", target_is_directory=True)
  source = sources.build(kind, split="train", data_dir=tmp_path / "here")
  assert len(source) == _COUNT  # each once


def test_a_bank_that_holds_the_test_images_is_refused(tmp_path, images):
  """All shards together are one split; their name says no other."""
  (tmp_path / "a").mkdir()
  members = [(f"{i}.{images[i][0]}", images[i][1]) for i in range(6)]
  labels = [(f"{i}.cls", str(i % 2).encode()) for i in range(6)]
  _tar(tmp_path / "a" / "000.tar", [*members, *labels])
  config = configs.default()
  config.data.update({"name": "tar", "data_dir": str(tmp_path)})
  config.probe.test_split = "a"
  with pytest.raises(errors.UserError, match="6 images of probe.test_split=a are in probe.train_"):
    datasets.of_run(config)


def test_members_that_a_dot_in_their_name_hides_are_counted(tmp_path, images, caplog):
  kinds = [images[i][0] for i in range(4)]
  names = [f"cat.0.{kinds[0]}", f"cat.1.{kinds[1]}", f"x.{kinds[2]}", f"x.mask.{kinds[3]}"]
  _tar(tmp_path / "train-0.tar", [(name, images[i][1]) for i, name in enumerate(names)])
  assert len(sources.build("tar", split="train", data_dir=tmp_path)) == 1
  said = "train-0.tar: 2 images are left out, for in WebDataset a name ends at its first dot: cat.0"
  assert said in caplog.text and "x.mask" not in caplog.text
