"""The README's tables: every row at one equal budget, floors, the kinds of prototypes by seeds.

  python benchmarks/cifar10.py --data_dir=$PROTOJAX_DATA_DIR --workdir=runs/cifar10 [--rows ...]
    [--seed 0]

Runs each row with `python -m protojax.main` in a process of its own, one after another (rows that
are done are not run again), writes what each left to docs/results/cifar10/ROW.json (measures, the
protocol and environment of its result.json, config, commit; ROW_seed1.json of seed 1) and prints
Markdown tables of all that is there: the kinds of prototypes, mean and standard deviation of those
with several seeds, and the methods. The full form of GEDI takes a tenth of the
steps. "raw pixels" and "untrained encoder" are the floors: accuracies without any training.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np

from protojax import config as configs
from protojax import environment, recipes, resolving
from protojax.data import pipeline
from protojax.evals import knn, linear
from protojax.metrics import verdicts
from protojax.training import datasets, evaluation, programs, workdir

PROTOTYPES = {
  "dino joint": "configs/dino_cifar10.py",
  "dino frozen": "configs/frozen_cifar10.py",
  "dino frozen, centred": "configs/frozen_cifar10.py:centred",
  "dino mixture, paper": "configs/gmm_cifar10.py:paper",
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
SEEDS = tuple(PROTOTYPES)
FLOORS = ("raw pixels", "untrained encoder")
RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "cifar10"
# {measure: (head, factor, format)}
_ACCURACY = {
  "rankme": ("RankMe", 1, ".1f"),
  "knn": ("k-NN %", 100, ".1f"),
  "linear_fitted": ("linear %", 100, ".1f"),
  "img_per_s": ("img/s", 1, ".0f"),
  "seconds": ("wall s", 1, ".0f"),
  "seed": ("seed", 1, ".0f"),
}
PROTOTYPE_COLUMNS = {
  "unique_0.025": ("unique .025", 100, ".1f"),
  "unique_0.05": (".05", 100, ".1f"),
  "unique_0.1": (".1", 100, ".1f"),
  "unique_0.25": (".25", 100, ".1f"),
  "unique_0.5": (".5", 100, ".1f"),
  "used": ("used %", 100, ".1f"),
  "perplexity": ("perplexity", 1, ".0f"),
  "drift": ("drift", 1, ".3f"),
  "relative_uniqueness": ("relative spacing", 1, ".2f"),
  **_ACCURACY,
  "verdict": ("verdict", 1, ""),
}
METHOD_COLUMNS = {
  "loss": ("loss", 1, ".2f"),
  "least_loss": ("least", 1, ".2f"),
  "ln_k": ("ln K", 1, ".2f"),
  "unique_0.025": ("unique .025", 100, ".1f"),
  "unique_0.25": (".25", 100, ".1f"),
  "used": ("used %", 100, ".1f"),
  **_ACCURACY,
  "verdict": ("verdict", 1, ""),
}


SEED_COLUMNS = {
  "unique_0.25": ("unique .25", 100, ".1f"),
  "unique_0.5": (".5", 100, ".1f"),
  "used": ("used %", 100, ".1f"),
  "perplexity": ("perplexity", 1, ".0f"),
  "drift": ("drift", 1, ".3f"),
  "rankme": ("RankMe", 1, ".1f"),
  "knn": ("k-NN %", 100, ".1f"),
  "linear_fitted": ("linear %", 100, ".1f"),
}


def pixels(data) -> tuple[np.ndarray, np.ndarray]:
  """Images of 32 pixels, float32 [N, 32 * 32 * 3] in 0 to 1, and labels [N] of a source."""
  batches = pipeline.sequential(data, batch_size=1000, image_size=32)
  rows = [(b["image"][b["mask"]], b["label"][b["mask"]]) for b in batches]
  images = np.concatenate([r[0] for r in rows]).reshape(len(data), -1)
  return images.astype(np.float32) / 255.0, np.concatenate([r[1] for r in rows])


def floors(data_dir: str) -> dict[str, dict]:
  """{floor: {"measures", "protocol", "environment"}}, the protocol of the rows."""
  config = recipes.load("configs/frozen_cifar10.py")
  config.data.data_dir = data_dir
  train_source, bank, test = datasets.of_run(config)
  config = resolving.resolve(config, len(train_source))

  a, b = pixels(bank), pixels(test)
  raw = {
    "probe/knn": knn.accuracy(
      *a, *b, num_classes=10, k=config.probe.k, temperature=config.probe.temperature
    ),
    "probe/linear_fitted": linear.evaluate(*a, *b, num_classes=10)["linear"],
  }
  program = programs.Program(config)
  view = evaluation.Snapshot(program, bank=bank, test=test)
  with jax.set_mesh(program.mesh):
    state = program.init(config.seed)
    measures = view.final(state)[0]
  protocol, made_by = workdir.protocol(config, bank, test), environment.describe()
  return {
    name: {"measures": found, "protocol": protocol, "environment": made_by}
    for name, found in zip(FLOORS, (raw, measures), strict=True)
  }


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


def _file(row: str, seed: int) -> str:
  return row.replace(",", "").replace(" ", "_") + f"_seed{seed}" * bool(seed)


def publish(row: str, result: dict, config: dict | None, commit: str, seed: int = 0) -> None:
  """Writes docs/results/cifar10/ROW.json from a result.json, without the paths of the machine."""
  given = ["--workdir=runs/cifar10", "--config.data.data_dir=$PROTOJAX_DATA_DIR"]
  environment = {k: v for k, v in result["environment"].items() if k != "command"}
  given += [f"--config.seed={seed}"] * bool(seed)
  recipe = [f"--config={ROWS[row]}", *given] if row in ROWS else []
  record = {"row": row, "commit": commit, "arguments": recipe, **result, "config": config}
  record["environment"] = environment
  if config is not None:
    for part in (config["data"], config["probe"]):
      part["data_dir"] = "$PROTOJAX_DATA_DIR"
  RESULTS.mkdir(parents=True, exist_ok=True)
  path = RESULTS / f"{_file(row, seed)}.json"
  path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def published() -> dict[str, dict]:
  """{row: measures, "verdict" and "least_loss"} of what was published, in the README's order."""
  found = (json.loads(p.read_text()) for p in RESULTS.glob("*.json"))
  records = {r["row"]: r for r in found if not r["measures"].get("seed")}
  pixels, untrained = (records.get(floor, {}).get("measures", {}) for floor in FLOORS)
  known = {  # of all images of bank and test, as the rows
    "floor/knn_pixels": pixels.get("probe/knn"),
    "floor/knn_untrained": untrained.get("probe/knn"),
    "floor/test_images": 10_000.0,
  }
  out = {}
  for row in (*ROWS, *FLOORS):
    if row in records:
      out[row] = measures = records[row]["measures"]
      if row in ROWS:
        config = configs.restored(records[row]["config"])
        verdict = verdicts.of_run(known | measures, config=config, step=measures["step"])
        measures |= {"verdict": verdict.label, "least_loss": least_loss(measures, config)}
  return out


def by_seed() -> dict[str, list[dict]]:
  """{row: measures of each of its seeds} of those of `SEEDS` that have several."""
  found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
  rows = {row: [r["measures"] for r in found if r["row"] == row] for row in SEEDS}
  return {row: runs for row, runs in rows.items() if len(runs) > 1}


def seed_table() -> str:
  """Mean and standard deviation over the seeds, in Markdown."""
  head = "| row | seeds | " + " | ".join(c[0] for c in SEED_COLUMNS.values()) + " |"
  lines = [head, "|---" * (len(SEED_COLUMNS) + 2) + "|"]
  for row, runs in by_seed().items():
    cells = []
    for key, (_, scale, form) in SEED_COLUMNS.items():
      values = [scale * _short(run)[key] for run in runs]
      cells.append(f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}")
    lines.append(f"| {row} | {len(runs)} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def tables() -> list[str]:
  """The README's, in Markdown, of what was published."""
  rows, out = published(), []
  for names, columns in ((PROTOTYPES, PROTOTYPE_COLUMNS), (METHODS, METHOD_COLUMNS)):
    last = FLOORS if names is PROTOTYPES else ()
    out.append(table({r: rows[r] for r in (*names, *last) if r in rows}, columns))
  out.insert(1, seed_table())
  return out


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
  parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--no_floors", action="store_true")
  arguments = parser.parse_args()
  commit = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
  ).stdout.strip()
  if not arguments.no_floors:
    for floor, result in floors(arguments.data_dir).items():
      publish(floor, result, None, commit)
  for row in arguments.rows:
    folder = pathlib.Path(arguments.workdir) / _file(row, arguments.seed)
    done = subprocess.run(
      [
        sys.executable,
        "-m",
        "protojax.main",
        f"--config={ROWS[row]}",
        f"--workdir={folder}",
        f"--config.data.data_dir={arguments.data_dir}",
        f"--config.seed={arguments.seed}",
      ],
      check=False,
    )
    if done.returncode:
      sys.exit(done.returncode)
    result = json.loads((folder / "eval" / "final" / "result.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    publish(row, result, config, commit, arguments.seed)
  print("\n\n".join(tables()))
