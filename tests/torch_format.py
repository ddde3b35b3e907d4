"""Writes what `torch.save` writes, and what it never would; PyTorch is not needed."""

import io
import pickle
import struct
import zipfile
from typing import NamedTuple

import numpy as np

_STORAGE = {
  "float64": "Double",
  "float32": "Float",
  "float16": "Half",
  "bfloat16": "BFloat16",
  "int64": "Long",
  "int32": "Int",
  "uint8": "Byte",
  "bool": "Bool",
}


class Global(NamedTuple):
  """A function or class by its name."""

  module: str
  name: str


class Call(NamedTuple):
  function: Global
  args: tuple


class Build(NamedTuple):
  """An object whose state is set."""

  of: object
  state: object


class Storage(NamedTuple):
  """A persistent id, for `numel` numbers of the storage `key`."""

  dtype: str
  key: str
  numel: int


class Raw(NamedTuple):
  """Opcodes as they are."""

  code: bytes


def tensor(storage, offset, shape, strides):
  """The call that makes a tensor of a storage."""
  hooks = Call(Global("collections", "OrderedDict"), ())
  args = (storage, offset, tuple(shape), tuple(strides), False, hooks)
  return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)


def encode(value) -> bytes:
  """Opcodes of protocol 2 that leave `value` on the stack."""
  match value:
    case Raw(code):
      return code
    case Global(module, name):
      return f"c{module}\n{name}\n".encode()
    case Call(function, args):
      return encode(function) + encode(tuple(args)) + b"R"
    case Build(of, state):
      return encode(of) + encode(state) + b"b"
    case Storage(dtype, key, numel):
      kind = Global("torch", _STORAGE[dtype] + "Storage")
      return encode(("storage", kind, key, "cpu", numel)) + b"Q"
    case dict():
      return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
    case tuple():
      return b"(" + b"".join(map(encode, value)) + b"t"
    case list():
      return b"](" + b"".join(map(encode, value)) + b"e"
    case bytes():  # of protocol 3
      return b"B" + struct.pack("<I", len(value)) + value
    case _:  # numbers, text, None
      return pickle.dumps(value, 2)[2:-1]


def _with_storages(value, storages: dict[str, bytes]):
  """`value` with tensors for arrays; those that are views share the storage of their base."""
  if isinstance(value, np.ndarray):
    base = value if value.base is None else value.base
    key = next((k for k, known in storages.items() if known is base), None)
    if key is None:
      storages[key := str(len(storages))] = base
    offset = value.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    width = value.dtype.itemsize
    return tensor(
      Storage(value.dtype.name, key, base.size),
      offset // width,
      value.shape,
      [s // width for s in value.strides],
    )
  if isinstance(value, dict):
    return {k: _with_storages(v, storages) for k, v in value.items()}
  if type(value) in (list, tuple):
    return type(value)(_with_storages(v, storages) for v in value)
  return value


def save(path, value, *, legacy=False, compression=zipfile.ZIP_STORED, extra=()):
  """Writes nested dictionaries and lists with arrays in them, in either layout.

  Args:
    path: file.
    value: arrays become tensors, the other classes of this module what they stand for.
    legacy: as before PyTorch 1.6.
    compression: of the zip archive.
    extra: (name, bytes) of further members or of some that come instead.
  """
  storages: dict[str, np.ndarray] = {}
  code = b"\x80\x02" + encode(_with_storages(value, storages)) + b"."
  if legacy:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    with open(path, "wb") as file:
      for part in head:
        file.write(pickle.dumps(part, 2))
      file.write(code + pickle.dumps(list(storages), 2))
      for base in storages.values():
        file.write(struct.pack("<q", base.size) + base.tobytes())
    return
  members = {"archive/data.pkl": code, "archive/byteorder": b"little"}
  members |= {f"archive/data/{key}": base.tobytes() for key, base in storages.items()}
  content = io.BytesIO()
  with zipfile.ZipFile(content, "w", compression) as archive:
    for name, data in (members | dict(extra)).items():
      archive.writestr(name, data)
  path.write_bytes(content.getvalue())
