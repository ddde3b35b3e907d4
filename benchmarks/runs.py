"""A training in a process of its own, and what it left: what the benchmarks of trainings share."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]


def name(row: str) -> str:
  """A folder's name for a row of a table."""
  return "".join(c if c.isalnum() else "_" for c in row)


def train(recipe: str, folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Trains to the end, beside it FOLDER.log; does nothing where that was reached before."""
  command = [sys.executable, "-m", "protojax.main", f"--config={recipe}", f"--workdir={folder}"]
  flags = [f"--config.{key}={value}" for key, value in settings.items()]
  folder.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{folder}.log", "w", encoding="utf-8") as log:
    subprocess.run([*command, *flags], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def result(folder: pathlib.Path, evaluation: str = "final") -> dict[str, Any]:
  """An evaluation's {"measures", "protocol", "environment"}, without the paths of the machine."""
  found = json.loads((folder / "eval" / evaluation / "result.json").read_text())
  kept = {k: found[k] for k in ("measures", "protocol")}
  kept["protocol"].get("model", {}).pop("path", None)  # of an evaluation, not of a run's end
  return kept | {"environment": {k: v for k, v in found["environment"].items() if k != "command"}}


def percentages(first: str, columns: Mapping[str, str], rows: Mapping[str, dict]) -> str:
  """Markdown of {row: {"measures"}}, in percent; "–" where a measure is not there.

  Args:
    first: head of the rows' names.
    columns: {head: measure}; spaces tell equal heads apart.
    rows: in order.
  """
  head = " | ".join([first, *map(str.strip, columns)])
  lines = [f"| {head} |", "|---" * (len(columns) + 1) + "|"]
  for row, found in rows.items():
    values = (found["measures"].get(key) for key in columns.values())
    cells = ("–" if value is None else f"{100 * value:.1f}" for value in values)
    lines.append(f"| {row} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def commit() -> str:
  """Of this clone, in short."""
  command = ["git", "rev-parse", "--short", "HEAD"]
  return subprocess.check_output(command, cwd=ROOT, text=True).strip()
