"""result.json: numbers beside everything that made them, and the comparison of two of them."""

import hashlib
import importlib.metadata
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np

from protojax import __version__, environment, errors, files, trees
from protojax.data import pipeline, sources

# Two results are alike if their protocols are, but for these parts: which model was judged (path,
# step, weights, method, prototypes, seed of the run) and by which versions on which devices.
MAY_DIFFER = ("model", "software")
_NAMED = 32  # images of a data set that are looked at to tell it from others


def content(index: np.ndarray, labels: np.ndarray) -> str:
  """A fingerprint of which images, in which order, with which labels: int [N] each.

  Images are known by their number in the data set, so equal fingerprints of two data sets with
  different names say nothing.
  """
  return _fingerprint(np.stack([index, labels]).astype("<i8").tobytes())


def names(source: sources.Source) -> str:
  """A fingerprint of a data set: its classes, and the names and sizes of some of its images.

  Wherever it lies. Copies of it in another compression have the same.
  """
  some = pipeline.spread(len(source), _NAMED).tolist()
  known = [
    (
      pathlib.PurePath(source.describe(i)).stem,
      None if isinstance(x, sources.CorruptImage) else x["size"],
    )
    for i, x in zip(some, source.read(some), strict=True)
  ]
  return _fingerprint(json.dumps([source.class_names, known]).encode())


def _fingerprint(content: bytes) -> str:
  return f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"


def software() -> dict[str, Any]:
  """Versions and devices that can move the last digits."""
  packages = ("jax", "jaxlib", "numpy", "scikit-learn", "scipy")
  return {
    "protojax": __version__,
    "devices": [d.device_kind for d in jax.devices()],
  } | {name: importlib.metadata.version(name) for name in packages}


def differences(before: dict, after: dict, skip: tuple[str, ...] = ()) -> list[str]:
  """Lists where two protocols differ: ["bank.images 1437 -> 512", ...], in the order of names.

  Args:
    before: a protocol.
    after: another.
    skip: names to leave out, with all below them.
  """
  old, new = trees.flat(before), trees.flat(after)
  names = sorted(
    k
    for k in old.keys() | new.keys()
    if old.get(k) != new.get(k)
    and not any(f"{k}.".startswith(f"{s}.") for s in skip)
    # Earlier results have no names, and may be of the same data set.
    and not (k.endswith(".names") and None in (old.get(k), new.get(k)))
  )
  return [f"{k} {_short(old.get(k))} -> {_short(new.get(k))}" for k in names]


def _short(value: Any) -> str:
  return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def require_free(path: pathlib.Path, protocol: dict) -> None:
  """Refuses to replace a result of another protocol, or of another model; a run may have moved.

  Args:
    path: of result.json; need not exist.
    protocol: what is about to be measured.

  Raises:
    UserError: if there is such a result.
  """
  if not path.exists():
    return
  # `protocol` as it would be read back: tuples become lists.
  changed = differences(
    read(path)["protocol"], json.loads(json.dumps(protocol)), skip=("software", "model.path")
  )
  if changed:
    raise errors.UserError(
      f"{path} holds a result made otherwise ({'; '.join(changed)}): move it away, or add "
      "--overwrite"
    )


def write(path: pathlib.Path, measures: dict, protocol: dict) -> None:
  """Writes result.json, whole or not at all.

  Args:
    path: its parents are made.
    measures: {name: number or name}.
    protocol: JSON.

  Raises:
    UserError: if it cannot be written.
  """
  result = {"measures": measures, "protocol": protocol, "environment": environment.describe()}
  files.write(path, json.dumps(result, indent=2, sort_keys=True, default=str) + "\n")


def read(path: pathlib.Path) -> dict:
  """Reads what `write` wrote.

  Raises:
    UserError: if there is no such file, or it is something else.
  """
  try:
    result = files.parse_json(path.read_text())
    if not isinstance(result["measures"], dict) or not isinstance(result["protocol"]["name"], str):
      raise TypeError
  except OSError as error:
    raise errors.UserError(f"cannot read {path}: {error.strerror}") from None
  except (ValueError, KeyError, TypeError):
    raise errors.UserError(
      f"{path} is not a result of protojax evaluate: make it again with --overwrite"
    ) from None
  return result


def _results(path: str, protocol: str) -> dict[str, dict]:
  """{protocol: result} of a result.json, or of what a workdir holds."""
  where = pathlib.Path(path).expanduser()
  if where.is_file() and where.suffix == ".json":
    result = read(where)
    return {result["protocol"]["name"]: result}
  root = folder(path)
  # Beside those of `protojax evaluate` lie what training measured, at its end and before it was
  # extended.
  of_training = re.compile(r"final|step_\d+")
  found = sorted(f for f in root.glob("*/result.json") if not of_training.fullmatch(f.parent.name))
  if not found:
    raise errors.UserError(
      f"there is no eval/*/result.json in {path}: run protojax evaluate --workdir={path} first"
    )
  return {f.parent.name: read(f) for f in found if protocol in ("all", f.parent.name)}


def folder(path: str) -> pathlib.Path:
  """Finds eval/ beside what was judged: in a workdir, or in the folder of exported weights."""
  where = pathlib.Path(path).expanduser()
  return (where.parent if where.is_file() else where) / "eval"


def compare(a: str, b: str, protocol: str = "all") -> list[str]:
  """Lines of a table with the measures of two results and their difference, b - a.

  Args:
    a: a workdir, or a result.json.
    b: another.
    protocol: which results of a workdir; "all" takes those that both have.

  Raises:
    UserError: if there is nothing to compare, or two protocols differ in more than `MAY_DIFFER`.
  """
  first, second = _results(a, protocol), _results(b, protocol)
  names = [name for name in first if name in second]
  if not names:
    raise errors.UserError(
      f"{a} and {b} have no protocol in common: {', '.join(first) or 'none'} there, "
      f"{', '.join(second) or 'none'} here: evaluate both with the same --protocol"
    )
  unlike = [
    f"{name}: {change}"
    for name in names
    for change in differences(first[name]["protocol"], second[name]["protocol"], MAY_DIFFER)
  ]
  if unlike:
    raise errors.UserError(
      f"{a} and {b} were not made alike, so their numbers say nothing together: {'; '.join(unlike)}"
    )
  lines = [
    f"only in {where}: {name}"
    for where, here, there in ((a, first, second), (b, second, first))
    for name in here
    if name not in there
  ]
  for name in names:
    old, new = first[name], second[name]
    # All else is equal here, so these are the parts that may differ.
    apart = differences(old["protocol"], new["protocol"])
    lines += [name, *(f"  {change}" for change in apart)]
    lines += [f"  {'':<36} {'A':>10} {'B':>10} {'B - A':>10}"]
    for key in sorted(old["measures"].keys() | new["measures"].keys()):
      x, y = old["measures"].get(key), new["measures"].get(key)
      numbers = all(isinstance(v, int | float) for v in (x, y))
      lines.append(
        f"  {key:<36} {show(x):>10} {show(y):>10} {f'{y - x:+.4f}' if numbers else '':>10}"
      )
  return lines


def show(value: Any) -> str:
  """A measure as a short text."""
  if value is None:
    return "-"
  if not isinstance(value, float):
    return str(value)
  return f"{value:.4f}" if value == 0.0 or abs(value) >= 1e-3 else f"{value:.1e}"
