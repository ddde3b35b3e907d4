"""Runs the `:debug` mode of every recipe, one after another, as a user would.

  python benchmarks/debug_all.py [--recipes dino_cifar10 ...] [--limit 60]

Prints a JSON line a recipe: seconds from start to end of the process, compiling included, and the
last line of its log. The status is 1 if a run failed or took longer than the limit.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "common")


def run(recipe: str) -> dict:
  """One run in a workdir that is removed."""
  with tempfile.TemporaryDirectory() as workdir:
    start = time.perf_counter()
    done = subprocess.run(
      [
        sys.executable,
        "-m",
        "protojax.main",
        f"--config=configs/{recipe}.py:debug",
        f"--workdir={workdir}",
      ],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      check=False,
    )
    seconds = time.perf_counter() - start
  lines = done.stdout.strip().splitlines() or [""]
  return {
    "recipe": recipe,
    "seconds": round(seconds, 1),
    "status": done.returncode,
    "end": lines[-1],
  }


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--recipes", nargs="*", default=RECIPES, choices=RECIPES)
  parser.add_argument("--limit", type=float, default=60.0, help="seconds a run")
  arguments = parser.parse_args()
  bad = []
  for name in arguments.recipes:
    row = run(name)
    print(json.dumps(row), flush=True)
    if row["status"] or row["seconds"] > arguments.limit:
      bad.append(name)
  if bad:
    sys.exit(f"failed or above {arguments.limit:g} s: {', '.join(bad)}")
