"""The pickle inside a file of PyTorch, run with nothing that it could do harm with.

A pickle is a program: it may look up any function by name and call it. Here every name is looked up
on the lists below, nothing on them is a function of Python's or NumPy's own, and any other name
ends the reading. Tensors come out as descriptions of where their bytes are.
"""

import pickle
import re
from typing import Any, NamedTuple

import numpy as np

from protojax import errors

_STORAGES = {
  "Double": "float64",
  "Float": "float32",
  "Half": "float16",
  "BFloat16": "bfloat16",
  "Long": "int64",
  "Int": "int32",
  "Short": "int16",
  "Char": "int8",
  "Byte": "uint8",
  "Bool": "bool",
  "ComplexDouble": "complex128",
  "ComplexFloat": "complex64",
  "Untyped": "uint8",
}
DTYPES = {
  *_STORAGES.values(),
  "uint16",
  "uint32",
  "uint64",
  "float8_e4m3fn",
  "float8_e5m2",
  "float8_e4m3fnuz",
  "float8_e5m2fnuz",
  "float8_e8m0fnu",
}
# What a `_Call` does, by the names it goes under.
_CALLS = {
  ("torch._utils", "_rebuild_tensor"): "tensor",
  ("torch._utils", "_rebuild_tensor_v2"): "tensor",
  ("torch._utils", "_rebuild_tensor_v3"): "typed tensor",
  ("torch._utils", "_rebuild_parameter"): "first",
  ("torch._utils", "_rebuild_parameter_with_state"): "first",
  ("torch._tensor", "_rebuild_from_type_v2"): "subclass",
  ("torch", "Size"): "size",
  ("collections", "OrderedDict"): "dict",
  ("collections", "Counter"): "dict",
  ("collections", "defaultdict"): "empty dict",
  ("_codecs", "encode"): "bytes",
  ("numpy", "dtype"): "numpy dtype",
  ("numpy.core.multiarray", "_reconstruct"): "numpy array",
  ("numpy._core.multiarray", "_reconstruct"): "numpy array",
}
# Settings, schedules and numbers beside the weights: read as an object that does and keeps nothing.
_INERT = {
  "torch": ("Tensor", "device", "strided", "contiguous_format", "preserve_format"),
  "torch.nn.parameter": ("Buffer", "Parameter"),
  "numpy": ("ndarray",),
  "numpy.core.multiarray": ("scalar",),
  "numpy._core.multiarray": ("scalar",),
  "argparse": ("Namespace",),
  "functools": ("partial",),
  "copyreg": ("_reconstructor",),
  "copy_reg": ("_reconstructor",),
}
_INERT_BUILTINS = (
  "bool",
  "bytes",
  "bytearray",
  "complex",
  "dict",
  "float",
  "frozenset",
  "int",
  "list",
  "object",
  "range",
  "set",
  "slice",
  "str",
  "tuple",
  "xrange",
  "unicode",
  "long",
)
# Packages of settings; "pathlib" for itself and what is inside it, "pathlib2" not.
_INERT_PACKAGES = (
  "addict",
  "dataclasses",
  "datetime",
  "easydict",
  "enum",
  "fvcore",
  "hydra",
  "lightning",
  "lightning_fabric",
  "ml_collections",
  "mmcv",
  "mmengine",
  "omegaconf",
  "pathlib",
  "pytorch_lightning",
  "torch.optim",
  "typing",
  "uuid",
  "yacs",
)


class _Inert:
  """Stands for whatever is not an array: may be called, built, filled, and never does anything."""

  __slots__ = ()

  def __new__(cls, *unused, **unused_too):
    return object.__new__(_Inert)

  def __call__(self, *unused, **unused_too):
    return self

  def __setstate__(*unused):
    pass

  append = extend = add = update = __setitem__ = __setstate__


class _Dict(dict):
  """Of OrderedDict and the like, without the attributes a pickle may set on them."""

  __slots__ = ()
  __setstate__ = _Inert.__setstate__


class Storage(NamedTuple):
  """A run of bytes: `key` says which, `numel` of `dtype` is what the pickle claims it holds."""

  key: str
  dtype: str
  numel: int
  offset: int = 0  # in elements, of a view (older files)


class Tensor(NamedTuple):
  storage: Storage
  dtype: str
  offset: int  # like the strides in elements of dtype
  shape: tuple
  strides: tuple


class _NumpyDtype:
  __slots__ = ("dtype",)

  def __init__(self, name):
    # Plain numbers only: an object array would hold pointers.
    self.dtype = np.dtype(name) if re.fullmatch(r"[biufc]\d+", str(name)) else None

  def __setstate__(self, state):
    self.dtype = self.dtype and self.dtype.newbyteorder(state[1] if state[1] in "<>" else "=")


class NumpyArray:
  __slots__ = ("array",)

  def __init__(self):
    self.array = None

  def __setstate__(self, state):
    _, shape, dtype, fortran, raw = state
    if isinstance(dtype, _NumpyDtype) and dtype.dtype is not None:
      raw = raw.encode("latin1") if isinstance(raw, str) else raw  # str: from Python 2
      array = np.frombuffer(raw, dtype.dtype)
      self.array = array.reshape(shape, order="F" if fortran else "C")


class _Call(NamedTuple):
  """The only thing in a file that can be called to some effect; immutable, as a tuple is."""

  what: str

  def __call__(self, *args):
    match self.what:
      case "tensor":
        if len(args) > 6 and args[6]:
          raise ValueError("a tensor that is conjugated or negated on reading")
        return Tensor(args[0], args[0].dtype, *args[1:4])
      case "typed tensor":
        return Tensor(args[0], args[6], *args[1:4])
      case "first":
        return args[0]
      case "subclass":  # function, type, arguments, state
        return args[0](*args[2])
      case "size":
        return tuple(args[0])
      case "dict":
        return _Dict(*args)
      case "empty dict":
        return _Dict()
      case "bytes":  # how protocol 2 writes them
        return args[0].encode("latin1")
      case "numpy dtype":
        return _NumpyDtype(args[0])
      case "numpy array":
        return NumpyArray()


# The one in Python: the one in C allocates what a memo index of four bytes asks for.
class Unpickler(pickle._Unpickler):
  def __init__(self, file, path):
    super().__init__(file, encoding="latin1")
    self._path, self.storages = path, {}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in _CALLS:
      return _Call(_CALLS[module, name])
    if module in ("torch", "torch.storage") and name.removesuffix("Storage") in _STORAGES:
      return _STORAGES[name.removesuffix("Storage")]
    if module == "torch" and name in DTYPES:
      return name
    inside = (p for p in _INERT_PACKAGES if module == p or module.startswith(p + "."))
    builtin = module in ("builtins", "__builtin__") and name in _INERT_BUILTINS
    if builtin or name in _INERT.get(module, ()) or any(inside):
      return _Inert()
    raise errors.UserError(
      f"{self._path} refers to {printable(f'{module}.{name}')}, which is none of the names a file "
      "of weights needs, so nothing of it was run or read: if you trust where it comes from, load "
      "it with PyTorch and save only its state_dict"
    )

  def persistent_load(self, pid: Any) -> Storage:
    kind, dtype, key, _, numel = pid[:5]
    offset = 0
    if len(pid) > 5 and pid[5] is not None:  # storages that were parts of others
      _, offset, numel = pid[5]
    if kind != "storage" or dtype not in DTYPES or not counts((numel, offset)):
      raise pickle.UnpicklingError("not a storage")
    self.storages[str(key)] = dtype
    return Storage(str(key), dtype, numel, offset)


def printable(text: str) -> str:
  return "".join(c if c.isprintable() else "?" for c in text)[:120]


def counts(values) -> bool:
  return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)
