"""What a run left in its workdir, read back: curves, results, arrays and settings."""

import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from protojax import config as configs
from protojax import errors, files, sizes, trees
from protojax.metrics import rules, verdicts

METRICS, FINAL, ARRAYS = "metrics.jsonl", "eval/final/result.json", "eval/final/arrays.npz"
AT_THE_END = ("probe/linear_fitted",)
_STEPS = 1 << 53  # more has no run, and not every float says exactly
_JUDGED = 300  # lines of a run, spread over it, that `verdict` judges
Curve = tuple[np.ndarray, np.ndarray]  # steps int [n], ascending; values float [n]


class Record(NamedTuple):
  """What the files of a run say; what is missing is empty.

  Attributes:
    name: of the run among those read with it.
    folder: its workdir.
    config: resolved settings, of the version that wrote them.
    curves: {name in metrics.jsonl: (steps int [n], values float [n])}; NaN where a value was not
      finite.
    results: {"eval/final/result.json": its content, ...}, one entry an evaluation.
    arrays: those of eval/final/arrays.npz, see `evaluation.Snapshot.final`.
    notes: one sentence for every file that could not be read in full.
  """

  name: str
  folder: pathlib.Path
  config: ml_collections.ConfigDict
  curves: dict[str, Curve]
  results: dict[str, dict]
  arrays: dict[str, np.ndarray]
  notes: tuple[str, ...]

  @property
  def step(self) -> int:
    """The step of the final measures, or of the last line of metrics.jsonl."""
    final = self.measures(FINAL).get("step")
    if final is not None:
      return int(final)
    return max((int(steps[-1]) for steps, _ in self.curves.values()), default=0)

  @property
  def pixels(self) -> str | None:
    """Size of the images that the run is judged on, "32"; None where its config does not say."""
    try:
      return sizes.text(self.config.augment.global_size)
    except (AttributeError, KeyError, TypeError, ValueError):
      return None

  def curve(self, key: str) -> Curve:
    """Steps and values of one metric where they are finite; none if it was not written."""
    steps, values = self.curves.get(key, (np.zeros(0), np.zeros(0)))
    finite = np.isfinite(values)
    return steps[finite], values[finite]

  def measures(self, file: str) -> dict[str, float]:
    """{name: number} of one of `results`, nested names joined by dots; {} if it is not there."""
    measures = trees.flat(self.results.get(file, {}).get("measures", {}))
    return {key: _finite(value) for key, value in measures.items() if _is_number(value)}

  def latest(self) -> dict[str, float]:
    """The last value of every metric, {name: value}: all that is known of an unfinished run.

    What is measured at the end alone is left out where the run has gone on since.
    """
    latest = max((int(steps[-1]) for steps, _ in self.curves.values()), default=0)
    return {
      key: float(values[-1])
      for key, (steps, values) in self.curves.items()
      if key not in AT_THE_END or int(steps[-1]) == latest
    }

  def taken(self, key: str) -> int | None:
    """The step of a number of `latest`; None if it is of `step`, or a floor."""
    steps, _ = self.curves[key]
    at = int(steps[-1])
    return None if at == self.step or key.startswith("floor/") else at


def read(folders: Sequence[pathlib.Path]) -> list[Record]:
  """Reads the runs in these workdirs, finished or not.

  Raises:
    UserError: if one of them holds no run or is given twice.
  """
  if len({folder.resolve() for folder in folders}) < len(folders):
    raise errors.UserError("the same workdir is given twice: give each run once")
  names = [folder.absolute().name for folder in folders]
  return [
    _read(folder, name if names.count(name) == 1 else str(folder))
    for folder, name in zip(folders, names, strict=True)
  ]


def _read(folder: pathlib.Path, name: str) -> Record:
  if not folder.is_dir() or not ((folder / METRICS).exists() or (folder / FINAL).exists()):
    raise errors.UserError(
      f"workdir={folder} holds no run of protojax ({METRICS} is missing): give the folder that "
      "protojax train --workdir wrote"
    )
  notes = []
  curves = _curves(folder / METRICS, notes)
  results = {}
  for path in sorted(folder.glob("eval/*/result.json")):
    content = _json(path, folder, notes)
    if content and not isinstance(content.get("measures", {}), dict):
      notes.append(f"{path.relative_to(folder).as_posix()} was left out: it has no measures.")
    elif content:
      results[path.relative_to(folder).as_posix()] = content
  config = _config(folder, notes)
  return Record(name, folder, config, curves, results, _arrays(folder, notes), tuple(notes))


def _config(folder: pathlib.Path, notes: list[str]) -> ml_collections.ConfigDict:
  content = _json(folder / "config.json", folder, notes)
  try:
    return ml_collections.ConfigDict(content)
  except ValueError:  # a name with a dot in it
    notes.append("config.json was left out: it holds a name that no setting has.")
    return ml_collections.ConfigDict()


def _json(path: pathlib.Path, folder: pathlib.Path, notes: list[str]) -> dict:
  try:
    content = files.parse_json(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
      return content
    problem = "it is not an object"
  except (OSError, ValueError) as error:
    problem = getattr(error, "strerror", None) or "it is not JSON"
  notes.append(f"{path.relative_to(folder).as_posix()} was left out: {problem}.")
  return {}


def _arrays(folder: pathlib.Path, notes: list[str]) -> dict[str, np.ndarray]:
  path = folder / ARRAYS
  if not path.exists():
    return {}
  try:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
      return {key: arrays[key] for key in arrays.files if arrays[key].dtype.kind in "iuf"}
  except Exception:  # a damaged archive raises almost anything
    notes.append(f"{ARRAYS} was left out: it is damaged.")
    return {}


def _curves(path: pathlib.Path, notes: list[str]) -> dict[str, Curve]:
  """Of equal steps the latest line counts; going back, a line replaces all from its step on."""
  points: dict[str, dict[int, float]] = {}
  newest = -1
  try:
    lines, others = files.json_lines(path)
  except OSError as error:
    notes.append(f"{METRICS} was left out: {error.strerror}.")
    return {}
  torn = len(others)
  for line in lines:
    try:
      step = int(line.pop("step"))
      if not 0 <= step < _STEPS:
        raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError):
      torn += 1
      continue
    if step < newest:  # a run that went on from an earlier checkpoint
      points = {k: {s: v for s, v in p.items() if s < step} for k, p in points.items()}
    newest = step
    for key, value in line.items():
      if value is None or _is_number(value):
        points.setdefault(key, {})[step] = math.nan if value is None else float(_finite(value))
  if torn:
    notes.append(f"{torn} unreadable line{'s' * (torn > 1)} of {METRICS} left out.")
  return {key: (np.array(list(p)), np.array(list(p.values()))) for key, p in points.items() if p}


def _is_number(value) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: float) -> float:
  """The number, or NaN where no float is as large."""
  return value if abs(value) <= sys.float_info.max else math.nan


class RunVerdict(NamedTuple):
  """The verdict on a run while it was trained.

  Attributes:
    verdict: on the latest measures.
    step: of the last line of metrics.jsonl.
    since: step since which every line that was judged has had this verdict.
  """

  verdict: rules.Verdict
  step: int
  since: int


def verdict(folder: pathlib.Path) -> RunVerdict | None:
  """Judges a run by its metrics.jsonl; None before it has written a line.

  Raises:
    UserError: if its settings or metrics cannot be read.
  """
  found = None
  for step, now in history(folder, most=_JUDGED):
    same = found is not None and found.verdict.label == now.label
    found = RunVerdict(now, step, found.since if same else step)
  return found


def history(folder: pathlib.Path, most: int | None = None) -> Iterator[tuple[int, rules.Verdict]]:
  """Judges a run at every line of its metrics.jsonl, by what was known then: (step, verdict).

  Args:
    folder: workdir.
    most: lines that are judged, spread over the run and the last among them; None: all.

  Raises:
    UserError: if its settings or metrics cannot be read.
  """
  config = configs.of_run(folder)
  try:
    lines, _ = files.json_lines(folder / METRICS)
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{folder / METRICS} cannot be read ({type(error).__name__}): give the workdir of a run"
    ) from None
  lines = [line for line in lines if isinstance(line.get("step"), int)]
  known, measured = {}, None
  every = max(1, len(lines) // (most or len(lines) or 1))
  for i, line in enumerate(lines):
    said = line.get("non_finite")
    names = [n for n in said if isinstance(n, str)] if isinstance(said, list) else []
    lost = dict.fromkeys(names, math.nan)
    known = {k: v for k, v in known.items() if k not in AT_THE_END}  # an extended run's first end
    known |= {k: v for k, v in line.items() if isinstance(v, int | float)} | lost
    if any(k.startswith("collapse/") for k in line):
      measured = line["step"]
    if i % every == 0 or i == len(lines) - 1:
      # As of the step that the measures are of: early ones do not age.
      step = line["step"] if measured is None else measured
      yield line["step"], verdicts.of_run(known, config=config, step=step)
