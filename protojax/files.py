"""Files written whole or not at all, and JSON read line by line."""

import errno
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from protojax import errors

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ESTALE)


def trouble(error: OSError) -> tuple[str, str] | None:
  """(what is wrong with a disk, what to do about it), or None of an error that is no disk's."""
  if error.errno in _FULL:
    return "no space left on device", "free some space"
  if error.errno in _REFUSED:
    return os.strerror(error.errno), "mend it"
  return None


def write(path: str | os.PathLike, content: str | bytes | Callable[[pathlib.Path], object]) -> None:
  """Writes a file beside its place and moves it there when it is whole; makes its folder.

  Args:
    path: of the file; what was there stays until the new one is whole.
    content: text (UTF-8), bytes, or what writes the file at the path it is given.

  Raises:
    UserError: if it cannot be written there.
    OSError: if the disk is full; `cli.guarded` says so in one line.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + ".tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
      content(temporary)
    else:
      temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())  # a power cut must not leave the name with nothing behind it
    os.replace(temporary, path)
  except OSError as error:
    if error.errno in _FULL:
      raise
    raise errors.UserError(
      f"cannot write to {path}: {error.strerror}: mend it or choose another place"
    ) from None
  finally:
    if temporary.is_file():
      temporary.unlink()


def write_json(path: str | os.PathLike, content: object) -> None:
  """Writes JSON as `write` does, keys sorted; what JSON does not know becomes its `str`."""
  write(path, json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


_POINTER = b"version https://git-lfs.github.com/spec/"


def pointer(start: bytes) -> str:
  """Says of a file that begins so that it only points at another, and what to do; "" of others."""
  if not start.startswith(_POINTER):
    return ""
  return "a pointer of Git LFS, not the file it stands for: run git lfs pull where it was cloned"


_DEEPEST = 100  # lists within lists of JSON; Python's own limit depends on who reads it


def _number(digits: str) -> int | float:
  """An integer; infinite, as 1e999 is, where no float is as large."""
  value = int(digits)
  if abs(value) <= sys.float_info.max:
    return value
  return math.inf if value > 0 else -math.inf


def parse_json(text: str | bytes, parse_int: Callable[[str], Any] = int) -> Any:
  """What JSON says, of a file that anybody may have written.

  Args:
    text: of the file.
    parse_int: what becomes of the digits of an integer.

  Raises:
    ValueError: if it is none, lists hold one another without end, or a string is no text.
  """
  try:
    value = json.loads(text, parse_int=parse_int)
  except RecursionError:
    raise ValueError("lists without end") from None
  text = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
  if text.count("[") + text.count("{") > _DEEPEST:
    level = [value]
    for _ in range(_DEEPEST):
      inside = [x for x in level if isinstance(x, dict | list) and x]
      level = [y for x in inside for y in (x.values() if isinstance(x, dict) else x)]
    if any(isinstance(x, dict | list) for x in level):
      raise ValueError("lists without end")
  if "\\ud" in text.lower():  # half a character of two, which no file takes
    json.dumps(value, ensure_ascii=False).encode()
  return value


def json_lines(path: str | os.PathLike) -> tuple[list[dict], list[str]]:
  """The lines of a file that are JSON objects, in their order, and the others as they are.

  Bytes that are no UTF-8 are replaced, so that a torn line is one of the others. Integers that are
  larger than any float are infinite.

  Raises:
    OSError: if the file cannot be read.
  """
  records, others = [], []
  text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
  for line in text.splitlines():
    try:
      record = parse_json(line, _number)
    except ValueError:
      record = None
    if isinstance(record, dict):
      records.append(record)
    else:
      others.append(line)
  return records, others
