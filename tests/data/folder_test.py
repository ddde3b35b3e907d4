"""Folders as people have them: a thousand files of every kind, splits, links, files of no use."""

import io
import itertools
import os
import pathlib
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from sklearn import datasets

from protojax import errors
from protojax.data import pipeline, sources

_KINDS = (
  *("a.jpg", "b.png", "c.webp", "d.bmp", "e.tif", "f.gif", "g.avif", "grey.jpeg", "palette.png"),
  *("alpha.png", "cmyk.jpg", "turned.jpg", "twelve.png", "twelve.tiff", "bits.png"),
)


def _save(path, kind, grey, rng):
  """One file; `grey` is [8, 8] of 0 to 16."""
  path.parent.mkdir(parents=True, exist_ok=True)
  level = np.round(grey * (255 / 16)).astype(np.uint8)
  colour = np.stack([level, 255 - level, np.full_like(level, rng.integers(256))], axis=-1)
  colour = colour[: rng.integers(4, 9)]  # of all heights
  name = kind.partition(".")[0]
  if name == "grey":
    Image.fromarray(level).save(path)
  elif name == "palette":
    Image.fromarray(colour).quantize(8).save(path)
  elif name == "alpha":
    Image.fromarray(np.concatenate([colour, colour[..., :1]], axis=-1)).save(path)
  elif name == "cmyk":
    Image.fromarray(colour).convert("CMYK").save(path)
  elif name == "turned":
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colour).save(path, exif=exif)
  elif name == "twelve":
    Image.fromarray(np.round(grey * (4000 / 16)).astype(np.uint16)).save(path)
  elif name == "bits":
    Image.fromarray(level > 100).save(path)
  else:
    Image.fromarray(colour).save(path)


def _by_pillow(path):
  """uint8 [H, W, 3]; of 16 bits, in which the files hold 12, by 4,095."""
  with Image.open(path) as image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
      level = np.round(np.asarray(image).astype(np.float64) * 255 / 4095).astype(np.uint8)
      return np.repeat(level[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGBA").convert("RGB"))


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
  """A folder of 1,000 digits as images of every kind in ten classes."""
  root = tmp_path_factory.mktemp("thousand")
  data, rng = datasets.load_digits(), np.random.default_rng(0)
  kinds = [kind for kind in _KINDS if features.check("avif") or kind != "g.avif"]
  for i in range(1000):
    kind = kinds[i % len(kinds)]
    path = root / f"digit {data.target[i]}" / f"{'deep/' * (i % 3)}{i:04d}_{kind}"
    _save(path, kind, data.images[i], rng)
  return root


def test_a_thousand_images_are_pillows_pixel_by_pixel(thousand):
  source = sources.build("folder", split="train", data_dir=thousand)
  assert len(source) == 1000 and source.num_classes == 10
  assert source.value_range == (0.0, 4095.0)  # the largest number is 4,000
  seen = set()
  for i, record in enumerate(source.read(range(1000))):
    path = source.describe(i)
    np.testing.assert_array_equal(record["image"], _by_pillow(path), err_msg=path)
    assert record["label"] == int(os.path.relpath(path, thousand)[len("digit ")])
    seen.add(os.path.basename(path)[5:])
  assert seen >= set(_KINDS) - {"g.avif"}


def _batches(source, steps, **options):
  arguments = {"seed": 1, "step": 0, "batch_size": 96, "image_size": 12} | options
  stream = pipeline.batches(source, **arguments)
  try:
    return list(itertools.islice(stream, steps))
  finally:
    stream.close()


def test_a_source_that_knows_the_sizes_of_originals_has_a_range_too():
  rng = np.random.default_rng(0)
  images = rng.integers(1000, 4000, (2, 4, 5)).astype(np.uint16)

  def read(records):
    files = [io.BytesIO() for _ in records]
    for file, record in zip(files, records, strict=True):
      Image.fromarray(images[record]).save(file, "png")
    return [(file.getvalue(), 0, (40, 50)) for file in files]

  source = sources.Source("own", np.arange(2), read)
  source.value_range = sources.measured_range(source)
  assert source.value_range == (0.0, 4095.0) and source[1]["size"] == (40, 50)
  np.testing.assert_array_equal(source[1]["image"][..., 0], np.round(images[1] / 4095 * 255))


def test_batches_of_a_folder_are_equal_for_workers_and_hosts_and_from_any_step_on(thousand):
  source = sources.build("folder", split="train", data_dir=thousand)
  whole = _batches(source, 3)
  of_hosts = [_batches(source, 3, process_index=h, process_count=2) for h in range(2)]
  joined = [
    {key: np.concatenate([half[key] for half in halves]) for key in halves[0]}
    for halves in zip(*of_hosts, strict=True)
  ]
  # Built anew, as after a restart.
  again = sources.build("folder", split="train", data_dir=thousand)
  others = (_batches(source, 3, num_workers=1), joined, whole[:2] + _batches(again, 1, step=2))
  for batches in others:
    for batch, other in zip(whole, batches, strict=True):
      for key in batch:
        np.testing.assert_array_equal(batch[key], other[key])


def _touch(root, *names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(path, format=None if path.suffix else "png")


def test_what_was_found_and_what_was_left_out_is_one_line(tmp_path, caplog):
  _touch(tmp_path, "cat/a.jpg", "cat/b.JPG", "dog/c.png")
  for name in ("notes.txt", "cat/x.heic", "cat/y.heic", "dog/z", ".hidden.png", "dog/f.npy"):
    (tmp_path / name).write_text("")
  (tmp_path / "cat" / "again").symlink_to(tmp_path)  # a circle
  (tmp_path / "cat" / "self").symlink_to("self")
  (tmp_path / "dog" / "up").symlink_to(tmp_path.parent)  # what is beside the folder is not in it
  (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
  (tmp_path / "dog" / "linked").symlink_to(tmp_path / "cat")  # no circle: twice, but finite
  caplog.set_level("INFO")
  source = sources.build("folder", split="train", data_dir=tmp_path)
  sources.build("folder", split="train", data_dir=tmp_path)  # is not told again
  assert len(source) == 5 and source.class_names == ("cat", "dog")
  (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("folder")]
  found = "5 images (4 .jpg, 1 .png), 2 classes, its folders: cat, dog; left out: "
  assert f"folder {tmp_path}: {found}" in line
  reasons = [
    "4 .heic (not read)",
    "1 .txt (not read)",
    "1 (no extension) (not read)",
    "1 .npy (arrays beside pictures)",
    "1 hidden",
    "3 link to a folder above it",
    "3 broken link",
  ]
  _, _, left = line.partition("; left out: ")
  *listed, more = left.split(", ")
  assert listed[0] == reasons[0] and len(listed) == 5 and set(listed) < set(reasons), line
  others = sum(int(reason.split()[0]) for reason in set(reasons) - set(listed))
  assert more == f"and {others} more of 2 other kinds"


def test_a_picture_that_this_pillow_cannot_read_is_left_out_with_the_remedy(
  tmp_path, caplog, monkeypatch
):
  monkeypatch.setattr(features, "check", lambda name: name != "avif")
  _touch(tmp_path, "a.png")
  (tmp_path / "b.avif").write_text("")
  caplog.set_level("INFO")
  assert len(sources.build("folder", split=None, data_dir=tmp_path)) == 1
  assert "1 .avif (this Pillow cannot read it: pip install -U pillow)" in caplog.text


@pytest.mark.parametrize("held_out", ["val", "validation", "valid", "test", "Val"])
def test_a_folder_of_train_and_held_out_images_has_the_classes_within(tmp_path, held_out):
  _touch(tmp_path, *(f"train/{c}/{i}.png" for c in ("n01", "n02") for i in range(2)))
  _touch(tmp_path, f"{held_out}/n01/1.png", f"{held_out}/n02/1.png")
  for split, count in (("train", 4), (held_out, 2), (None, 6)):
    source = sources.build("folder", split=split, data_dir=tmp_path)
    assert len(source) == count and source.class_names == ("n01", "n02"), split
    assert source.labels.tolist() == sorted(source.labels.tolist())[:count] or split is None
  for asked in ("test", "validation", "val"):
    found = sources.find_split("folder", asked, tmp_path)
    assert found == held_out
  assert sources.find_split("folder", "train", tmp_path) == "train"


def test_held_out_images_without_classes_are_passed_over_but_can_be_asked_for(tmp_path):
  _touch(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png", "test/1.png")
  assert sources.find_split("folder", "test", tmp_path) == "val"  # as ImageNet is handed out
  assert sources.build("folder", split="test", data_dir=tmp_path).describe(0).endswith("test/1.png")
  _touch(tmp_path, "test/a/1.png", "test/b/1.png")
  assert sources.find_split("folder", "test", tmp_path) == "test"
  assert sources.find_split("folder", "validation", tmp_path) == "val"


def test_the_name_of_a_split_is_never_a_label(tmp_path):
  flat = tmp_path / "flat"
  _touch(flat, "train/1.png", "val/1.png")
  more = tmp_path / "more"
  _touch(more, "train/a/1.png", "train/b/1.png", "test/a/1.png", "unlabeled/1.png")
  alone = tmp_path / "alone"
  _touch(alone, "train/a/1.png", "train/b/1.png")
  for root, classes in ((flat, ()), (more, ()), (alone, ("a", "b"))):
    assert sources.build("folder", split=None, data_dir=root).class_names == classes
  vehicles = tmp_path / "vehicles"  # a train is a class among others
  _touch(vehicles, "boat/1.png", "car/1.png", "train/1.png")
  names = sources.build("folder", split=None, data_dir=vehicles).class_names
  assert names == ("boat", "car", "train")


def test_a_missing_split_names_those_there_are(tmp_path):
  _touch(tmp_path, "train/a/1.png", "extra/1.png")
  with pytest.raises(errors.UserError, match="no folder 'test' in .*: there are extra, train"):
    sources.build("folder", split="test", data_dir=tmp_path)


def _arrays(root, arrays):
  root.mkdir(parents=True, exist_ok=True)
  for i, array in enumerate(arrays):
    np.save(root / f"{i}.npy", array)
  return root


def test_deep_images_of_any_kind_are_scaled_by_what_they_hold(tmp_path):
  rng = np.random.default_rng(0)
  cases = {
    "twelve": (rng.integers(0, 4000, (3, 4, 5)).astype(np.uint16), (0.0, 4095.0)),
    "dim": (rng.integers(0, 90, (3, 4, 5)).astype(np.uint16), (0.0, 255.0)),
    "unit": (rng.uniform(0, 1, (3, 4, 5)).astype(np.float32), (0.0, 1.0)),
    "hounsfield": (rng.integers(-1000, 2000, (3, 4, 5)).astype(np.int16), None),
    "float": (rng.normal(0, 50, (3, 4, 5)), None),
  }
  for name, (images, known) in cases.items():
    source = sources.build("folder", split=None, data_dir=_arrays(tmp_path / name, images))
    low, high = known or (images.min(), images.max())
    assert source.value_range == (low, high), name
    for i, image in enumerate(images):
      want = np.round((image - float(low)) * 255 / (float(high) - float(low))).astype(np.uint8)
      np.testing.assert_array_equal(source[i]["image"], np.repeat(want[..., None], 3, -1), name)
    given = sources.build(
      "folder", split=None, data_dir=tmp_path / name, value_range=(low, 3 * high)
    )
    assert given.value_range == (low, 3 * high)
    assert int(given[0]["image"].max()) < 190


def test_a_float_tiff_is_read_and_what_is_not_finite_is_black(tmp_path):
  pixels = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)
  pixels[0, 0] = np.nan
  Image.fromarray(pixels).save(tmp_path / "a.tif")
  source = sources.build("folder", split=None, data_dir=tmp_path)
  low, high = source.value_range
  assert (low, high) == (pixels[0, 1], 2.0)
  image = source[0]["image"][..., 0]
  assert (
    image[0, 0] == 0
    and image[-1, -1] == 255
    and np.all(np.diff(image.reshape(-1).astype(int)) >= 0)
  )


def test_images_of_one_channel_are_luma(thousand):
  grey = sources.build("folder", split="train", data_dir=thousand, channels=1)
  for i in range(0, 1000, 37):
    path, image = grey.describe(i), grey[i]["image"]
    with Image.open(path) as opened:
      if not opened.mode.startswith("I"):
        want = np.asarray(ImageOps.exif_transpose(opened).convert("L"))
        np.testing.assert_array_equal(image[..., 0], want, err_msg=path)
    assert image.shape[2] == 1
  digits = sources.build("digits", split="test", channels=1)
  assert digits[0]["image"].shape == (32, 32, 1)


def test_images_of_five_channels_come_from_arrays_and_pages(tmp_path):
  rng = np.random.default_rng(0)
  last = rng.uniform(0, [1, 2, 3, 4, 5], (6, 7, 5)).astype(np.float32)
  _arrays(tmp_path, [last, np.moveaxis(last, 2, 0)])
  source = sources.build("folder", split=None, data_dir=tmp_path, channels=5)
  low, high = np.array(source.value_range)
  assert low.shape == high.shape == (5,) and high[4] > 4  # of each channel its own
  for i in range(2):
    want = np.round((last.astype(float) - low) / (high - low) * 255)
    np.testing.assert_array_equal(source[i]["image"], want)
  (batch,) = pipeline.sequential(source, batch_size=2, image_size=4)
  assert batch["image"].shape == (2, 4, 4, 5)
  squashed = Image.fromarray(source[0]["image"][..., 3]).resize((4, 4), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(batch["image"][0, ..., 3], np.asarray(squashed))

  pages = [Image.fromarray(rng.integers(0, 256, (6, 7), np.uint8)) for _ in range(5)]
  root = tmp_path / "pages"
  root.mkdir()
  pages[0].save(root / "a.tif", save_all=True, append_images=pages[1:])
  image = sources.build("folder", split=None, data_dir=root, channels=5)[0]["image"]
  np.testing.assert_array_equal(image, np.stack([np.asarray(p) for p in pages], axis=-1))


def test_images_of_other_channels_are_corrupt_and_say_what_they_are(tmp_path):
  _arrays(tmp_path, [np.zeros((6, 7, 5), np.uint8)])
  source = sources.build("folder", split=None, data_dir=tmp_path, channels=4)
  with pytest.raises(sources.CorruptImage, match=r"uint8 \[6, 7, 5\], data.channels=4 wants"):
    source[0]


def test_colour_of_16_bits_is_warned_of_and_a_strange_tiff_names_what_reads_it(
  tmp_path, caplog, monkeypatch
):
  # A PNG of 16 bits a channel, which Pillow reads but does not write.
  def chunk(kind, content):
    body = kind + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

  header = (2).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
  rows = zlib.compress((b"\0" + bytes([200, 1]) * 6) * 2)
  parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
  (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
  (tmp_path / "b.tif").write_bytes(b"II*\0" + bytes(20))
  (tmp_path / "c.tif").write_bytes(b"nothing")
  monkeypatch.setitem(sys.modules, "tifffile", None)
  source = sources.build("folder", split=None, data_dir=tmp_path)
  assert "1 of 3 images looked at" in caplog.text and "Pillow keeps the upper eight" in caplog.text
  assert source.value_range is None and np.all(source[0]["image"] == 200)
  with pytest.raises(sources.CorruptImage, match=r"pip install 'protojax\[tiff\]'"):
    source[1]
  with pytest.raises(sources.CorruptImage, match="c.tif .*Pillow cannot identify it"):
    source[2]


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.npy"])
def test_a_pointer_of_git_lfs_is_no_image(tmp_path, name):
  pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
  (tmp_path / name).write_text(pointer)
  source = sources.build("folder", split=None, data_dir=tmp_path)
  with pytest.raises(sources.CorruptImage, match=f"{name} .*a pointer of Git LFS.*git lfs pull"):
    source[0]


@pytest.mark.parametrize(
  "wrong",
  [{"channels": 0}, {"value_range": (3, 3)}, {"value_range": 5}, {"value_range": ((1, 2), 3)}],
)
def test_channels_and_ranges_that_are_none_are_refused_by_name(tmp_path, wrong):
  _touch(tmp_path, "a.png")
  with pytest.raises(errors.UserError, match=f"^data.{next(iter(wrong))}="):
    sources.build("folder", split=None, data_dir=tmp_path, **wrong)


def test_a_folder_that_may_not_be_looked_into_is_one_line(tmp_path, monkeypatch):
  def refused(self, *unused, **also_unused):
    raise PermissionError(13, "Permission denied", str(self))

  for call in ("is_dir", "iterdir"):
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, call, refused)
      with pytest.raises(errors.UserError, match="cannot be looked into: .* denied"):
        sources.build("folder", split="train", data_dir=tmp_path)
