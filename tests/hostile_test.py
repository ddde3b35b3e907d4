"""What every reader does with files that are damaged, or made to do harm: see hostile.py."""

import io
import json
import os
import pathlib
import stat
import struct
import tarfile
import time
import warnings
import zipfile
import zlib

import hostile
import numpy as np
import pytest
import tiny
import torch_format
from PIL import Image

from protojax import errors, files, npy
from protojax.data import sources
from protojax.interop import tensor_files
from protojax.reports import page, record
from protojax.training import checkpoint

long = pytest.mark.skipif("PROTOJAX_TEST_ALL" not in os.environ, reason="not without --all")
# Seeds that once found something, from runs of `python tests/hostile.py READER` by hand.
_FOUND = {
  "pth_zip": (6, 820, 835),
  "npz": (2, 3, 51, 114, 273, 291, 342, 396, 478, 522, 655, 1315, 1417),
  "npy": (1, 30, 56),
  "parquet": (821, 1003, 20347),
  "tar": (0, 5, 10, 11, 12, 17),
  "folder_npy": (35, 159, 193),
  "log": (2, 5, 10, 22, 40, 44, 48, 57, 88, 106, 121, 142, 10300, 10408, 10828, 20071, 20127),
  "resume": (41, 48, 57, 58, 61, 64, 68, 70, 85, 114, 115, 126, 181, 184, 20299, 20562),
  "seal": (21418,),
  "result": (48,),
}


def _read(name, seeds):
  """Reads the files of a reader as each of these seeds changes them."""
  reader = hostile.READERS[name]
  whole = reader.seeds()
  hostile.attempt(reader, whole)
  for seed in seeds:
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are Pillow's and NumPy's, of what they find
        hostile.attempt(reader, hostile.mutated(whole, seed))
    except hostile.Broken as error:
      raise AssertionError(f"{name}, seed {seed}: {error}") from error


@pytest.mark.survives(
  "damaged files, each reader",
  "16 of them and every one that once found something; with --all 30 s a reader",
  "what can be read, or one line",
)
@pytest.mark.parametrize("name", hostile.READERS)
def test_damaged_files_are_read_or_one_line(name):
  _read(name, [*_FOUND.get(name, ()), *range(5000, 5016)])


@long
@pytest.mark.parametrize("name", hostile.READERS)
def test_many_damaged_files_are_read_or_one_line(name):
  begun, seed = time.monotonic(), 10_000
  while time.monotonic() - begun < 30.0:
    _read(name, range(seed, seed + 20))
    seed += 20


def _refused(path, words):
  with (
    hostile.watched(path.parent),
    pytest.raises(errors.UserError, match=words) as caught,
  ):
    tensor_files.read(path)
  assert len(str(caught.value)) < 600


def _npy_header(shape, descr="<f4"):
  text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
  text += b" " * (-(len(text) + 11) % 64) + b"\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.survives(
  "arrays that claim to be huge",
  ".npy, .npz, .safetensors, .pth",
  "one line",
)
def test_shapes_that_no_file_holds_are_refused_without_the_memory(tmp_path):
  absurd = _npy_header("(1000000, 1000000, 3)") + bytes(100)
  (tmp_path / "x.npy").write_bytes(absurd)
  _refused(tmp_path / "x.npy", "12000000000000 bytes were announced and 100 are there")
  with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
    archive.writestr("a.npy", absurd)
  _refused(tmp_path / "x.npz", "12000000000000 bytes were announced and 100 are there")
  header = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 4], "data_offsets": [0, 2**44]}})
  header = header.encode()
  (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
  _refused(tmp_path / "x.safetensors", "damaged")
  (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{" + bytes(64))
  _refused(tmp_path / "y.safetensors", "damaged")
  huge = torch_format.tensor(torch_format.Storage("float32", "0", 2**40), 0, (2**20, 2**20), (0, 1))
  torch_format.save(tmp_path / "x.pth", {"a": huge})
  _refused(tmp_path / "x.pth", "damaged")
  for text in (b"-" * 9000 + b"1", b"(" * 9000, b"[" * 9000, b"\xff" * 100):
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    (tmp_path / "z.npy").write_bytes(header + bytes(64))
    _refused(tmp_path / "z.npy", "its header cannot be read")


@pytest.mark.survives(
  "a zip bomb",
  ".npz of 1.3 GB in under 2 MB",
  "one line",
)
@long
def test_archives_that_unpack_to_far_more_than_they_are_do_not(tmp_path):
  zeros = _npy_header(f"({1 << 26}, 5)")
  with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
    with archive.open("a.npy", "w", force_zip64=True) as file:
      file.write(zeros)
      for _ in range(20):
        file.write(bytes(1 << 26))
  assert (tmp_path / "x.npz").stat().st_size < 2 << 20
  _refused(tmp_path / "x.npz", "unpack to many times its size")


def _png(width, height, bits=16, kind=0, chunks=(), rows=None):
  """A PNG of zeros; of its rows so many are there."""

  def chunk(name, content):
    length, check = (struct.pack(">I", n) for n in (len(content), zlib.crc32(name + content)))
    return length + name + content + check

  packer, row = zlib.compressobj(1), bytes(1 + width * bits * (3 if kind == 2 else 1) // 8)
  there = height if rows is None else rows
  data = b"".join([*(packer.compress(row) for _ in range(there)), packer.flush()])
  head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
  rest = [chunk(name, content) for name, content in chunks]
  return b"".join([b"\x89PNG\r\n\x1a\n", head, *rest, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def _found(folder, name="folder"):
  with hostile.watched(folder), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    source = sources.build(name, split=None, data_dir=str(folder))
    return list(source.read(range(len(source))))


@pytest.mark.survives(
  "decompression bombs in pictures",
  "pixels, text and profile of a PNG",
  "skipped, counted and named",
)
def test_pictures_that_are_far_larger_than_their_files_are_corrupt(tmp_path):
  bomb = zlib.compress(bytes(1 << 27), 1)
  texts = [(b"zTXt", b"x\0\0" + bomb), (b"iCCP", b"x\0\0" + bomb)]
  (tmp_path / "a.png").write_bytes(_png(20_000, 20_000, rows=2))
  (tmp_path / "b.png").write_bytes(_png(8, 8, 8, 2, texts))
  huge, text = _found(tmp_path)
  assert "DecompressionBombError" in str(huge)
  assert isinstance(text, sources.CorruptImage) or text["size"] == (8, 8)


@long
def test_a_large_deep_picture_is_scaled_a_part_at_a_time(tmp_path):
  (tmp_path / "a.png").write_bytes(_png(13_000, 6_800, 16))
  (found,) = _found(tmp_path)
  assert found["size"] == (6_800, 13_000)


@pytest.mark.survives(
  "pipes and devices among images",
  "by themselves and behind links",
  "left out and counted",
)
def test_pipes_devices_and_sockets_are_left_out_with_a_word(tmp_path, caplog):
  Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
  os.mkfifo(tmp_path / "b.png")
  (tmp_path / "c.png").symlink_to("/dev/zero")
  (tmp_path / "d.png").symlink_to(tmp_path / "b.png")
  (tmp_path / "e.png").symlink_to(tmp_path / "none.png")
  with caplog.at_level("INFO"):
    assert len(_found(tmp_path)) == 1
  assert "3 pipe, socket or device, 1 broken link" in caplog.text
  assert stat.S_ISFIFO((tmp_path / "b.png").stat().st_mode)


@pytest.mark.survives(
  "paths, links and devices in a tar",
  "`../`, absolute, four kinds that are no files",
  "nothing is unpacked, none of it is read",
)
def test_a_tar_names_nothing_outside_of_itself(tmp_path):
  """Nothing is unpacked; links and devices in it are no images."""
  file, picture = io.BytesIO(), io.BytesIO()
  Image.new("RGB", (4, 4)).save(picture, "PNG")
  with tarfile.open(fileobj=file, mode="w") as archive:
    for name, kind in (
      ("../../../tmp/up.png", tarfile.REGTYPE),
      ("/etc/absolute.png", tarfile.REGTYPE),
      ("link.png", tarfile.SYMTYPE),
      ("hard.png", tarfile.LNKTYPE),
      ("pipe.png", tarfile.FIFOTYPE),
      ("device.png", tarfile.CHRTYPE),
    ):
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, "/etc/passwd"
      info.size = len(picture.getvalue()) if kind == tarfile.REGTYPE else 0
      archive.addfile(info, io.BytesIO(picture.getvalue()) if info.size else None)
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "train-0.tar").write_bytes(file.getvalue())
  assert [found["size"] for found in _found(tmp_path / "in", "tar")] == [(4, 4)] * 2
  assert {p.name for p in tmp_path.rglob("*")} == {"in", "train-0.tar", ".train-0.tar.index.json"}


def test_an_index_beside_a_tar_that_points_elsewhere_is_made_anew(tmp_path):
  path = tmp_path / "train-0.tar"
  path.write_bytes(hostile._tar()["train-0.tar"])
  want = len(_found(tmp_path, "tar"))
  index = tmp_path / ".train-0.tar.index.json"
  known = json.loads(index.read_text())
  for sample in (["x", 0, 2**60, None], ["x", -5, 5, None], ["x", "0", 1, None], ["x", 0, 1, [1]]):
    index.write_text(json.dumps(known | {"samples": [sample]}))
    assert len(_found(tmp_path, "tar")) == want


@pytest.mark.survives(
  "a seal that names files elsewhere",
  "`../`, a device",
  "damage, as any other",
)
@pytest.mark.parametrize("name", ["../../outside", "/dev/zero", "state/../../../outside", "a\0b"])
def test_a_seal_that_names_files_elsewhere_is_damage(tmp_path, name):
  (tmp_path / "outside").write_text("x")
  checkpoints = checkpoint.Checkpoints(tmp_path / "run")
  state = {"a": np.ones(3, np.float32)}
  checkpoints.save(3, state, {})
  checkpoints.close()
  seal = tmp_path / "run" / "checkpoints" / "3" / "seal.json"
  said = json.loads(seal.read_text())
  seal.write_text(json.dumps(said | {"files": said["files"] | {name: 0}}))
  with hostile.watched(tmp_path):
    with pytest.raises(errors.UserError, match="no checkpoint in .* can be read: .*outside of the"):
      checkpoint.Checkpoints(tmp_path / "run").restore_latest(state)


@pytest.mark.survives(
  "HTML in names",
  "folder, settings, measures, protocols",
  "text on the page",
)
def test_what_a_run_calls_itself_is_no_part_of_its_page(tmp_path):
  folder = tmp_path / "<img src=x onerror=alert(1)>"
  for name, content in hostile._run().items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  tag = hostile._TAG
  config = json.loads((folder / "config.json").read_text())
  config["data"]["name"] = config["method"][f"own{tag}"] = config["probe"]["name"] = tag
  (folder / "config.json").write_text(json.dumps(config))
  line = {"step": 200, f"collapse/{tag}": 1.0, f"train/{tag}": 2.0, "non_finite": [tag]}
  with open(folder / "metrics.jsonl", "a") as file:
    file.write(json.dumps(line) + "\n")
  result = {"measures": {tag: 1.0, "name": tag}, "protocol": {"name": tag, tag: tag, "k": tag}}
  for name in ("final", "knn"):
    (folder / "eval" / name / "result.json").write_text(json.dumps(result))
  runs = record.read([folder])
  html = page.build(runs, {runs[0].name: f"none {tag}"}, f"protojax report {tag}")
  assert tag not in html and "<img src=x" not in html and html.count("<script>") == 1
  assert "&lt;script&gt;bad" in html


def test_json_without_end_and_half_a_character_are_no_json(tmp_path):
  deep = '{"a":' * 200 + "1" + "}" * 200
  for text in ("[" * 100_000, "[" * 200 + "]" * 200, deep, '"\\ud800"'):
    with pytest.raises(ValueError):
      files.parse_json(text)
  deep = "[" * 50 + "]" * 50
  assert files.parse_json(f"[{deep}, {deep}, {deep}]") and files.parse_json('"\\ud83d\\ude00"')
  large = f'{{"step": 2, "a": -1{"0" * 309}}}'
  (tmp_path / "x").write_text(f'{{"step": 1}}\n{"[" * 100_000}\n{large}\n')
  assert files.json_lines(tmp_path / "x")[0] == [{"step": 1}, {"step": 2, "a": -np.inf}]


def test_an_array_of_any_order_and_size_is_numpys(tmp_path):
  rng = np.random.default_rng(0)
  for array in (
    rng.normal(size=(3, 4)),
    np.asfortranarray(rng.normal(size=(3, 4))),
    np.zeros((0, 4), np.float32),
    np.array(2.5),
    np.array(["ab", "c"]),
    np.arange(5, dtype=">i4"),
  ):
    np.save(tmp_path / "x.npy", array)
    size = (tmp_path / "x.npy").stat().st_size
    with open(tmp_path / "x.npy", "rb") as file:
      for got in (npy.mapped(tmp_path / "x.npy"), npy.read(file, size)):
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got, array)


def test_the_watch_sees_what_must_not_be(tmp_path):
  """Or nothing above would say anything."""
  import pickle
  import subprocess

  def unpickle():
    pickle.loads(pickle.dumps(tiny.batch))

  def start():
    subprocess.run(["true"], check=True)

  def write():
    (pathlib.Path(__file__).parent / "x").open("w")

  def take():
    np.zeros(3 << 30, np.uint8)

  for call, words in (
    (unpickle, "pickle.find_class"),
    (start, "started a program"),
    (take, "MemoryError"),
    (lambda: {}["a"], "KeyError"),
  ):
    with pytest.raises(hostile.Broken, match=words), hostile.watched(tmp_path):
      call()
  with pytest.raises(hostile.Broken, match="outside"), hostile.watched(tmp_path / "in"):
    (tmp_path / "x").write_text("x")
