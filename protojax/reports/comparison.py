"""Runs side by side, with the floors under them: a table for the terminal and one picture."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.figure
import numpy as np

from protojax import files
from protojax.reports import curves, numbers, record

_COLUMNS = ("unique .25", "unique .5", "used", "k-NN", "linear")
_NAME = 24  # characters of a row's name
_COLOURS = ("#0069a8", "#c94f00", "#00805c", "#a3327f", "#8a6d00", "#56636f")  # of the page
_MUTED = "#9a9a9a"
_DASHES = ("--", ":", "-.", (0, (5, 5)))


class _Row(NamedTuple):
  name: str
  values: tuple[float | None, ...]  # shares, one a column


def table(runs: Sequence[record.Record]) -> list[str]:
  """Says in lines of at most 80 columns what the runs ended with.

  A row a run: prototypes that are unique at cosine distance .25 and .5 and those that are used, as
  shares of K; k-NN and linear accuracy on the test images, and where they are on more images than
  the floors, below them those that the floors are to be compared with. Then what random
  prototypes, raw pixels and the untrained net have, once where the runs agree on it; and the
  verdict on each run. Runs that see images of different sizes come in parts, since their accuracies
  are not alike.

  Args:
    runs: from `record.read`, finished or not.
  """
  sizes = list(dict.fromkeys(run.pixels for run in runs))
  lines = []
  for size in sizes:
    some = [run for run in runs if run.pixels == size]
    heading = f"at {size or 'unknown'} px" * (len(sizes) > 1)
    lines += ["", f"{heading:<{_NAME}}" + "".join(f"{column:>11}" for column in _COLUMNS)]
    for row in [*(row for run in some for row in _of_run(run)), *_random(some), *_floors(some)]:
      cells = "".join(f"{_percent(value):>11}" for value in row.values)
      lines.append(f"{_short(row.name):<{_NAME}}{cells}")
  lines.append("")
  for run in runs:
    lines += textwrap.wrap(_said(run), 80, subsequent_indent="  ")
  return [
    *lines,
    "",
    "unique, used: share of the K prototypes that are no copies of each other at that",
    "cosine distance, and that are some image's nearest. k-NN, linear: test images.",
  ]


def _said(run: record.Record) -> str:
  """The verdict on a run."""
  _, label, sentence = numbers.verdict(run)
  return f"{_short(run.name)}: {label}" + f". {sentence}" * (label != "ok")


def _of_run(run: record.Record) -> list[_Row]:
  """A row, and one of the accuracies on the images of its floors where these are fewer."""
  found, tag = _latest(run), _tag(run)
  linear = found.get("probe/linear_fitted", found.get("probe/linear"))
  keys = (f"{tag}unique_0.25", f"{tag}unique_0.5", f"{tag}used")
  shares = [found.get(f"collapse/{key}", found.get(f"collapse/{key}_sample")) for key in keys]
  rows = [_Row(run.name, (*shares, found.get("probe/knn"), linear))]
  if (knn := found.get("floor/knn")) is not None:
    rows.append(_Row("  on the floors' images", (None,) * 3 + (knn, found.get("floor/linear"))))
  return rows


def _latest(run: record.Record) -> dict[str, float]:
  """The final measures, of an unfinished run the latest ones."""
  return run.measures(record.FINAL) or run.latest()


def _tag(run: record.Record) -> str:
  """Of the first of its sets of prototypes."""
  return next(iter(curves.sets([run])), "")


def _random(runs: Sequence[record.Record]) -> list[_Row]:
  """What random prototypes of the same number and dimension have, once where they are alike."""
  rows = {}
  for run in runs:
    keys = (f"collapse/{_tag(run)}unique_{distance}_random" for distance in ("0.25", "0.5"))
    values = tuple(_latest(run).get(key) for key in keys)
    if None not in values:
      rows.setdefault(tuple(round(value, 2) for value in values), (run.name, values))
  return [
    _Row(f"random, {name}" if len(rows) > 1 else "random prototypes", (*values, None, None, None))
    for name, values in rows.values()
  ]


def _floors(runs: Sequence[record.Record]) -> list[_Row]:
  """A row for every kind of floor, or for every run where they differ."""
  rows = []
  for kind, words in curves.FLOORS.items():
    pairs = {}
    for run in runs:
      found = run.latest() | run.measures(record.FINAL)
      pair = found.get(f"floor/knn_{kind}"), found.get(f"floor/linear_{kind}")
      if any(value is not None for value in pair):
        pairs.setdefault(pair, run.name)
    for pair, name in pairs.items():
      rows.append(_Row(f"{words}, {name}" if len(pairs) > 1 else words, (None,) * 3 + pair))
  return rows


def _percent(value: float | None) -> str:
  return "-" if value is None else numbers.written(value, "%")


def _short(name: str) -> str:
  return name if len(name) < _NAME else f"{name[: _NAME - 2]}…"


def draw(runs: Sequence[record.Record], path: pathlib.Path) -> None:
  """Draws the runs in the same four charts and writes them as a PNG.

  Uniqueness and use of the prototypes over the steps, k-NN accuracy with its floors, and how far
  each prototype is from the nearest other one at the end, beside random ones.

  Args:
    runs: from `record.read`, finished or not.
    path: the file to write.
  """
  figure = matplotlib.figure.Figure(figsize=(13, 7.5), layout="constrained")
  unique, used, knn, nearest = figure.subplots(2, 2).flat
  unique.set(title="Unique prototypes, % of K", xlabel="step", ylim=(-3, 103))
  used.set(title="Used prototypes, % of K", xlabel="step", ylim=(-3, 103))
  knn.set(title="k-NN accuracy on the test images, %", xlabel="step")
  nearest.set(title="Cosine distance to the nearest prototype, at the end", ylabel="prototypes")
  for number, run in enumerate(runs):
    colour = _COLOURS[number % len(_COLOURS)]
    tag = _tag(run)
    for distance, style in ((0.25, "--"), (0.5, "-")):
      step, share = run.curve(f"collapse/{tag}unique_{distance}")
      unique.plot(step, 100 * share, style, color=colour, label=f"{run.name}, at {distance}")
    step, share = run.curve(f"collapse/{tag}used_sample")
    used.plot(step, 100 * share, color=colour, label=f"{run.name}, by the sample")
    step, share = run.curve("probe/knn")
    knn.plot(step, 100 * share, "o-", color=colour, label=run.name)
    if "nearest" in run.arrays:
      bins = np.linspace(0, max(1.0, float(run.arrays["nearest_random"].max())), 60)
      if not nearest.patches:
        nearest.hist(run.arrays["nearest_random"], bins, color=_MUTED, label="random, same K and D")
      nearest.hist(run.arrays["nearest"], bins, color=colour, alpha=0.6, label=run.name)
  for row in _random(runs):
    unique.axhline(100 * row.values[1], color=_MUTED, label=f"{row.name}, at 0.5", zorder=0)
  for number, row in enumerate(row for row in _floors(runs) if row.values[3] is not None):
    knn.axhline(100 * row.values[3], color=_MUTED, linestyle=_DASHES[number % 4], label=row.name)
  for axis in (unique, used, knn, nearest):
    axis.spines[["top", "right"]].set_visible(False)
    if axis.has_data():
      axis.legend(frameon=False, fontsize="small")
  files.write(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
