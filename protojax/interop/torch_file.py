"""Arrays of a `.pth`, `.pt` or `.ckpt` file, without PyTorch and without running what is in it.

`torch.save` writes a pickle, which `torch_pickle` reads, and storages, which are plain bytes: these
are mapped, not read. Two layouts: a zip archive (PyTorch 1.6 and later) and a row of pickles
followed by bytes (before).
"""

import io
import math
import os
import pathlib
import struct
import zipfile

import jax.numpy as jnp
import numpy as np

from protojax import errors
from protojax.interop import torch_pickle

_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_MOST_ENTRIES, _DEEPEST = 1_000_000, 64  # lists that hold one another need few bytes to be endless
# What Python says, beside EOFError, of a pickle whose bytes are at an end.
_CUT = {
  "index out of range",
  "pickle data was truncated",
  "pickle exhausted before end of frame",
}
_REPEATS = 1 << 20  # elements that a view with stride 0 may have beyond those that are stored


def _view(tensor: torch_pickle.Tensor, blobs: dict[str, np.ndarray]) -> np.ndarray:
  """The tensor as a view of its storage's bytes; ValueError if it reaches outside of them."""
  storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
  if not isinstance(storage, torch_pickle.Storage) or tensor.dtype not in torch_pickle.DTYPES:
    raise ValueError("a tensor without a storage")
  if not all(map(torch_pickle.counts, (shape, strides, (tensor.offset,)))):
    raise ValueError("a tensor whose shape is not made of numbers")
  width = jnp.dtype(storage.dtype).itemsize
  size = storage.numel * width
  blob = blobs[storage.key][storage.offset * width :][:size]
  if blob.size != size:
    raise ValueError(f"{size} bytes were announced and {blob.size} are there")
  dtype, count = jnp.dtype(tensor.dtype), math.prod(shape)
  if count > max(size // dtype.itemsize, _REPEATS):
    raise ValueError("a tensor is larger than its storage")
  if count == 0:
    return np.zeros(shape, dtype)
  steps = tuple(s * dtype.itemsize for s in strides)
  # Refuses whatever would reach outside of the buffer.
  return np.ndarray(shape, dtype, blob, tensor.offset * dtype.itemsize, steps)


def _flatten(tree, blobs: dict[str, np.ndarray], stem: str) -> dict[str, np.ndarray]:
  """{"teacher.head.last_layer.weight_v": array, ...}: paths joined by dots, `stem` for the root."""
  out, stack, entries = {}, [((), tree)], 0
  while stack:
    path, node = stack.pop()
    if isinstance(node, torch_pickle.Tensor | torch_pickle.NumpyArray):
      array = _view(node, blobs) if isinstance(node, torch_pickle.Tensor) else node.array
      name = ".".join(path) or stem
      if name in out:
        raise ValueError(f"two arrays are called {torch_pickle.printable(name)}")
      if array is not None:
        out[name] = array
    elif isinstance(node, dict | list | tuple) and not isinstance(node, torch_pickle.Storage):
      entries += len(node)
      if entries > _MOST_ENTRIES or len(path) > _DEEPEST:
        raise ValueError("lists or dictionaries without end")
      items = node.items() if isinstance(node, dict) else enumerate(node)
      stack += [((*path, str(k)), v) for k, v in items if isinstance(k, str | int)][::-1]
  return out


def member(raw: np.ndarray, info: zipfile.ZipInfo) -> np.ndarray:
  """uint8 view of an uncompressed member of a zip archive, itself a uint8 array.

  Raises:
    ValueError: if it is compressed, encrypted or not inside the archive.
  """
  if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
    raise ValueError(f"{torch_pickle.printable(info.filename)} is compressed or encrypted")
  signature, names, extra = struct.unpack_from("<4s22xHH", raw, info.header_offset)
  found = raw[info.header_offset + 30 + names + extra :][: info.file_size]
  if signature != b"PK\3\4" or found.size != info.file_size:
    raise ValueError(f"{torch_pickle.printable(info.filename)} ends outside of the file")
  return found


def _read_zip(path, raw):
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: info for info in archive.infolist()}
  roots = [n.removesuffix("data.pkl") for n in members if n.endswith("/data.pkl")]
  if len(roots) != 1:
    raise ValueError("there is no data.pkl in it")
  root = roots[0]
  if root + "constants.pkl" in members:
    raise errors.UserError(
      f"{path} is a TorchScript program, not a file of weights: load it with PyTorch and save its "
      "state_dict"
    )
  order = members.get(root + "byteorder")
  if order and member(raw, order).tobytes() != b"little":
    raise ValueError("its numbers are big-endian")
  tree = torch_pickle.Unpickler(io.BytesIO(member(raw, members[root + "data.pkl"])), path).load()
  prefix = root + "data/"
  inside = {n.removeprefix(prefix): i for n, i in members.items() if n.startswith(prefix)}
  return tree, {key: member(raw, info) for key, info in inside.items()}


def _read_legacy(path, raw):
  with open(path, "rb") as file:
    if torch_pickle.Unpickler(file, path).load() != _MAGIC:
      raise errors.UserError(
        f"{path} is a pickle that torch.save did not write: load it where it comes from and save "
        "its arrays by torch.save, safetensors or numpy.savez"
      )
    version, system = (torch_pickle.Unpickler(file, path).load() for _ in range(2))
    if version != _LEGACY_VERSION or not system.get("little_endian", True):
      raise ValueError("it is of another version, or its numbers are big-endian")
    unpickler = torch_pickle.Unpickler(file, path)
    tree, keys = unpickler.load(), torch_pickle.Unpickler(file, path).load()
    start = file.tell()
  blobs = {}
  for key in keys:
    (numel,) = struct.unpack_from("<Q", raw, start)
    size = numel * jnp.dtype(unpickler.storages[key]).itemsize
    blobs[key], start = raw[start + 8 :][:size], start + 8 + size
  return tree, blobs


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Every array of the file, by its path in the nested dictionaries and lists, joined by dots.

  Returns:
    {"teacher.head.last_layer.weight_v": array, ...}, views of the mapped file, read-only, in the
    order of the file; bfloat16 and float8 as NumPy knows them through ml_dtypes. Tensors that
    shared memory share it here. A file that is one tensor gives it under the file's own name.

  Raises:
    UserError: if the file is damaged, or refers to any function or class that is not needed to hold
      arrays; nothing of it is run in any case.
  """
  path = pathlib.Path(path)
  try:
    raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
    tree, blobs = (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path, raw)
    return _flatten(tree, blobs, path.stem)
  except (errors.UserError, OSError):
    raise
  except Exception as error:  # a damaged pickle fails in any way there is
    if isinstance(error, EOFError | struct.error) or str(error) in _CUT:
      raise errors.UserError(
        f"{path} is damaged: it ends in the middle, as a copy does that was cut short: copy it "
        "again from where it comes"
      ) from None
    raise errors.UserError(
      f"{path} is damaged or was not written by torch.save ({type(error).__name__}: "
      f"{torch_pickle.printable(str(error))}): copy it again from where it comes"
    ) from None
