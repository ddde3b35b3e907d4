"""A long tail of CIFAR-10, joint against decoupled: python -m benchmarks.long_tail --data_dir=DATA

Trains DINO's joint prototypes, random ones that never move, and a mixture in both of its forms on
CIFAR-10 with `data.imbalance=100`, 5,000 images of the first class down to 50 of the last, and
evaluates each with `--protocol=long_tail`: accuracies of all classes in equal parts and of those
with over 100 images (eight) and 20 to 100 (two), bank the images that were trained on (in the JSON
also equally many of each class), test CIFAR-10's; and which classes the prototypes serve. Floors:
raw pixels, the net after a step at learning rate 0, and the random prototypes.
Writes docs/results/long_tail.json and prints the table. Rows that are there are not run again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from benchmarks import cifar10, runs
from protojax import recipes
from protojax.evals import long_tail
from protojax.training import datasets

JOINT = "configs/dino_cifar10.py"
TRAINED = {
  "untrained encoder": (JOINT, {"num_steps": 1}),
  "joint": (JOINT, {}),
  "frozen random": ("configs/frozen_cifar10.py", {}),
  "mixture, balanced": ("configs/gmm_cifar10.py", {}),
  "mixture, as in the paper": ("configs/gmm_cifar10.py:paper", {}),
}
TAIL = {"data.imbalance": 100.0}
RESULTS = runs.ROOT / "docs" / "results" / "long_tail.json"
COLUMNS = {
  "k-NN, balanced": "knn_balanced",
  "many": "knn_many",
  "medium": "knn_medium",
  "linear, balanced": "linear_balanced",
  "many ": "linear_many",
  "medium ": "linear_medium",
  "used": "used",
  "of them of medium": "prototypes_used_medium",
}


def raw_pixels(data_dir: str) -> dict[str, float]:
  """`long_tail.evaluate` of the images themselves."""
  config = recipes.load(JOINT)
  config.data.update({"data_dir": data_dir, "imbalance": TAIL["data.imbalance"]})
  tail, _, test = datasets.of_run(config)
  return long_tail.evaluate(
    *cifar10.pixels(tail), *cifar10.pixels(test), num_classes=10, k=20, temperature=0.07
  )


def evaluated(folder: pathlib.Path, data_dir: str) -> dict:
  """What evaluate says of a run, without the paths of the machine; and what was used at its end."""
  command = [sys.executable, "-m", "protojax.evaluate", "--protocol=long_tail", "--overwrite"]
  where = [f"--workdir={folder}", f"--data_dir={data_dir}"]
  subprocess.run([*command, *where], cwd=runs.ROOT, check=True)
  out = runs.result(folder, "long_tail")
  out["measures"]["used"] = runs.result(folder)["measures"].get("collapse/used")
  return out


def table(rows: dict[str, dict]) -> str:
  """Markdown, in percent."""
  return runs.percentages("row", COLUMNS, rows)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--data_dir", required=True, help="where CIFAR-10 is")
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/long_tail"))
  parser.add_argument("--rows", nargs="*", choices=list(TRAINED), default=list(TRAINED))
  args = parser.parse_args()
  commit = runs.commit()
  rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  if "raw pixels" not in rows:
    rows["raw pixels"] = {"commit": commit, "measures": raw_pixels(args.data_dir)}
  for row in (row for row in args.rows if row not in rows):
    recipe, changes = TRAINED[row]
    folder = args.workdir.absolute() / runs.name(row)
    runs.train(recipe, folder, TAIL | {"data.data_dir": args.data_dir} | changes)
    rows[row] = {"recipe": recipe, "settings": TAIL | changes, "commit": commit}
    rows[row] |= evaluated(folder, args.data_dir)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
  print(table(rows))


if __name__ == "__main__":
  main()
