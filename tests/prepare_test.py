"""Prepared data sets: whole or not there, lossless or told, read by protojax and by TFDS."""

import hashlib
import http.server
import io
import os
import pathlib
import shutil
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from protojax import config as configs
from protojax import errors, prepare
from protojax.data import cifar, pipeline, prepared, sources
from protojax.training import datasets


def test_the_usage_says_which_kind_takes_which_folders(capsys):
  with pytest.raises(SystemExit):
    prepare.main(["--help"])
  first, second = capsys.readouterr().out.splitlines()[:2]
  assert first == "usage: protojax prepare {cifar10,cifar100} OUT [--archive=FILE]"
  assert second.split()[2:5] == ["{folder,parquet,tar}", "IN", "OUT"]


def _archive(kind, path, train=20, test=10):
  """Writes a small archive of this kind; (its `Archive`, {split: (labels [N, .], images)})."""
  archive, rng = cifar.ARCHIVES[kind], np.random.default_rng(0)
  content, members = {}, {}
  for split, files in archive.splits.items():
    count = (train if split == "train" else test) // len(files) * len(files)
    classes = [10] if kind == "cifar10" else [20, 100]
    labels = np.stack([rng.integers(0, c, count) for c in classes], 1).astype(np.uint8)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    content[split] = labels, images
    rows = np.concatenate([labels, images.transpose(0, 3, 1, 2).reshape(count, -1)], 1)
    for file, part in zip(files, np.split(rows, len(files)), strict=True):
      members[file] = part.tobytes()
  for file, count in zip(archive.labels.values(), classes, strict=True):
    names = "\n".join(f"class_{i}" for i in range(count))
    members[file] = f"{names}\n\n".encode()  # an empty line at the end, as theirs have
  with tarfile.open(path, "w:gz") as files:
    for name, data in members.items():
      info = tarfile.TarInfo(f"{archive.folder}/{name}")
      info.size = len(data)
      files.addfile(info, io.BytesIO(data))
  data = path.read_bytes()
  changed = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
  return archive._replace(**changed), content


class _Server(http.server.BaseHTTPRequestHandler):
  """Serves `content`, from where it is asked to, at most `most` bytes; notes the ranges."""

  content, most, ranges = b"", 0, []

  def do_GET(self):
    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    type(self).ranges.append(start)
    self.send_response(206)
    self.send_header("Content-Length", str(len(self.content) - start))
    self.end_headers()
    self.wfile.write(self.content[start : start + self.most])

  def log_message(self, *unused):
    pass


@pytest.fixture
def server():
  class Server(_Server):
    ranges = []

  served = http.server.HTTPServer(("127.0.0.1", 0), Server)
  thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  Server.url = f"http://127.0.0.1:{served.server_port}/a.tar.gz"
  yield Server
  served.shutdown()
  thread.join()
  served.server_close()


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_is_stored_without_loss_and_read_by_protojax_and_tfds(
  kind, tmp_path, monkeypatch, capsys
):
  archive, content = _archive(kind, tmp_path / "a.tar.gz")
  monkeypatch.setitem(cifar.ARCHIVES, kind, archive)
  out = tmp_path / "data"
  prepare.main([kind, str(out), f"--archive={tmp_path / 'a.tar.gz'}"])
  said = capsys.readouterr().out
  assert "train 20, test 10" in said and f"--config.data.name={kind}" in said
  reference = tfds.builder(kind, data_dir=out)  # of TFDS's own features
  for split, (labels, images) in content.items():
    data = sources.build(kind, split=split, data_dir=out)
    other = reference.as_data_source(split)
    assert len(data) == len(images)
    for i, image in enumerate(images):
      np.testing.assert_array_equal(data[i]["image"], image)
      assert data[i]["label"] == labels[i, -1] and data[i]["size"] == (32, 32)
      np.testing.assert_array_equal(other[i]["image"], image)
      assert other[i]["label"] == labels[i, -1]
      assert kind == "cifar10" or other[i]["coarse_label"] == labels[i, 0]
    assert data.class_names[7] == "class_7" and data.num_classes == int(kind[5:])
  with pytest.raises(errors.UserError, match="is there already"):
    prepare.main([kind, str(out), f"--archive={tmp_path / 'a.tar.gz'}"])


def test_the_archives_are_those_that_tfds_lists():
  lists = pathlib.Path(tfds.__file__).parent / "url_checksums"
  for kind, archive in cifar.ARCHIVES.items():
    url, size, sha256, _ = (lists / f"{kind}.txt").read_text().split("\n")[0].split("\t")
    assert (url, int(size), sha256) == (archive.url, archive.size, archive.sha256)


def test_a_download_goes_on_where_it_stopped_and_is_checked(tmp_path, monkeypatch, server):
  archive, _ = _archive("cifar10", tmp_path / "a.tar.gz")
  archive = archive._replace(url=server.url)
  monkeypatch.setitem(cifar.ARCHIVES, "cifar10", archive)
  server.content, server.most = (tmp_path / "a.tar.gz").read_bytes(), archive.size // 2 + 1
  out = tmp_path / "out"
  with pytest.raises(errors.UserError, match=r"again.*goes on"):
    prepare.main(["cifar10", str(out)])
  assert [path.name for path in out.iterdir()] == ["a.tar.gz.part"]
  prepare.main(["cifar10", str(out)])
  assert server.ranges == [0, archive.size // 2 + 1]
  assert [path.name for path in out.iterdir()] == ["cifar10"]
  assert len(sources.build("cifar10", split="train", data_dir=out)) == 20
  server.content, server.most = b"x" * archive.size, archive.size
  with pytest.raises(errors.UserError, match="sha256.*binary version"):
    prepare.main(["cifar10", str(tmp_path / "other")])
  assert not list((tmp_path / "other").iterdir())


def test_without_a_network_the_way_out_is_named(tmp_path, monkeypatch):
  archive = cifar.ARCHIVES["cifar10"]._replace(url="http://127.0.0.1:9/a.tar.gz")
  monkeypatch.setitem(cifar.ARCHIVES, "cifar10", archive)
  with pytest.raises(errors.UserError, match="cannot download.*--archive=FILE") as caught:
    prepare.main(["cifar10", str(tmp_path)])
  assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Forty odd photos in train/ and test/ of two classes, one of them damaged."""
  root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
  for i in range(40):
    path = root / ("test" if i % 4 == 3 else "train") / "ab"[i // 4 % 2] / f"{i:02d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    low = rng.integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(low).resize((50 + i, 40), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6 if i % 5 == 0 else 1
    image.convert(("RGB", "L", "CMYK")[i % 3]).save(path, quality=90, exif=exif)
  (root / "train" / "b" / "05.jpg").write_bytes(b"no image")
  return root


@pytest.fixture(scope="module")
def small(photos, tmp_path_factory):
  """`photos` prepared at 24 pixels."""
  out = tmp_path_factory.mktemp("out")
  prepare.main(["folder", str(photos), str(out), "--size=24", "--name=small"])
  return out


def test_prepared_photos_keep_sizes_labels_and_all_but_the_loss_of_jpeg(photos, small):
  for split, damaged in (("train", 1), ("test", 0)):
    before = sources.build("folder", split=split, data_dir=photos)
    after = sources.build("small", split=split, data_dir=small)
    assert len(after) == len(before) - damaged and after.class_names == before.class_names
    options = {"batch_size": len(before), "image_size": 24}
    (want,) = pipeline.sequential(before, **options)
    (got,) = pipeline.sequential(after, **options)
    mask = want["mask"]
    for key in ("size", "label"):
      np.testing.assert_array_equal(got[key][got["mask"]], want[key][mask])
    apart = got["image"][got["mask"]].astype(int) - want["image"][mask]
    assert np.abs(apart).mean() < 2 and np.abs(apart).max() < 40
    assert (want["size"][mask] != 24).all()
  ids = [
    one["id"] for one in tfds.builder_from_directory(small / "small/1.0.0").as_data_source("test")
  ]
  assert ids[:2] == [b"test/a/03.jpg", b"test/a/11.jpg"]
  # The JPEG is of the very pixels that training would have made, so a second squash changes none.
  image = Image.open(io.BytesIO(after._read([0])[0][0]))
  assert image.format == "JPEG" and image.size == (24, 24)
  jpeg = prepared._jpeg(want["image"][0], 95)
  np.testing.assert_array_equal(sources.decode(jpeg), got["image"][0])


def test_prepared_images_are_called_as_their_files(small):
  test = sources.build("small", split="test", data_dir=small)
  assert [test.describe(i) for i in (0, 1)] == ["test/a/03.jpg", "test/a/11.jpg"]


def test_a_name_that_is_no_utf_8_is_prepared_too(photos, tmp_path):
  folder = tmp_path / "in" / "train"
  folder.mkdir(parents=True)
  photo = sorted((photos / "train").rglob("*.jpg"))[0]
  (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(photo.read_bytes())
  prepare.main(["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--size=24", "--name=cafe"])
  prepared = sources.build("cafe", split="train", data_dir=tmp_path / "out")
  assert prepared.describe(0) == "train/caf\ufffd.jpg"


def test_a_prepared_set_trains_without_a_test_split_and_refuses_one_that_is_searched_too(
  photos, tmp_path, caplog
):
  prepare.main(["folder", str(photos / "train"), str(tmp_path), "--size=24", "--name=one"])
  config = configs.default("dino")
  config.data.update({"name": "one", "data_dir": str(tmp_path)})
  caplog.set_level("INFO")
  train, bank, test = datasets.of_run(config)
  assert bank is train and test is None
  assert "are off: one has the splits train, not 'test'; take parts for" in caplog.text
  config.probe.test_split = "train[80%:]"
  with pytest.raises(errors.UserError, match=r"6 images of .*=train\[80%:\] are in .*=train too"):
    datasets.of_run(config)
  config.probe.train_split = "train[:80%]"
  _, bank, test = datasets.of_run(config)
  assert (len(bank), len(test)) == (23, 6)
  config.probe.test_split = "tst"
  with pytest.raises(errors.UserError, match="no split 'tst' .* train, and slices"):
    datasets.of_run(config)


def test_a_prepared_val_is_the_test_split_as_that_of_a_folder_is(photos, tmp_path, caplog):
  for ours, theirs in (("train", "train"), ("test", "val")):
    shutil.copytree(photos / ours, tmp_path / "photos" / theirs)
  prepare.main(
    ["folder", str(tmp_path / "photos"), str(tmp_path / "out"), "--size=24", "--name=two"]
  )
  config = configs.default("dino")
  config.data.update({"name": "two", "data_dir": str(tmp_path / "out")})
  for asked in ("test", "validation", "val"):
    config.probe.test_split = asked
    _, _, test = datasets.of_run(config)
    assert test is not None and len(test) == 10
  assert "are off" not in caplog.text


def test_a_lower_quality_takes_less_and_halves_the_resolution_of_colours(photos, small, tmp_path):
  prepare.main(["folder", str(photos), str(tmp_path), "--size=24", "--name=small", "--quality=85"])
  files = []
  for root in (small, tmp_path):
    of_root = sources.build("small", split="train", data_dir=root)
    files.append([found[0] for found in of_root._read(list(range(len(of_root))))])
  assert sum(map(len, files[1])) < 0.9 * sum(map(len, files[0]))
  layers = [Image.open(io.BytesIO(one[0])).layer for one in files]
  assert [[part[1:3] for part in of_one] for of_one in layers] == [
    [(1, 1), (1, 1), (1, 1)],
    [(2, 2), (1, 1), (1, 1)],
  ]
  with pytest.raises(errors.UserError, match="--quality=0 must be 1 to 100"):
    prepare.main(["folder", str(photos), str(tmp_path), "--name=other", "--quality=0"])


def test_what_cannot_be_read_is_left_out_and_named(photos, tmp_path, capsys):
  prepare.main(["folder", str(photos), str(tmp_path), "--size=8"])
  said = capsys.readouterr().out
  assert "train 29, test 10 images" in said and "05.jpg" in said and "left out" in said
  name = photos.name.lower()
  assert f"--config.data.name={name} --config.data.data_dir={tmp_path} " in said
  assert "--config.data.image_size=8" in said
  assert (tmp_path / name / "1.0.0" / "dataset_info.json").exists()


def test_an_interrupted_prepare_leaves_nothing_and_starts_over(tmp_path, monkeypatch):
  features = {"image": tfds.features.Image(shape=(None, None, 3))}
  example = {"image": prepared._jpeg(np.zeros((4, 4, 3), np.uint8), 95)}

  def stopped():
    yield example
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    prepared.write(tmp_path, "own", "1.0.0", features, {"train": stopped()})
  assert not list(tmp_path.iterdir())
  killed = tmp_path / ".own-1.0.0.unfinished"
  killed.mkdir()
  (killed / "train-7").write_text("half")
  monkeypatch.setattr(prepared, "_SHARD", 100)
  counts = prepared.write(tmp_path, "own", "1.0.0", features, {"train": [example] * 3})
  assert counts == {"train": 3} and [p.name for p in tmp_path.iterdir()] == ["own"]
  files = sorted(p.name for p in (tmp_path / "own" / "1.0.0").glob("*array_record*"))
  assert files == [f"own-train.array_record-0000{i}-of-00003" for i in range(3)]
  data = sources.build("own", split="train", data_dir=tmp_path)
  assert len(data) == 3 and data[2]["image"].shape == (4, 4, 3)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["cifar10"], "required"),
    (["cifar10", "a", "b"], "takes OUT"),
    (["folder", "a"], "takes IN OUT"),
    (["stl10", "a"], "invalid choice"),
    (["folder", "/nowhere", "OUT"], "/nowhere of data set 'folder' is not a folder"),
    (["folder", "IN", "OUT", "--name=Mine"], "'Mine'.*--name"),
    (["folder", "IN", "OUT", "--name=tar"], "'tar'.*--name"),
    (["folder", "IN", "OUT", "--size=0"], "--size=0 must"),
    (["cifar10", "FILE"], "cannot write to .*00.jpg"),
    (["folder", "IN", "FILE"], "cannot write to .*00.jpg"),
    (["cifar100", "OUT", "--archive=/nowhere"], "cannot read the archive"),
  ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, words, photos, tmp_path):
  file = photos / "train" / "a" / "00.jpg"
  places = {"IN": str(photos), "OUT": str(tmp_path / "out"), "FILE": str(file)}
  with pytest.raises(errors.UserError, match=words) as caught:
    prepare.main([places.get(word, word) for word in arguments])
  assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*"))


def test_splits_of_other_spellings_and_deep_images_share_one_range(tmp_path, capsys):
  for split, level in (("Training", 4000), ("Val", 1000)):
    (tmp_path / "in" / split).mkdir(parents=True)
    deep = Image.fromarray(np.full((4, 4), level, np.uint16))
    deep.save(tmp_path / "in" / split / "0.png")
  prepare.main(["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--size=4"])
  assert "0 to 4095 become 0 to 255" in capsys.readouterr().out
  for split, level in (("train", 249), ("val", 62)):
    image = sources.build("in", split=split, data_dir=tmp_path / "out")[0]["image"]
    assert np.abs(image.astype(int) - level).max() <= 1
  grey = sources.build("digits", split="test", channels=1)
  with pytest.raises(errors.UserError, match="digits/test has 1 channels, a prepared data set 3"):
    prepared.features_of(grey)


def test_splits_of_different_classes_are_refused(tmp_path):
  for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"):
    (tmp_path / "in" / path).parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / path)
  command = ["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--size=4"]
  with pytest.raises(errors.UserError, match="different classes.*--splits"):
    prepare.main(command)
  assert not (tmp_path / "out").exists()
  prepare.main([*command, "--splits=test"])
  assert sources.build("in", split="test", data_dir=tmp_path / "out").class_names == ("a", "c")
