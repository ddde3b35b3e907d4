"""Which charts a report shows, and from which numbers; several runs share every chart."""

import re
from collections.abc import Sequence

import numpy as np

from protojax.metrics import measures as table
from protojax.reports import charts
from protojax.reports import record as records

_BINS = 48
# {end of "floor/knn_NAME": in words}; see `evaluation.Snapshot.floors`.
FLOORS = {"pixels": "raw pixels", "untrained": "untrained net", "start": "weights at the start"}
_FLOOR = 1e-7  # of the largest eigenvalue; below it is the noise of float32


def sets(runs: Sequence[records.Record]) -> list[str]:
  """Tags of the prototype sets that were measured: "" for the main one, "patch_" of iBOT, ..."""
  keys = {key for run in runs for key in (*run.curves, *run.measures(records.FINAL))}
  found = (re.fullmatch(r"collapse/(.*)unique_0\.025", key) for key in keys)
  return sorted(match[1] for match in found if match)


def training(runs: Sequence[records.Record]) -> list[str]:
  """Draws loss, target entropy, accuracies, rank and spread over the steps: <figure> elements."""
  loss, parts = _lines(runs, "train/loss"), _lines(runs, "train/cross_entropy")
  if parts:
    loss = [line._replace(label=f"{line.label}, loss") for line in loss] + [
      line._replace(label=f"{line.label}, cross entropy", reference=True) for line in parts
    ]
  chance = _reference(runs, "train/ln_k", "ln K")
  told = "mean since the line before" + "; dashed in colour: the cross entropy alone" * bool(parts)
  told += "; dashed: ln K, uniform predictions" * bool(chance)
  entropy = _lines(runs, "train/target_entropy")
  most = "nats" + "; dashed: ln K, its largest value" * bool(chance)
  share = {"scale": charts.PERCENT}
  return [
    _over_steps(runs, "Loss", [*loss, *chance], told),
    _over_steps(runs, "Entropy of the targets", [*entropy, *chance] if entropy else [], most),
    _over_steps(
      runs,
      "k-NN accuracy",
      _with_floors(runs, "probe/knn", "knn"),
      "on the test images, protocol in the table above; dashed: without training",
      **share,
    ),
    _over_steps(
      runs,
      "Linear accuracy, online",
      _with_floors(runs, "probe/linear", "linear"),
      "on the test images; classifier trained beside the encoder; dashed: without training",
      **share,
    ),
    *(_measure(runs, row, "") for row in table.MEASURES if row.title and not row.of_sets),
  ]


def prototypes(runs: Sequence[records.Record], tag: str) -> list[str]:
  """Draws uniqueness, use and drift of a prototype set over the steps: <figure> elements."""
  return [_measure(runs, row, tag) for row in table.MEASURES if row.title and row.of_sets]


def _measure(runs: Sequence[records.Record], row: table.Measure, tag: str) -> str:
  """The curves of a measure: of a sample of the images where there are any, else of the bank."""
  key, told = f"collapse/{tag}{row.name}", row.meaning
  if any(f"{key}_sample" in run.curves for run in runs):
    key, told = f"{key}_sample", f"{told}; of a fixed sample of images"
  lines = _lines(runs, key)
  random = _reference(runs, f"{key}_random", "random") if lines else []
  told += "; dashed: random prototypes, same K and D" * bool(row.has_random or random)
  options = {"scale": charts.PERCENT, "y_range": (0.0, 1.03)} if row.is_share else {}
  return _over_steps(runs, row.title, [*lines, *random], told, **options)


def ends(runs: Sequence[records.Record]) -> list[str]:
  """Draws distances, use and spectrum at the end of the runs: <figure> elements."""
  return [_nearest(runs), _usage(runs), _spectrum(runs)]


def _nearest(runs) -> str:
  top = max((_finite(run, "nearest").max(initial=1.0) for run in runs), default=1.0)
  top = max([top, *(_finite(run, "nearest_random").max(initial=1.0) for run in runs)])
  bins = np.linspace(0.0, top, _BINS + 1)
  lines = []
  for key, label, reference in (
    ("nearest_random", "random", True),
    ("nearest", "this run", False),
  ):
    for i, run in enumerate(runs):
      values = _finite(run, key)
      if len(values):
        share = np.append(np.histogram(values, bins)[0] / len(values), 0.0)
        colour = None if reference and len(runs) == 1 else i
        name = label if len(runs) == 1 else f"{run.name}, {label}" if reference else run.name
        lines.append(charts.Line(name, bins, share, colour, reference, steps=True))
  high = max((line.y.max() for line in lines), default=1.0)
  return charts.figure(
    "Distance to the nearest other prototype",
    lines,
    x_label="cosine distance",
    scale=charts.PERCENT,
    y_range=(0, 1.08 * float(high)),
    caption="share of K in each bin; dashed: random prototypes, same K and D",
  )


def _usage(runs) -> str:
  lines, even = [], []
  for i, run in enumerate(runs):
    usage = run.arrays.get("usage", np.zeros(0))
    if len(usage):
      rank = 100 * np.arange(1, len(usage) + 1) / len(usage)
      lines.append(charts.Line(run.name, rank, np.sort(usage)[::-1].astype(float), i))
      colour = None if len(runs) == 1 else i
      even.append(
        charts.Line("balanced", np.array([0.0, 100.0]), np.full(2, usage.mean()), colour, True)
      )
  return charts.figure(
    "Images per prototype",
    [*lines, *even],
    x_label="prototypes by rank, % of K",
    scale=charts.COUNT,
    x_range=(0, 100),
    caption="of the bank, axis log(1 + images); dashed: balanced use",
  )


def _spectrum(runs) -> str:
  lines = []
  for i, run in enumerate(runs):
    values = np.sort(_finite(run, "spectrum"))[::-1]
    values = values[values > _FLOOR * values.max(initial=0.0)]
    if len(values):
      share = values / values.sum()
      lines.append(charts.Line(run.name, np.arange(1.0, len(share) + 1), share, i))
  return charts.figure(
    "Spectrum of the features",
    lines,
    x_label="eigenvalue of the covariance, by rank",
    scale=charts.LOG,
    caption="share of the variance, log axis; a cliff is dimensional collapse",
  )


def _over_steps(runs, title: str, lines: list[charts.Line], told: str, **options) -> str:
  """A chart whose steps go as far as those of all others."""
  last = max((float(steps[-1]) for run in runs for steps, _ in run.curves.values()), default=1.0)
  return charts.figure(
    title, lines, x_label="step, optimizer updates", caption=told, x_range=(0.0, last), **options
  )


def _lines(runs, key: str) -> list[charts.Line]:
  # Accuracies on images of different sizes are not alike: their lines say which size.
  sized = key.startswith("probe/") and len({run.pixels for run in runs} - {None}) > 1
  return [
    charts.Line(run.name + f", {run.pixels} px" * sized, *run.curves[key], i)
    for i, run in enumerate(runs)
    if key in run.curves
  ]


def _reference(runs, key: str, label: str) -> list[charts.Line]:
  """One neutral line where all runs agree, else one each in the run's colour."""
  lines = _lines(runs, key)
  lines = [line._replace(reference=True, label=f"{label}, {line.label}") for line in lines]
  if lines and len({float(y) for line in lines for y in np.unique(line.y)}) == 1:
    ends = np.array([min(li.x[0] for li in lines), max(li.x[-1] for li in lines)], float)
    return [lines[0]._replace(x=ends, y=lines[0].y[[0, -1]], label=label, colour=None)]
  return lines


def _with_floors(runs, key: str, kind: str) -> list[charts.Line]:
  """The lines of an accuracy, and those of what there is without training, over all steps."""
  lines = _lines(runs, key)
  if not lines:
    return []
  last = max(float(line.x[-1]) for line in lines)
  for name, label in FLOORS.items():
    flat = [
      line._replace(x=np.array([0.0, last]), y=np.full(2, float(line.y[-1])))
      for line in _reference(runs, f"floor/{kind}_{name}", label)
    ]
    lines += flat
  return lines


def _finite(run, key: str) -> np.ndarray:
  values = np.asarray(run.arrays.get(key, np.zeros(0)), float)
  return values[np.isfinite(values)]
