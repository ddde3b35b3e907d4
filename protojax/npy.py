"""NumPy's .npy, read as far as its own header allows: a small file never asks for much memory.

`numpy.load` believes the shape in the header before it has seen the numbers, and a damaged header
fails there in many ways.
"""

import math
import os
from typing import IO

import numpy as np

from protojax import files


class Objects(ValueError):
  """An array of Python objects, which only running code would read."""


def header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
  """(shape, whether in Fortran's order, dtype) of an .npy; the file then stands at its numbers.

  Raises:
    ValueError: if it is damaged, or the dtype is one of records.
  """
  begin = file.tell()
  try:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
      shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
      shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
      raise ValueError(f"version {version}")
  except Exception as error:  # it is parsed as Python, which fails in many ways
    file.seek(begin)
    if said := files.pointer(file.read(64)):
      raise ValueError(f"it is {said}") from None
    text = " ".join(str(error).split())[:100]
    raise ValueError(f"its header cannot be read: {type(error).__name__}: {text}") from None
  if dtype.hasobject:
    raise Objects("an array of Python objects")
  if dtype.names or dtype.subdtype or not dtype.itemsize or min(shape, default=0) < 0:
    raise ValueError(f"an array {list(shape)} of {dtype} is none of numbers")
  return shape, fortran, dtype


def _need(shape: tuple[int, ...], dtype: np.dtype, there: int) -> int:
  """Bytes of an array.

  Raises:
    ValueError: if they are more than are there.
  """
  needed = math.prod(shape) * dtype.itemsize
  if needed > there:
    raise ValueError(f"{needed} bytes were announced and {there} are there")
  return needed


def read(file: IO[bytes], size: int) -> np.ndarray:
  """The array, read-only, of a file of `size` bytes that stands at its beginning.

  Raises:
    Objects: for an array of Python objects.
    ValueError: if it is damaged.
  """
  shape, fortran, dtype = header(file)
  needed = _need(shape, dtype, size - file.tell())
  if not needed:
    return np.zeros(shape, dtype)
  array = np.frombuffer(file.read(needed), dtype)
  return array.reshape(shape, order="F" if fortran else "C")


def mapped(path: str | os.PathLike) -> np.ndarray:
  """The array of a file, read-only, whose numbers stay on the disk until they are looked at.

  Raises:
    as `read`; OSError.
  """
  with open(path, "rb") as file:
    shape, fortran, dtype = header(file)
    begin = file.tell()
  if not _need(shape, dtype, os.path.getsize(path) - begin):
    return np.zeros(shape, dtype)
  order = "F" if fortran else "C"
  return np.memmap(path, dtype, "r", begin, shape, order).view(np.ndarray)
