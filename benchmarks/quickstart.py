"""The README's first table: the quickstart's kinds of prototypes, three seeds each, and the floors.

  python benchmarks/quickstart.py --workdir=runs/digits

Trains every row, or those of --rows, and seed in a process of its own, as many at a time as there
are CPU cores and with one thread each (runs that are done are not trained again), writes the
measures of each with protocol, environment and the row's commit to docs/results/quickstart.json
and prints the table in Markdown: mean over the seeds, and least and most in brackets. Fifteen runs
take twenty minutes on two cores.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

ROWS = {
  "joint": "configs/quickstart.py:joint",
  "decoupled": "configs/quickstart.py",
  "frozen random": "configs/quickstart.py:frozen",
  "joint, centred targets (DINO's)": "configs/quickstart.py:dino",
  "decoupled, centred targets": "configs/quickstart.py:centred",
}
SEEDS = (0, 1, 2)
RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "quickstart.json"
COLUMNS = {
  "unique .25": "collapse/unique_0.25",
  "unique .5": "collapse/unique_0.5",
  "used": "collapse/used",
  "drift": "collapse/drift",
  "k-NN": "probe/knn",
  "linear": "probe/linear_fitted",
}
FLOORS = {
  "floors: random prototypes, raw pixels": {
    "unique .25": "collapse/unique_0.25_random",
    "unique .5": "collapse/unique_0.5_random",
    "k-NN": "floor/knn_pixels",
    "linear": "floor/linear_pixels",
  },
  "floor: untrained net": {"k-NN": "floor/knn_untrained"},
}


def train(recipe: str, seed: int, folder: pathlib.Path) -> dict:
  """Runs one to its end, or reads what it left: its result.json."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "protojax.main", f"--config={recipe}", f"--workdir={folder}"]
  with open(f"{folder}.log", "w", encoding="utf-8") as log:
    subprocess.run(
      [*command, f"--config.seed={seed}"],
      env={**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "1"},
      stdout=log,
      stderr=subprocess.STDOUT,
      check=True,
    )
  return json.loads((folder / "eval" / "final" / "result.json").read_text())


def published() -> dict:
  """{"commits": {row: commit}, "protocol", "environment", "rows": {row: [a seed's measures]}}."""
  return json.loads(RESULTS.read_text())


def table() -> str:
  """The README's, in Markdown, of what was published."""
  rows = published()["rows"]
  lines = ["| prototypes | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
  for row, runs in rows.items():
    lines.append(f"| {row} | " + " | ".join(_cell(runs, key) for key in COLUMNS.values()) + " |")
  every = [run for runs in rows.values() for run in runs]
  for floor, keys in FLOORS.items():
    cells = (_cell(every, keys[name]) if name in keys else "–" for name in COLUMNS)
    lines.append(f"| {floor} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _cell(runs: list[dict], key: str) -> str:
  """Percent, of drift the cosine: the mean, and least and most where they differ."""
  factor, form = (1, ".2f") if key == "collapse/drift" else (100, ".1f")
  values = [factor * run[key] for run in runs]
  mean, least, most = (
    format(x, form) for x in (sum(values) / len(values), min(values), max(values))
  )
  return mean if least == most else f"{mean} ({least} to {most})"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/digits"))
  parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
  args = parser.parse_args()
  commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    runs = {
      (row, seed): pool.submit(
        train,
        ROWS[row],
        seed,
        args.workdir / f"{ROWS[row].partition(':')[2] or 'decoupled'}_{seed}",
      )
      for seed in SEEDS
      for row in args.rows
    }
  results = {key: run.result() for key, run in runs.items()}
  one = next(iter(results.values()))
  before = published()
  rows = {row: [results[row, s]["measures"] for s in SEEDS] for row in args.rows}
  commits = before["commits"] | dict.fromkeys(args.rows, commit)
  record = {
    "commits": {row: commits[row] for row in ROWS if row in commits},
    "protocol": one["protocol"],
    "environment": {k: v for k, v in one["environment"].items() if k != "command"},
    "rows": {row: (before["rows"] | rows)[row] for row in commits},
  }
  RESULTS.write_text(json.dumps(record, indent=1) + "\n")
  print(table())


if __name__ == "__main__":
  main()
