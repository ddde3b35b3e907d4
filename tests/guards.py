"""Numbers of compiled steps that are stored in guards.json, and the comparison with them.

After a change that is meant to change them, one command writes them anew:

    PROTOJAX_WRITE_GUARDS=1 PROTOJAX_TEST_ALL=1 python -m pytest -n 0 tests -k as_stored

where libtpu is installed (pip install -e ".[plan]"), those of the TPU too; without it they stay.
"""

import importlib.metadata
import json
import os
import pathlib

import pytest

from protojax import files
from protojax.planning import compiled, counting

_FILE = pathlib.Path(__file__).with_suffix(".json")
_CLOSE = 0.10


def numbers(memory: compiled.Memory, counts: counting.Counts) -> dict:
  """What is kept of a step: operations, bytes, the peak, [times, bytes] of each kind of message."""
  messages: dict[str, list[int]] = {}
  for one in counts.collectives:
    entry = messages.setdefault(one.kind, [0, 0])
    entry[0] += one.times
    entry[1] += one.times * one.bytes
  return {
    "flops": {name: round(flops) for name, flops in sorted(counts.flops.items())},
    "bytes": round(counts.bytes),
    "peak": memory.peak,
    "messages": dict(sorted(messages.items())),
  }


def split(places: dict[str, str]) -> dict[str, str]:
  """Of the placement of a state the leaves that do not lie whole on every device."""
  return {path: place for path, place in sorted(places.items()) if place}


def is_stored(key: str) -> bool:
  return _FILE.exists() and key in json.loads(_FILE.read_text())


def check(key: str, found: dict, *packages: str) -> None:
  """Compares with what is stored: text to the letter, numbers to a tenth.

  Skips the test where other versions of `packages` compiled what is stored: they compile otherwise.
  """
  stored = json.loads(_FILE.read_text()) if _FILE.exists() else {}
  versions = {name: importlib.metadata.version(name) for name in packages}
  if os.environ.get("PROTOJAX_WRITE_GUARDS"):
    files.write_json(_FILE, stored | {key: {"versions": versions} | found})
    return
  expected = dict(stored.get(key, {}))
  assert expected, f"{key} is not in {_FILE.name}: write it with the command of tests/guards.py"
  if (by := expected.pop("versions")) != versions:
    pytest.skip(f"{_FILE.name} was written with {by}")
  apart = list(_apart(expected, found, key))
  assert not apart, "\n".join([*apart, "meant so? the command of tests/guards.py writes it anew"])


def _apart(expected, found, where):
  """A line for each number or text that is not as expected."""
  if isinstance(expected, dict) and isinstance(found, dict):
    for name in sorted({*expected, *found}):
      yield from _apart(expected.get(name), found.get(name), f"{where} / {name}")
  elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
    for place, pair in enumerate(zip(expected, found, strict=True)):
      yield from _apart(*pair, f"{where} [{place}]")
  elif isinstance(expected, int) and isinstance(found, int):
    if abs(found - expected) > _CLOSE * abs(expected):
      yield f"{where}: {found:,}, stored {expected:,}"
  elif expected != found:
    yield f"{where}: {found}, stored {expected}"
