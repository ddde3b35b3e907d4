"""What two runs left, compared: to the bit, or how far they are apart."""

import collections
import hashlib
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

_ENCODER = re.compile("/(?:backbone|head)/")  # what the name of an encoder's array goes on with


def state_of(run: pathlib.Path) -> dict[str, np.ndarray]:
  """{leaf: array} of a run's newest checkpoint, on the host."""
  from protojax.training import checkpoint

  return checkpoint.on_host(run)


def records_of(run: pathlib.Path) -> dict[tuple[int, str], Any]:
  """{(step, name): number} of metrics.jsonl, without times."""
  records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return {
    (record["step"], name): value
    for record in records
    for name, value in record.items()
    if name != "step" and not name.startswith("time/")
  }


def files_of(run: pathlib.Path) -> dict[str, str]:
  """{file: SHA-256} of what a run exports."""
  paths = sorted(path for path in (run / "exported").rglob("*") if path.is_file())
  return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def _digest(x: np.ndarray) -> str:
  head = f"{x.dtype}{list(x.shape)}".encode()
  return hashlib.sha256(head + np.ascontiguousarray(x).tobytes()).hexdigest()


def differences(whole: pathlib.Path, other: pathlib.Path) -> tuple[list[str], str]:
  """What two runs left, compared to the bit.

  Returns:
    (the names of what differs or is in one alone, how much was compared).
  """
  sides = []
  for run in (whole, other):
    state = {f"state {name}": _digest(x) for name, x in state_of(run).items()}
    records = {f"{name} of step {step}": v for (step, name), v in records_of(run).items()}
    sides.append((state, records, files_of(run)))
  wrong = [
    name
    for one, two in zip(*sides, strict=True)
    for name in sorted(one.keys() | two.keys())
    if one.get(name) != two.get(name)
  ]
  counts = [len(part) for part in sides[0]]
  said = "{:,} arrays of the state, {:,} numbers of the log, {} exported files".format(*counts)
  return wrong, said


def largest(whole: pathlib.Path, other: pathlib.Path) -> tuple[float, str]:
  """(difference, of what) where two runs that ought to be equal up to rounding are furthest apart.

  Compared as vectors, |a - b| / |a| in the 2-norm, are the parts of the state: all parameters of an
  encoder together, and so its moments and statistics; each other array by itself; and the loss of
  all steps. Not an encoder's arrays one by one: a bias before a batch norm has a gradient that is
  nothing but rounding, of which Adam makes whole steps, and no output of the network shows it.
  """
  sides = []
  for run in (whole, other):
    parts = collections.defaultdict(list)
    for name, x in sorted(state_of(run).items()):
      if np.issubdtype(x.dtype, np.floating):
        parts[_ENCODER.split(name)[0]].append(x.astype(np.float64).ravel())
    for (_, name), value in sorted(records_of(run).items()):
      if name == "train/loss":
        parts["the loss in metrics.jsonl"].append(np.array([value], np.float64))
    sides.append({name: np.concatenate(found) for name, found in parts.items()})
  one, two = sides
  found = [(0.0, "none")]
  for name in one.keys() | two.keys():
    if name not in one or name not in two or one[name].shape != two[name].shape:
      return math.inf, f"{name}, which is of another shape or in one run alone"
    length = max(float(np.linalg.norm(one[name])), 1e-12)
    found.append((float(np.linalg.norm(one[name] - two[name])) / length, name))
  return max(found)
