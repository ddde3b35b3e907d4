"""One training run on CIFAR-10 (JPEG copy), its final measures and its curves."""

import importlib
import math
import pathlib
import sys

import jax

from benchmarks.accelerator import records, speed
from protojax import config as configs
from protojax import convert, evaluate, recipes
from protojax.metrics import verdicts
from protojax.training import loop, origin

_IMAGES = 50_000
_LOSSES = ("train/loss", "train/target_entropy")


def recipe(options: dict, data_dir: str | None, rehearse: bool):
  """The unresolved config of a row: evaluated, looked at and saved at every tenth of it."""
  config = recipes.load(str(records.ROOT / options["config"]))
  speed.override(config, options["changes"])
  if rehearse:
    config = _rehearsal(config)
  config.data.data_dir = data_dir
  steps = config.num_steps or math.ceil(config.num_epochs * (_IMAGES // config.batch_size))
  tenth = math.ceil(steps / 10)
  config.monitor.every = tenth
  config.update(
    {
      "eval_every": tenth,
      "save_every": tenth,
      "log_every": math.ceil(tenth / 10),
    }
  )
  return config


def _rehearsal(config):
  """Two steps of sixteen images of the same data set, two blocks, kept on the device."""
  if config.model.name == "resnet18":
    config.model.name = "resnet8"
  config = configs.debug(config)
  if config.model.name == "resnet8":
    config.model.width = 16
  config.update({"num_steps": 2, "steps_per_epoch": 2, "batch_size": 16})
  config.data.update({"name": "cifar10", "split": "train[:64]", "cache": "device"})
  config.probe.update(
    {
      "train_split": "train[:64]",
      "test_split": "test[:40]",
      "limit": 0,
      "k": 20,
    }
  )
  config.monitor.images = 32
  if config.data.imbalance:
    config.data.imbalance = 2.0  # no class is left without images
  return config


def run(options: dict, *, folder: pathlib.Path, data_dir: str | None, rehearse: bool) -> dict:
  """Trains, or goes on with what an earlier call has left in `folder`.

  Returns:
    "measures" of the end (used, perplexity, RankMe, k-NN at k = 20 and T = .07, linear probe
    fitted, ...), "knn" at other k and T, "clustering" where asked for, "curves" {measure: [[step,
    value], ...]} of every tenth, "verdict", and "peak_in_use_mib", the device memory that all rows
    of this process so far had in use at most.
  """
  if "torch" not in sys.modules:  # tensorboardX imports it where it finds it: seconds for nothing
    sys.modules["torch"] = None
    importlib.import_module("tensorboardX")
    del sys.modules["torch"]
  config = recipe(options, data_dir, rehearse)
  if "init_from" in options:
    trained = folder.parents[1] / options["init_from"] / "run" / "exported"
    if not trained.is_dir():
      return {"skipped": f"{options['init_from']}, whose weights it takes, is not done"}
    config.init_from = str(folder / "backbone")
    convert.leave_out_head(trained, folder / "backbone", overwrite=True)
    origin.take_over(config, options["changes"])
  loop.run(config, str(folder / "run"))
  result = records.read_json(folder / "run" / "eval" / "final" / "result.json")
  ks = "5,20" if rehearse else "20,200"
  out = {
    "measures": result["measures"],
    "protocol": result["protocol"],
    "knn": _evaluate(folder, "knn", f"--k={ks}", "--temperature=0.07,0.1"),
    "curves": curves(folder / "run"),
    "published": options.get("published") or options.get("published_knn"),
    "config": options["config"],
    "changes": options["changes"],
  }
  if options.get("clusters"):
    out["clustering"] = _evaluate(folder, "clustering")
  if options.get("long_tail"):
    out["long_tail"] = _evaluate(folder, "long_tail")
  resolved = configs.restored(records.read_json(folder / "run" / "config.json"))
  verdict = verdicts.of_run(result["measures"], config=resolved, step=result["measures"]["step"])
  stats = jax.devices()[0].memory_stats() or {}
  return out | {
    "verdict": verdict.label,
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "peak_in_use_mib": round(stats.get("peak_bytes_in_use", 0) / 2**20) or None,
  }


def _evaluate(folder: pathlib.Path, protocol: str, *more: str) -> dict:
  run_folder = folder / "run"
  evaluate.main([f"--workdir={run_folder}", f"--protocol={protocol}", "--overwrite", *more])
  return records.read_json(run_folder / "eval" / protocol / "result.json")["measures"]


def curves(folder: pathlib.Path) -> dict[str, list]:
  """{measure: [[step, value], ...]} of every tenth of a run, of losses every hundredth."""
  found = {}
  for line in records.read(folder / "metrics.jsonl"):
    for name, value in line.items():
      if name.startswith(("collapse/", "probe/")) and "collapse/rankme" not in line:
        continue  # of the online probe, at every line
      if name.startswith(("collapse/", "probe/", *_LOSSES)) and isinstance(value, int | float):
        found.setdefault(name, []).append([line["step"], value])
  return found
