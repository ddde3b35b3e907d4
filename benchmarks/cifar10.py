"""The README's two tables: every row at one equal budget, then its floors.

  python benchmarks/cifar10.py --data_dir=$PROTOJAX_DATA_DIR --workdir=runs/cifar10 [--rows ...]

Runs each row with `python -m protojax.main` in a process of its own, one after another (rows that
are done are not run again), and prints JSON lines and Markdown tables from what the runs left: the
kinds of prototypes, and the methods. The full form of GEDI takes a tenth of the steps.
"raw pixels" and "untrained encoder" are the floors: k-NN and linear accuracy without any training.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

import jax
import ml_collections
import numpy as np

from protojax import config as configs
from protojax import main, monitor, programs, snapshot, train
from protojax.data import pipeline
from protojax.evals import knn, linear

PROTOTYPES = {
  "dino joint": "configs/dino_cifar10.py",
  "dino frozen": "configs/frozen_cifar10.py",
  "dino mixture, plain": "configs/gmm_cifar10.py:paper",
  "dino mixture, balanced": "configs/gmm_cifar10.py",
  "carp joint": "configs/carp_cifar10.py",
  "carp mixture": "configs/carp_cifar10.py:gmm",
}
METHODS = {
  "dino joint": "configs/dino_cifar10.py",
  "koleo-proto": "configs/koleo_proto_cifar10.py",
  "ibot": "configs/ibot_cifar10.py",
  "ibot mixture": "configs/ibot_cifar10.py:gmm",
  "msn": "configs/msn_cifar10.py",
  "carp joint": "configs/carp_cifar10.py",
  "swav": "configs/swav_cifar10.py",
  "swav mixture": "configs/swav_cifar10.py:gmm",
  "self-classifier": "configs/self_classifier_cifar10.py",
  "gedi": "configs/gedi_cifar10.py",
  "gedi, full": "configs/gedi_cifar10.py:gen",
  "falcon": "configs/falcon_cifar10.py",
  "pcl": "configs/pcl_cifar10.py",
  "barlow twins": "configs/barlow_twins_cifar10.py",
  "vicreg": "configs/vicreg_cifar10.py",
}
ROWS = PROTOTYPES | METHODS
# {measure: (head, factor, format)}
_ACCURACY = {
  "rankme": ("RankMe", 1, ".1f"), "knn": ("k-NN %", 100, ".1f"),
  "linear_fitted": ("linear %", 100, ".1f"), "img_per_s": ("img/s", 1, ".0f"),
  "seconds": ("wall s", 1, ".0f"), "seed": ("seed", 1, ".0f"),
}  # fmt: skip
PROTOTYPE_COLUMNS = {
  "unique_0.025": ("unique .025", 100, ".1f"), "unique_0.05": (".05", 100, ".1f"),
  "unique_0.1": (".1", 100, ".1f"), "unique_0.25": (".25", 100, ".1f"),
  "unique_0.5": (".5", 100, ".1f"), "used": ("used %", 100, ".1f"),
  "perplexity": ("perplexity", 1, ".0f"), "drift": ("drift", 1, ".3f"),
  "relative_uniqueness": ("relative spacing", 1, ".2f"), **_ACCURACY,
}  # fmt: skip
METHOD_COLUMNS = {
  "loss": ("loss", 1, ".2f"), "least_loss": ("least", 1, ".2f"), "ln_k": ("ln K", 1, ".2f"),
  "unique_0.025": ("unique .025", 100, ".1f"), "unique_0.25": (".25", 100, ".1f"),
  "used": ("used %", 100, ".1f"), **_ACCURACY, "verdict": ("verdict", 1, ""),
}  # fmt: skip


def floors(data_dir: str) -> dict[str, dict[str, float]]:
  """k-NN and linear accuracy of raw pixels and of the untrained encoder, same protocol."""
  config = main.load("configs/frozen_cifar10.py")
  config.data.data_dir = data_dir
  train_source, bank, test = train.build_sources(config)
  config = configs.resolve(config, len(train_source))

  def pixels(data):
    batches = pipeline.sequential(data, batch_size=1000, image_size=32)
    rows = [(b["image"][b["mask"]], b["label"][b["mask"]]) for b in batches]
    images = np.concatenate([r[0] for r in rows]).reshape(len(data), -1)
    return images.astype(np.float32) / 255.0, np.concatenate([r[1] for r in rows])

  a, b = pixels(bank), pixels(test)
  raw = {
    "knn": knn.accuracy(*a, *b, num_classes=10, k=config.probe.k,
                        temperature=config.probe.temperature),
    "linear_fitted": linear.evaluate(*a, *b, num_classes=10)["linear"],
  }  # fmt: skip
  program = programs.Program(config)
  view = snapshot.Snapshot(program, bank=bank, test=test)
  with jax.set_mesh(program.mesh):
    state = program.init(config.seed)
    measures = view.final(state)[0]
  return {"raw pixels": raw, "untrained encoder": measures}


def _short(measures: dict) -> dict[str, float]:
  return {key.split("/")[-1]: value for key, value in measures.items()}


def least_loss(measures: dict, config) -> float | None:
  """What the docstring of the method says the loss cannot fall below, under this config."""
  method, entropy = config.method, measures.get("train/target_entropy")
  match method.name:
    case "dino":
      return None if method.koleo or method.koleo_proto else entropy
    case "swav" | "msn":
      return entropy
    case "ibot":
      patches = measures["train/patch_target_entropy"]
      return method.class_weight * entropy + method.patch_weight * patches
    case "falcon" if method.prior == "forward" or method.beta < 1.0:
      return None
    case "falcon" | "self_classifier":
      return max(0.0, math.log(method.num_prototypes / config.batch_size))
    case "gedi" if not method.generative:
      return method.weight_uniformity * math.log(method.num_prototypes)
    case "carp" | "barlow_twins" | "vicreg":
      return 0.0
  return None


def result(folder: pathlib.Path) -> dict:
  """Measures of a finished run, its verdict and the least loss it could have."""
  measures = json.loads((folder / "eval/final/result.json").read_text())["measures"]
  config = ml_collections.ConfigDict(json.loads((folder / "config.json").read_text()))
  verdict = monitor.verdict(measures, config=config, step=measures["step"])
  return measures | {"verdict": verdict.label, "least_loss": least_loss(measures, config)}


def table(results: dict[str, dict], columns: dict[str, tuple]) -> str:
  """Markdown."""
  head = "| row | " + " | ".join(c[0] for c in columns.values()) + " |"
  lines = [head, "|---" * (len(columns) + 1) + "|"]
  for name, measures in results.items():
    values = _short(measures)
    cells = [
      format(scale * values[key], form) if values.get(key) is not None else "–"
      for key, (_, scale, form) in columns.items()
    ]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--workdir", default="runs/cifar10")
  parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
  parser.add_argument("--no_floors", action="store_true")
  parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="for every row")
  arguments = parser.parse_args()
  lowest = {} if arguments.no_floors else floors(arguments.data_dir)
  results = {}
  for row in arguments.rows:
    folder = pathlib.Path(arguments.workdir) / row.replace(",", "").replace(" ", "_")
    done = subprocess.run(
      [sys.executable, "-m", "protojax.main", f"--config={ROWS[row]}", f"--workdir={folder}",
       f"--config.data.data_dir={arguments.data_dir}",
       *(f"--config.{change}" for change in arguments.set)],
      check=False,
    )  # fmt: skip
    if done.returncode:
      sys.exit(done.returncode)
    results[row] = result(folder)
  for row, measures in (results | lowest).items():
    print(json.dumps({"row": row, **_short(measures)}))
  for rows, columns in ((PROTOTYPES, PROTOTYPE_COLUMNS), (METHODS, METHOD_COLUMNS)):
    if shown := {row: measures for row, measures in results.items() if row in rows}:
      print(table(shown | lowest, columns), end="\n\n")
