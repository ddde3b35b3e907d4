"""Files made by somebody who means harm, or by a bad disk, and what may come of reading them.

`READERS` has, for each reader, the files it begins with and the call that reads them. `mutated`
changes them by a seed: bits, cuts, numbers, what JSON holds, members of archives. `watched` lets a
call end only as it should: by a result or a UserError, within 10 s and 2 GiB, without unpickling,
without starting a program, opening a connection or writing outside the folder.

  python tests/hostile.py READER --seconds=120 --seed=1

reads mutated files for so long and prints what went wrong with the seed that makes it again.
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import pathlib
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import ml_collections
import numpy as np
import pyarrow as pa
import safetensors.numpy
import torch_format
from PIL import Image
from pyarrow import parquet

from protojax import config as configs
from protojax import environment, errors, resolving
from protojax.data import sources
from protojax.evals import result_files
from protojax.interop import tensor_files
from protojax.reports import comparison, page, record
from protojax.training import checkpoint, continuation, data_settings, export, workdir

SECONDS, BYTES = 10.0, 2 << 30
_TAG = "<script>bad</script>"
Files = dict[str, bytes]


class Broken(BaseException):
  """What a reader must not do; passes through `except Exception`."""


_inside: list[pathlib.Path] = []  # the folder of the call that is watched
_done: list[str] = []  # what it did that it must not


def _audit(event: str, args: tuple) -> None:
  if not _inside or threading.current_thread() is not threading.main_thread():
    return
  if event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"):
    _done.append(f"started a program: {event} {args[:2]}")
  elif event in ("pickle.find_class", "socket.connect", "ctypes.dlopen"):
    _done.append(f"{event} {args}")
  elif event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
    if not pathlib.Path(os.path.abspath(args[0])).is_relative_to(_inside[0]):
      _done.append(f"wrote outside of its folder: {args[0]}")


sys.addaudithook(_audit)


def _late(*unused) -> None:
  _done.append(f"took more than {SECONDS:.0f} s")
  raise Broken(_done[-1])


@contextlib.contextmanager
def watched(folder: pathlib.Path):
  """Around a call that reads from `folder`: anything but a result or a UserError is `Broken`."""
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
  before = signal.signal(signal.SIGALRM, _late)
  _done.clear()
  _inside.append(folder)
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  try:
    yield
  except errors.UserError as error:
    if len(str(error).splitlines()) != 1 or not str(error).isprintable():
      raise Broken(f"a message that is not one line: {str(error)!r}") from error
  except Broken:
    raise
  except BaseException as error:
    raise Broken(f"{type(error).__name__}: {str(error)[:300]}") from error
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    _inside.clear()
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
  if _done:
    raise Broken("; ".join(_done))


# The readers.


def _arrays(folder: pathlib.Path) -> None:
  for path in sorted(folder.iterdir()):
    for array in tensor_files.read(path).values():
      np.array(array.reshape(-1)[:100])


def _images(name: str, folder: pathlib.Path) -> None:
  source = sources.build(name, split=None, data_dir=str(folder))
  for found in source.read(range(min(len(source), 64))):
    if isinstance(found, sources.CorruptImage) and "MemoryError" in str(found):
      raise MemoryError(str(found))
  source.describe(0)
  sources.source.measured_range(source)


def _page(folder: pathlib.Path) -> None:
  runs = record.read([folder])
  html = page.build(runs, {runs[0].name: "none here"}, "protojax report")
  if _TAG in html:
    raise Broken("a tag in the page")
  comparison.table(runs)
  record.verdict(folder)


def _resume(folder: pathlib.Path) -> None:
  config = _config()
  data_settings.recalled(config, str(folder))
  with mock.patch.object(environment, "describe", dict):  # it asks programs
    workdir.claim(str(folder), config)
  continuation.extend(folder, config, 4)
  workdir.read_result(folder)
  workdir.unseen(folder, {"unseen": False}, 4)


def _results(folder: pathlib.Path) -> None:
  result_files.read(folder / "result.json")
  with contextlib.suppress(errors.UserError):
    result_files.require_free(folder / "result.json", {"name": "knn"})


def _sealed(folder: pathlib.Path) -> None:
  checkpoint.leaves(folder)
  checkpoint.intact(folder)
  checkpoints = checkpoint.Checkpoints(folder)
  try:
    checkpoints.restore_latest(_state())
  finally:
    checkpoints.close()


def _exported(folder: pathlib.Path) -> None:
  _, info = export.read(folder)
  export.read_prototypes(folder, info)


# What they begin with.


@functools.cache
def _weights() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    "head.weight": rng.normal(size=(4, 3)).astype(np.float32),
    "head.bias": np.arange(3, dtype=np.int64),
    "mask": np.array([True, False]),
  }


def _saved(write: Callable, name: str) -> Files:
  with tempfile.TemporaryDirectory() as folder:
    write(pathlib.Path(folder) / name)
    paths = sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def _torch(*, legacy: bool) -> Files:
  return _saved(lambda p: torch_format.save(p, _weights(), legacy=legacy), "x.pth")


def _picture(form: str, mode: str = "RGB") -> bytes:
  pixels = np.random.default_rng(1).integers(0, 255, (9, 7, 3), np.uint8)
  file = io.BytesIO()
  exif = Image.Exif()
  exif[0x0112] = 6
  options = {"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}
  Image.fromarray(pixels).convert(mode).save(file, form, **options)
  return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def _pictures() -> Files:
  found = {
    f"{form.lower()}_{mode.replace(';', '')}.{form.lower()}": _picture(form, mode)
    for form in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
    for mode in (("RGB", "I;16") if form in ("PNG", "TIFF") else ("RGB",))
  }
  return {f"a/{name}" if i % 2 else f"b/{name}": x for i, (name, x) in enumerate(found.items())}


def _image_arrays() -> Files:
  rng = np.random.default_rng(2)
  return {
    "a/x.npy": _npy(rng.integers(0, 255, (5, 4, 3), np.uint8)),
    "b/y.npy": _npy(rng.normal(size=(5, 4)).astype(np.float32)),
  }


def _parquet() -> Files:
  rows = [{"bytes": _picture("PNG"), "path": f"{i}.png"} for i in range(4)]
  table = pa.table({"image": rows, "label": [0, 1, 0, 1]})
  kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
  table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})
  words = pa.table({"img": [_picture("JPEG")] * 3, "label": ["x", "y", "x"]})
  return {
    **_saved(lambda p: parquet.write_table(table, p, row_group_size=2), "train-0.parquet"),
    **_saved(lambda p: parquet.write_table(words, p), "test-0.parquet"),
  }


def _tarred(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=form) as archive:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return file.getvalue()


def _tar() -> Files:
  members = [("a/1.png", _picture("PNG")), ("a/1.cls", b"3"), ("a/2.jpg", _picture("JPEG"))]
  members += [("a/2.json", b'{"label": "cat"}'), ("a/" + "x" * 120 + ".png", _picture("PNG"))]
  return {
    "train-0.tar": _tarred(members),
    "train-1.tar": _tarred(members, tarfile.GNU_FORMAT),
  }


@functools.cache
def _config() -> ml_collections.ConfigDict:
  return resolving.resolve(configs.debug(configs.default("dino")), 64)


def _metrics() -> bytes:
  lines = []
  for step in range(1, 200, 9):
    line = {"step": step, "train/loss": 3.0 - step / 99, "train/ln_k": 3.4, "train/grad_norm": None}
    line |= {"non_finite": ["train/grad_norm"], "collapse/unique_0.025": 0.5, "probe/knn": 0.7}
    line |= {"collapse/unique_0.25": 0.5, "codes/used": 0.4, "time/img_per_s": 700.0}
    lines.append(json.dumps(line))
  return ("\n".join(lines) + "\n").encode()


def _npz(**arrays) -> bytes:
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def _result() -> bytes:
  measures = {"step": 199, "probe/knn": 0.7, "collapse/unique_0.025": 0.5, "name": "x"}
  protocol = {"name": "knn", "bank": {"data": "digits"}, "k": 20, "software": {"jax": "0"}}
  return json.dumps({"measures": measures, "protocol": protocol, "environment": {}}).encode()


def _run() -> Files:
  return {
    "metrics.jsonl": _metrics(),
    "config.json": json.dumps(_config().to_dict(), default=str).encode(),
    "eval/final/result.json": _result(),
    "eval/final/arrays.npz": _npz(counts=np.arange(9), similarity=np.linspace(0, 1, 9)),
    "eval/knn/result.json": _result(),
  }


def _resumed() -> Files:
  return {
    "config.json": json.dumps(_config().to_dict(), default=str).encode(),
    "env.json": b'{"host": "h", "resumed": []}',
    "eval/final/result.json": _result(),
    "metrics.jsonl": _metrics(),
  }


def _state() -> dict:
  return {"a": jax.numpy.ones((3, 2)), "b": jax.numpy.arange(4)}


@functools.cache
def _checkpoints() -> Files:
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(3, _state(), {"config": {}})
    checkpoints.close()
    paths = sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def _export() -> Files:
  info = {"weights": "teacher", "step": 3, "model": {"name": "vit"}}
  said = {"num": 4, "dim": 3, "tokens": "class", "place": "x", "scale": 1.0}
  info["prototypes"] = {"class": said}
  identity = json.dumps([info["weights"], info["step"], info["prototypes"]], sort_keys=True)
  plain = {"params.a": np.ones((2, 3), np.float32)}
  return {
    "encoder.safetensors": safetensors.numpy.save(plain, metadata={"info": json.dumps(info)}),
    "prototypes.safetensors": safetensors.numpy.save(
      {"class": np.ones((4, 3), np.float32)}, metadata={"of": identity}
    ),
  }


class Reader(NamedTuple):
  seeds: Callable[[], Files]
  read: Callable[[pathlib.Path], None]


READERS = {
  "pth_zip": Reader(lambda: _torch(legacy=False), _arrays),
  "pth_legacy": Reader(lambda: _torch(legacy=True), _arrays),
  "npz": Reader(lambda: {"x.npz": _npz(**_weights())}, _arrays),
  "npy": Reader(lambda: {"x.npy": _npy(_weights()["head.weight"])}, _arrays),
  "safetensors": Reader(lambda: {"x.safetensors": safetensors.numpy.save(_weights())}, _arrays),
  "parquet": Reader(_parquet, functools.partial(_images, "parquet")),
  "tar": Reader(_tar, functools.partial(_images, "tar")),
  "folder": Reader(_pictures, functools.partial(_images, "folder")),
  "folder_npy": Reader(_image_arrays, functools.partial(_images, "folder")),
  "log": Reader(_run, _page),
  "resume": Reader(_resumed, _resume),
  "result": Reader(lambda: {"result.json": _result()}, _results),
  "seal": Reader(_checkpoints, _sealed),
  "export": Reader(_export, _exported),
}


# Changes.

_NUMBERS = (0, 1, 2, -1, -2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64)
_VALUES = (
  *(None, True, -1, 0, 3, 2**31, 2**63, 10**400, 0.5, -1e308, 1e308, float("nan"), float("inf")),
  *("", "x", _TAG, "\x1b[2J", "\ud800", "../../../etc/passwd", "/dev/zero", "a\0b", "\n"),
  *(
    [],
    {},
    [1],
    [[]],
    {"": 1},
    [None],
    [-1],
    [2**62, 2**62],
    {"a": {"b": {}}},
    ["x"] * 99,
    "1" * 5000,
  ),
)


def _changed_json(value, rng: random.Random):
  """A JSON value in which one thing is another."""
  if isinstance(value, dict) and value and rng.random() < 0.85:
    key = rng.choice(list(value))
    kind = rng.random()
    if kind < 0.1:
      return {k: v for k, v in value.items() if k != key}
    if kind < 0.2:
      return value | {str(rng.choice(_VALUES)): value[key]}
    return value | {key: _changed_json(value[key], rng)}
  if isinstance(value, list) and value and rng.random() < 0.85:
    i = rng.randrange(len(value))
    return [*value[:i], _changed_json(value[i], rng), *value[i + 1 :]]
  return rng.choice(_VALUES)


def _json_bytes(text: bytes, rng: random.Random) -> bytes | None:
  """The same for the bytes of JSON, or of one line of it."""
  lines = text.split(b"\n")
  number = rng.randrange(len(lines)) if len(lines) > 2 else None
  try:
    value = json.loads(text if number is None else lines[number])
  except (ValueError, RecursionError):
    return None
  if rng.random() < 0.03:
    new = b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 50_000
  else:
    new = json.dumps(_changed_json(value, rng)).encode()
  if number is None:
    return new
  return b"\n".join([*lines[:number], new, *lines[number + 1 :]])


def _raw(content: bytes, rng: random.Random) -> bytes:
  """Bytes in which something is changed, without a look at what they are."""
  data = bytearray(content)
  if not data:
    return rng.randbytes(20)
  at = rng.randrange(len(data))
  kind = rng.randrange(9)
  if kind == 0:
    data[at] ^= 1 << rng.randrange(8)
  elif kind == 1:
    data[at] = rng.randrange(256)
  elif kind == 2:
    del data[at:]
  elif kind == 3:
    del data[at : at + rng.choice((1, 2, 8, 64))]
  elif kind == 4:
    data[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
  elif kind == 5:
    form = rng.choice("bBhHiIqQ")
    bits = struct.calcsize(form) * 8
    number = rng.choice(_NUMBERS) % 2**bits
    order = rng.choice("<>")
    data[at : at + bits // 8] = struct.pack(f"{order}{form.upper()}", number)
  elif kind == 6:
    end = at + rng.choice((4, 16, 100))
    to = rng.randrange(len(data))
    data[to:to] = data[at:end]
  elif kind == 7:
    data[at : at + rng.choice((1, 8, 64))] = bytes([rng.choice((0, 0xFF, 0x28, 0x5B))]) * 8
  else:  # numbers that are written as text
    digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if digits:
      i = rng.choice(digits)
      data[i : i + 1] = str(rng.choice(_NUMBERS)).encode()
  return bytes(data)


def _in_zip(content: bytes, rng: random.Random) -> bytes | None:
  """An archive one of whose members is changed, its sums right again."""
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      members = [(info.filename, archive.read(info)) for info in archive.infolist()]
  except Exception:
    return None
  if not members:
    return None
  i = rng.randrange(len(members))
  name, inside = members[i]
  if rng.random() < 0.1:
    name = rng.choice(("../" + name, "/" + name, name + "\0", "x" * 3000, _TAG + ".npy"))
  else:
    inside = _raw(inside, rng)
  members[i] = name, inside
  file = io.BytesIO()
  kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
  with warnings.catch_warnings(), zipfile.ZipFile(file, "w", kind) as archive:
    warnings.simplefilter("ignore")
    for name, inside in members:
      archive.writestr(name, inside)
  return file.getvalue()


def _in_header(content: bytes, rng: random.Random) -> bytes | None:
  """safetensors with other JSON in the header, its length right again."""
  size = int.from_bytes(content[:8], "little")
  if content[8:9] != b"{" or size > len(content):
    return None
  header = _json_bytes(content[8 : 8 + size], rng)
  return header and struct.pack("<Q", len(header)) + header + content[8 + size :]


def _in_tar(content: bytes, rng: random.Random) -> bytes | None:
  """A tar with another field in one header, its sum right again."""
  heads = [i for i in range(0, len(content) - 511, 512) if content[i + 257 : i + 262] == b"ustar"]
  if not heads:
    return None
  data, at = bytearray(content), rng.choice(heads)
  begin, end = rng.choice(((0, 100), (124, 136), (124, 136), (156, 157), (157, 257), (345, 500)))
  if (begin, end) == (124, 136):
    size = rng.choice((0, 1, -1, -512, -(2**40), 2**20, 2**33, 2**62))
    field = (size % 2**96).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
  elif (begin, end) == (156, 157):
    field = rng.choice(b"0123456789xgLKSDVANM\0").to_bytes(1, "big")
  else:
    field = rng.choice((b"../../x.png", b"/etc/x.png", b"\xff.png", b"a/1.png", b"", b"\0x.png"))
  data[at + begin : at + end] = field.ljust(end - begin, b"\0")
  data[at + 148 : at + 156] = b" " * 8
  data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
  return bytes(data)


def mutated(files: Files, seed: int) -> Files:
  """The files of a reader with one to four changes, always the same for a seed."""
  rng = random.Random(seed)
  files = dict(files)
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    name = rng.choice(list(files))
    content, change = files[name], None
    if rng.random() < 0.7:
      for knowing in (_json_bytes, _in_header, _in_tar, _in_zip):
        change = change or knowing(content, rng)
    files[name] = change or _raw(content, rng)
  return files


def attempt(reader: Reader, files: Files) -> None:
  """Reads these files in a folder of their own.

  Raises:
    Broken: if that ends in a way that it must not.
  """
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder).resolve()
    for name, content in files.items():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_bytes(content)
    with watched(root):
      reader.read(root)


def main() -> None:
  """See above."""
  parser = argparse.ArgumentParser()
  parser.add_argument("reader", choices=READERS)
  parser.add_argument("--seconds", type=float, default=60.0)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  warnings.simplefilter("ignore")
  logging.disable(logging.CRITICAL)
  reader, found, cases = READERS[args.reader], {}, 0
  files, begun, slowest = reader.seeds(), time.monotonic(), 0.0
  attempt(reader, files)
  seed = args.seed
  while time.monotonic() - begun < args.seconds:
    before = time.monotonic()
    if os.environ.get("HOSTILE_TRACE"):
      print(seed, file=sys.stderr, flush=True)
    try:
      attempt(reader, mutated(files, seed))
    except Broken as error:
      frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
      ours = [f for f in frames if "/protojax/" in f.filename] or frames
      key = (
        str(error).split(":")[0][:30],
        f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}",
      )
      found.setdefault(key, [seed, str(error), 0])[2] += 1
    slowest = max(slowest, time.monotonic() - before)
    cases, seed = cases + 1, seed + 1
  print(f"{args.reader}: {cases} cases, slowest {slowest:.2f} s, {len(found)} kinds of trouble")
  for (_, where), (seed, text, count) in found.items():
    print(f"  {where} x{count} seed {seed}: {text[:200]!r}")


if __name__ == "__main__":
  main()
