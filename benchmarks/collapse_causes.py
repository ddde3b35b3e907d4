"""What makes prototypes copies of each other: tables and a figure.

  python -m benchmarks.collapse_causes --workdir=runs/causes [--rows ...]
  python -m benchmarks.collapse_causes --draw

Trains the quickstart's net on scikit-learn's digits with joint prototypes, and again with one
setting changed at a time; then the mixture in each of its forms under the settings that it shares.
Longer runs of a mixture are there with the recipe's horizon and with one that grows with the steps.
One process a run, one after another, seed 0 unless a row says another; a run that is done is not
trained again. Each row goes to docs/results/collapse_causes.json as soon as it is there: what the
run watched while it trained, its final measures, and where its unused prototypes point. --draw
makes the figure of what is there, docs/collapse_causes.png, and prints the tables.

"Unused prototypes are pushed into one direction" is an explanation that is offered for the
collapse. Tested on the training images: an unused prototype is the argmax of none of them; its
cosine to minus the mean embedding is compared with that of used ones, and the cosine among unused
ones with that among used ones.
"""

import argparse
import json
import os
import pathlib

import matplotlib
import matplotlib.figure
import numpy as np

import protojax
from benchmarks import runs
from protojax import pretrained
from protojax.reports import record

RECIPE = "configs/quickstart.py"
JOINT = {
  "joint": {},
  "joint, DINO's centred targets": {"mode": "dino"},
  "joint, a quarter of the rate": {"optim.lr": 1e-3},
  "joint, D = 8": {"head.bottleneck": 8},
  "joint, D = 128": {"head.bottleneck": 128},
  "joint, K = 128": {"method.num_prototypes": 128},
  "joint, K = 2048": {"method.num_prototypes": 2048},
  "joint, no weight decay": {"optim.weight_decay": 0.0, "optim.final_weight_decay": 0.0},
  "joint, no decay of prototypes": {"optim.decay_prototypes": False},
  "joint, student twice as sharp": {"method.student_temp": 0.05},
}
MIXTURE = {
  "mixture, balanced": {"mode": ""},
  "mixture, unbalanced": {"mode": "", "mixture.balanced": False},
  "mixture, centred targets": {"mode": "centred"},
  "mixture, D = 8": {"mode": "", "head.bottleneck": 8},
  "mixture, D = 128": {"mode": "", "head.bottleneck": 128},
  "mixture, K = 2048": {"mode": "", "method.num_prototypes": 2048},
  "mixture, student twice as sharp": {"mode": "", "method.student_temp": 0.05},
}
# The recipe's horizon is 2.8 times its steps.
_STRETCHED = {"mode": "", "num_steps": 10_000, "mixture.horizon_steps": 28_000}
LONG = {
  "joint, four times as long": {"num_steps": 10_000},
  "mixture, four times as long": {"mode": "", "num_steps": 10_000},
  "joint, four times as long, seed 1": {"num_steps": 10_000, "seed": 1},
  "joint, four times as long, seed 2": {"num_steps": 10_000, "seed": 2},
  "mixture, four times as long, horizon too": _STRETCHED,
  "mixture, four times as long, horizon too, seed 1": _STRETCHED | {"seed": 1},
}
# How far prototypes move: joint ones by the learning rate, those of a mixture by the horizon.
SPEED = {
  "joint, half the rate": {"optim.lr": 2e-3},
  "joint, a sixteenth of the rate": {"optim.lr": 2.5e-4},
  "mixture, the default horizon, twice the run": {"mode": "", "mixture.horizon_steps": 5000},
  "mixture, half the horizon": {"mode": "", "mixture.horizon_steps": 3500},
  "mixture, a fifth of the horizon": {"mode": "", "mixture.horizon_steps": 1400},
  "mixture, a twentieth of the horizon": {"mode": "", "mixture.horizon_steps": 350},
  "joint, four times as long, a quarter of the rate": {"num_steps": 10_000, "optim.lr": 1e-3},
}
ROWS = JOINT | MIXTURE | LONG | SPEED
WATCHED = (
  "collapse/unique_0.025",
  "collapse/unique_0.25",
  "collapse/unique_0.5",
  "collapse/used_sample",
  "probe/knn",
)
ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "collapse_causes.json"
FIGURE = ROOT / "docs" / "collapse_causes.png"
COLUMNS = {  # of measures: format, factor
  "unique .025": ("collapse/unique_0.025", ".1f", 100),
  ".1": ("collapse/unique_0.1", ".1f", 100),
  ".25": ("collapse/unique_0.25", ".1f", 100),
  ".5": ("collapse/unique_0.5", ".1f", 100),
  "random, .5": ("collapse/unique_0.5_random", ".1f", 100),
  "drift": ("collapse/drift", ".2f", 1),
  "relative spacing": ("collapse/relative_uniqueness", ".2f", 1),
  "used": ("collapse/used", ".1f", 100),
  "k-NN": ("probe/knn", ".1f", 100),
  "linear": ("probe/linear_fitted", ".1f", 100),
}
CHANGED_SHAPE = {"head.bottleneck", "method.num_prototypes", "method.student_temp"}
ANGLES = ("unused to minus mean", "used to minus mean", "among unused", "among used")


def directions(folder: pathlib.Path) -> dict[str, float]:
  """Where used and unused prototypes point, by the training images; see the module.

  Returns:
    Cosines, each a mean: "unused to minus mean", "used to minus mean" over prototypes; "among
    unused", "among used" over pairs; and "unused", how many there are. Those of a
    kind with fewer than two prototypes are left out.
  """
  model = protojax.load(folder)
  images = pretrained.source(model, "train")
  found = pretrained.encoded(model, images, parts=("embeddings",), num_workers=0)
  z = found["embeddings"]["prototypes"]
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  rows = np.asarray(model.prototypes["prototypes"], np.float32)
  rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  used = np.bincount((z @ rows.T).argmax(axis=1), minlength=len(rows)) > 0
  away = -z.mean(axis=0)
  away = away / np.linalg.norm(away)
  out = {"unused": int((~used).sum())}
  for kind, some in (("used", rows[used]), ("unused", rows[~used])):
    if len(some) > 1:
      num = len(some)
      out[f"{kind} to minus mean"] = float((some @ away).mean())
      out[f"among {kind}"] = float((num * (some.mean(axis=0) ** 2).sum() - 1) / (num - 1))
  return out


def measured(row: str, folder: pathlib.Path, commit: str) -> dict:
  """What a finished run left: settings, commit, curves {key: [[step, value]]}, measures."""
  run = record.read([folder])[0]
  curves = {}
  for key in WATCHED:
    steps, values = run.curve(key)
    curves[key] = [[int(s), float(v)] for s, v in zip(steps, values, strict=True)]
  return {
    "settings": ROWS[row],
    "commit": commit,
    "curves": curves,
    "directions": directions(folder),
  } | runs.result(folder)


def tables(rows: dict[str, dict]) -> str:
  """Markdown: the measures at the end of each run, in percent but for spacing; `directions`."""

  def lines(head, cells):
    start = ["| " + " | ".join(["run", *head]) + " |", "|---" * (len(head) + 1) + "|"]
    return [*start, *(f"| {row} | " + " | ".join(cells(rows[row])) + " |" for row in rows)]

  def measures(found):
    return [f"{k * found['measures'][key]:{form}}" for key, form, k in COLUMNS.values()]

  def cosines(found):
    where = found["directions"]
    of_kinds = (f"{where[key]:.2f}" if key in where else "–" for key in ANGLES)
    return [str(where["unused"]), *of_kinds]

  return "\n".join([*lines(COLUMNS, measures), "", *lines(["unused", *ANGLES], cosines)])


def draw(rows: dict[str, dict], path: pathlib.Path) -> None:
  """One PNG: unique prototypes at .25 while training, joint ones and mixtures; and over drift."""
  figure = matplotlib.figure.Figure(figsize=(16, 7.2), layout="constrained")
  panels = figure.subplots(1, 3, sharey=True)
  for panel, kind in zip(panels[:2], ("joint", "mixture"), strict=True):
    panel.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    for row in (r for r in rows if r.startswith(kind)):
      points = np.array(rows[row]["curves"]["collapse/unique_0.25"])
      base = row in ("joint", "mixture, balanced")
      label = row.removeprefix(f"{kind}, ")
      panel.plot(
        points[:, 0], 100 * points[:, 1], label=label, color="black" if base else None, lw=1.5
      )
    panel.set(title=kind, xlabel="step", xscale="log", ylim=(0, 102))
    panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
  panels[0].set_ylabel("unique prototypes at cosine distance .25, %")
  for kind, marker in (("joint", "o"), ("mixture", "s")):
    ends = [
      (found["measures"]["collapse/drift"], 100 * found["measures"]["collapse/unique_0.25"])
      for row, found in rows.items()
      if row.startswith(kind) and not CHANGED_SHAPE & found["settings"].keys()
    ]
    panels[2].scatter(*zip(*ends, strict=True), marker=marker, label=kind)
  panels[2].set(title="at the end, K = 512, D = 32", xlabel="drift: cosine to where it started")
  panels[2].invert_xaxis()
  panels[2].legend(fontsize=8)
  figure.savefig(path, dpi=100, format="png")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/causes"))
  parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
  parser.add_argument("--draw", action="store_true", help="train nothing: figure and table")
  args = parser.parse_args()
  if args.draw:
    rows = json.loads(RESULTS.read_text())
    draw(rows, FIGURE)
    print(tables(rows))
    return
  os.environ["JAX_PLATFORMS"] = "cpu"
  commit = runs.commit()
  for row in args.rows:
    folder = args.workdir.absolute() / runs.name(row)
    settings = dict(ROWS[row])
    mode = settings.pop("mode", "joint")
    runs.train(f"{RECIPE}:{mode}" if mode else RECIPE, folder, settings)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows[row] = measured(row, folder, commit)
    RESULTS.write_text(json.dumps({r: rows[r] for r in ROWS if r in rows}, indent=1) + "\n")
    last = rows[row]["measures"]
    print(row, {k: round(100 * last[k], 1) for k in WATCHED if k in last}, flush=True)


if __name__ == "__main__":
  main()
