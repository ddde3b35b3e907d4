"""A recipe's step on this machine: images a second, parts, and the share of what it could do."""

import gc
import pathlib
import statistics
import time

import jax

from benchmarks import step
from benchmarks.accelerator import records
from protojax import config as configs
from protojax import recipes

_REPEATS = 10


def recipe(options: dict, batch_size: int, rehearse: bool):
  """The unresolved config of an item."""
  config = recipes.load(str(records.ROOT / options["config"]))
  override(config, options["changes"])
  if rehearse:
    config = configs.debug(config)
    config.augment.num_local = min(2, options["changes"].get("augment.num_local", 0))
    batch_size = 4
  config.update({"batch_size": batch_size, "precision": "bfloat16"})
  return config


def override(config, changes: dict) -> None:
  """Sets keys such as "model.patch_size"; what another method brings along may be new."""
  name = changes.get("method.name")
  with config.unlocked():
    if name and name != config.method.name:
      config.method.update(configs.default(name).method.to_dict())
    config.update_from_flattened_dict(changes)


def out_of_memory(error: Exception) -> bool:
  text = str(error)
  return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def largest(batches, measure) -> dict:
  """`measure(batch size)` of the first batch that fits, with those that did not."""
  too_large = []
  for batch_size in batches:
    try:
      return measure(batch_size) | {"too_large": too_large}
    except Exception as error:
      if not out_of_memory(error):
        raise
      too_large.append(batch_size)
    gc.collect()  # what the failed attempt held
  raise RuntimeError(f"no batch fits: tried {too_large}")


def run(options: dict, *, folder: pathlib.Path, data_dir: str | None, rehearse: bool) -> dict:
  """`benchmarks.step.measure` of a recipe in bfloat16, at the largest of the batches that fits.

  Adds "matrix_peak" (operations a second, measured before and after; the larger), the share of it
  that the step's products make up, the same of the step on views that are ready, and the parts'
  remainder. "peak_mib" is what XLA has planned for the step: arguments and temporary arrays.
  """
  del folder, data_dir
  if options["changes"].get("model.attention") == "cudnn" and jax.default_backend() != "gpu":
    return {"skipped": f"cuDNN's attention needs an NVIDIA GPU, this is {jax.default_backend()}"}
  size = 256 if rehearse else 8192
  before = step.matrix_peak(size)

  def measure(batch_size):
    config = recipe(options, batch_size, rehearse)
    return step.measure(config, 1 if rehearse else _REPEATS, tuple(options["parts"]))

  found = largest(options["batches"], measure)
  found |= step.of_peak(found, before, step.matrix_peak(size))
  parts = [found["milliseconds"].get(k) for k in ("augment", "forward", "update")]
  if None not in parts:
    rest = found["milliseconds"]["step"] - sum(parts)
    found["milliseconds"]["backward_and_optimizer"] = round(rest, 3)
  if "ready" in found["milliseconds"]:
    ready = found["milliseconds"]["ready"] / 1e3
    found["img_per_s_ready"] = round(found["batch_size"] / ready, 1)
    found["share_of_peak_ready"] = (
      found["flops_without_augmentation"] / ready / found["matrix_peak"]
    )
  return found


def median_seconds(call, wait, rounds: int) -> float:
  """Of `call()` until `wait()` says it is done; two more go before."""
  seconds = []
  for i in range(rounds + 2):
    start = time.perf_counter()
    call()
    wait()
    if i > 1:
      seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)
