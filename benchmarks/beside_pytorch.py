"""DINO's step beside the same in PyTorch, on this CPU: python -m benchmarks.beside_pytorch

Both in float32 on views that are ready, ours compiled, PyTorch's as it is written (`peers`). Timed
in turn, ours, PyTorch, ours, PyTorch, seven steps each time; a ratio is PyTorch's median over ours,
above 1 where ours is faster. Only on a machine that does nothing else: under load PyTorch's threads
wait for one another. Needs PyTorch (`pip install -e ".[peers]"`); writes
docs/results/beside_pytorch.json and prints the table, some minutes.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import runs, step
from protojax import environment, recipes, resolving
from protojax.training import programs

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "beside_pytorch.json"
_DINO = {"method.targets": "center", "method.prototypes": "learned", "precision": "float32"}
CASES = {
  "README's net: width 96, depth 4, 32 px, 128 images": ("configs/dino_cifar10.py", {}),
  "ViT-Ti/4, 32 px, 64 images": (
    "configs/dino_cifar10.py",
    {
      "model.width": 192,
      "model.depth": 12,
      "model.heads": 3,
      "model.patch_size": 4,
      "batch_size": 64,
    },
  ),
  "ViT-S/16, 224 px, 2 + 2 crops, 4 images": (
    "configs/dino_vit_s.py",
    {"augment.num_local": 2, "batch_size": 4},
  ),
}


def _times(call: Callable[[], object], repeats: int) -> list[float]:
  call()  # threads wake up
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
  return seconds


def measured(recipe: str, changes: dict, repeats: int = 7) -> dict:
  """Seconds of both in turn: {"ours": [median, median], "pytorch": ..., "ratio"}."""
  import torch

  from benchmarks import peers

  config = recipes.load(str(runs.ROOT / recipe))
  with config.unlocked():
    config.update_from_flattened_dict(_DINO | changes)
  config = resolving.resolve(config, 50_000)
  program = programs.Program(config)
  compiled = program.lower().compile()
  ready = step.calls(program, compiled, ("ready",))["ready"]
  look = config.augment
  sizes = {"global": (2, look.global_size)}
  if look.num_local:
    sizes["local"] = (look.num_local, look.local_size)
  rng = np.random.default_rng(0)
  views = {
    name: torch.from_numpy(
      rng.normal(size=(config.batch_size, num, size, size, 3)).astype(np.float32)
    )
    for name, (num, size) in sizes.items()
  }
  torch.manual_seed(0)
  theirs = peers.make_step(peers.build(config, device="cpu"), compiled=False)
  calls = {"ours": lambda: jax.block_until_ready(ready()), "pytorch": lambda: theirs(views).item()}
  found = {name: [] for name in calls}
  for _ in range(2):
    for name, call in calls.items():
      found[name].append(statistics.median(_times(call, repeats)))
  means = {name: statistics.mean(medians) for name, medians in found.items()}
  return found | {"ratio": means["pytorch"] / means["ours"]}


def table(rows: dict[str, dict]) -> str:
  """Markdown, milliseconds."""
  lines = ["| step | ours | PyTorch | ratio |", "|---|---|---|---|"]
  for name, found in rows.items():
    ours, theirs = (", ".join(f"{1e3 * s:.0f}" for s in found[k]) for k in ("ours", "pytorch"))
    lines.append(f"| {name} | {ours} | {theirs} | {found['ratio']:.2f} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.parse_args()
  if importlib.util.find_spec("torch") is None:
    parser.error('PyTorch is not installed: pip install -e ".[peers]"')
  environment.keep_memory()
  rows = {}
  for name, case in CASES.items():
    rows[name] = measured(*case)
    print(f"{name}: {rows[name]['ratio']:.2f}", flush=True)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "torch")}
  about = versions | {"commit": runs.commit(), "processors": os.cpu_count()}
  RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
  print(table(rows))


if __name__ == "__main__":
  main()
