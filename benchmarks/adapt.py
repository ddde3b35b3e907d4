"""Prototypes for a backbone that has none: python -m benchmarks.adapt --data_dir=DATA

Trains VICReg on CIFAR-10, which has no prototypes, and takes its backbone without the head:
`adapt_cifar10` fits a new one with a mixture, `adapt_cifar10:joint` with learned prototypes, both
beginning at random; the backbone stands still for 300 of 1,000 steps. Writes
docs/results/adapt.json and prints the table: the backbone before and after each. Runs that are done
are not run again.
"""

import argparse
import json
import pathlib

from benchmarks import runs
from protojax import convert

BACKBONE = "configs/vicreg_cifar10.py"
ADAPTED = {
  "with a mixture": "configs/adapt_cifar10.py",
  "with learned prototypes": "configs/adapt_cifar10.py:joint",
}
RESULTS = runs.ROOT / "docs" / "results" / "adapt.json"
COLUMNS = {
  "k-NN": "probe/knn",
  "linear": "probe/linear_fitted",
  "used": "collapse/used",
  "unique .25": "collapse/unique_0.25",
  ".5": "collapse/unique_0.5",
}


def table(rows: dict[str, dict]) -> str:
  """Markdown, in percent."""
  return runs.percentages("backbone", COLUMNS, rows)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--data_dir", required=True, help="where CIFAR-10 is")
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/adapt"))
  args = parser.parse_args()
  workdir = args.workdir.absolute()
  backbone, data = workdir / "vicreg", {"data.data_dir": args.data_dir}
  runs.train(BACKBONE, backbone, data)
  rows = {"before": {"recipe": BACKBONE, "commit": runs.commit()} | runs.result(backbone)}
  alone = workdir / "backbone"
  convert.main([str(backbone), str(alone), "--no_head", "--overwrite"])
  for row, recipe in ADAPTED.items():
    folder = workdir / runs.name(row)
    runs.train(recipe, folder, data | {"init_from": alone})
    rows[row] = {"recipe": recipe, "commit": runs.commit()} | runs.result(folder)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
  print(table(rows))


if __name__ == "__main__":
  main()
