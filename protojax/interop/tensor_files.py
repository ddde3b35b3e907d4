"""Every array of a file by its name, whoever wrote it: PyTorch, safetensors or NumPy."""

import os
import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np
import safetensors

from protojax import errors, files, npy
from protojax.interop import torch_file

_SAFETENSORS = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "F8_E8M0": "float8_e8m0fnu",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U64": "uint64",
  "U32": "uint32",
  "U16": "uint16",
  "U8": "uint8",
  "BOOL": "bool",
  "C64": "complex64",
}
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".npy", ".npz")
_FORMATS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
_UNPACKED = 1 << 30  # bytes; more than this from a compressed file is more likely a bomb


def _read_safetensors(path):
  with safetensors.safe_open(path, framework="numpy") as opened:  # checks the whole header
    names = list(opened.keys())
  # The library would copy; a map leaves what is not looked at on the disk.
  raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
  start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
  header = files.parse_json(raw[8:start].tobytes())
  out = {}
  for name in names:
    begin, end = header[name]["data_offsets"]
    dtype = _SAFETENSORS.get(header[name]["dtype"])
    if dtype is None:
      raise ValueError(f"{name} has numbers of the kind {header[name]['dtype']}")
    out[name] = (
      raw[start + begin : start + end].view(jnp.dtype(dtype)).reshape(header[name]["shape"])
    )
  return out


def _read_npy(path):
  try:
    return npy.mapped(path)
  except npy.Objects:
    raise _objects(path, path.stem) from None


def _objects(path, name: str) -> errors.UserError:
  return errors.UserError(
    f"{path}: {name} holds Python objects (dtype object), not numbers, and reading them would run "
    "code: save it anew as numbers, array.astype(numpy.float32)"
  )


def _read_npz(path, raw):
  with zipfile.ZipFile(path) as archive:
    infos = archive.infolist()
    if sum(info.file_size for info in infos) > max(_UNPACKED, 8 * raw.size):
      raise ValueError("it would unpack to many times its size")
    out = {}
    for info in infos:
      name = info.filename.removesuffix(".npy")
      with archive.open(info) as file:
        try:
          out[name] = npy.read(file, info.file_size)
        except npy.Objects:
          raise _objects(path, name) from None
    return out


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Every array of a .pth, .pt, .ckpt, .safetensors, .npy or .npz, recognised by its content.

  Args:
    path: a file.

  Returns:
    {name: array} in the file's order; nested names are joined by dots, a lone array is called like
    the file. Read-only views of the mapped file, which cost nothing until they are read; only an
    .npz is read whole. bfloat16 and float8 as NumPy knows them through ml_dtypes.

  Raises:
    UserError: if there is no such file, it is damaged, none of these, or asks for code to be run.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    raise errors.UserError(f"{path} is a folder: give one of the files in it ({_FORMATS})")
  arrays = _read(path)
  if not all(name.isprintable() for name in arrays):  # they would move the cursor of a terminal
    raise errors.UserError(f"{path} is damaged: names of its arrays cannot be printed")
  return arrays


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    if path.stat().st_size == 0:
      raise ValueError("it is empty")
    raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
    if said := files.pointer(raw[:64].tobytes()):
      raise errors.UserError(f"{path} is {said}")
    if raw[:6].tobytes() == b"\x93NUMPY":
      return {path.stem: _read_npy(path)}
    if raw[8:9].tobytes() == b"{":
      return _read_safetensors(path)
    if zipfile.is_zipfile(path):
      with zipfile.ZipFile(path) as archive:
        if any(name.endswith(".npy") for name in archive.namelist()):
          return _read_npz(path, raw)
      return torch_file.read(path)
    if raw[:1].tobytes() == b"\x80":
      return torch_file.read(path)
    if raw[:4].tobytes() == b"PK\3\4":
      raise ValueError("its end is missing")
  except errors.UserError:
    raise
  except FileNotFoundError:
    raise errors.UserError(f"there is no file {path}") from None
  except OSError as error:
    raise errors.UserError(f"cannot read {path}: {error.strerror}") from None
  except MemoryError:
    raise errors.UserError(f"{path} needs more memory than there is") from None
  except Exception as error:  # a damaged file fails in any way there is
    raise errors.UserError(
      f"{path} is damaged ({errors.in_line(error)}): copy it again from where it comes"
    ) from None
  if path.suffix in SUFFIXES:
    raise errors.UserError(
      f"{path} is no checkpoint: called {path.suffix}, but its bytes are none of {_FORMATS}; copy "
      "it again from where it comes"
    )
  raise errors.UserError(f"{path} is none of {_FORMATS}: give a file of arrays")
