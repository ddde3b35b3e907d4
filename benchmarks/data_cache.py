"""What keeping the images on the devices saves: `data.cache=device` against `off`.

  python -m benchmarks.data_cache --data_dir=$PROTOJAX_DATA_DIR [--devices 1] [--batch 512]

CIFAR-10 (JPEG copy). Prints one JSON line: batches a second that are taken and waited for without a
step, steps a second of configs/gmm_cifar10.py, and what filling the cache costs, each the median of
rounds that alternate between the two, so that a drifting machine drifts for both.
"""

import argparse
import json
import statistics
import time

import jax

from protojax import recipes, resolving
from protojax.data import sources
from protojax.training import programs

KEYS = ("image", "size", "index")


def _rate(batches, use, count: int) -> float:
  """Batches a second through `use`, which returns what to wait for in the end."""
  start = time.perf_counter()
  for _ in range(count):
    last = use(next(batches)[0])
  jax.block_until_ready(last)
  return count / (time.perf_counter() - start)


def measure(data_dir: str, *, batch_size: int, rounds: int, steps: int) -> dict:
  """Medians over `rounds`, each of 4 `steps` batches without a step and of `steps` with."""
  config = recipes.load("configs/gmm_cifar10.py")
  config.update({"batch_size": batch_size})
  data = sources.build("cifar10", split="train", data_dir=data_dir)
  program = programs.Program(resolving.resolve(config, len(data)))
  options = {"seed": 0, "step": 0, "batch_size": batch_size, "keys": KEYS}
  with jax.set_mesh(program.mesh):
    start = time.perf_counter()
    cached = jax.block_until_ready(program.load(data))
    fill = time.perf_counter() - start
    streams = {
      "off": program.batches(data, **options),
      "device": program.batches(data, **options, cached=cached),
    }
    step = program.lower().compile()
    state = [program.init(0)]

    def train(batch):
      state[0], metrics = step(state[0], batch, None)
      return metrics

    rates = {(kind, name): [] for kind in ("batches", "steps") for name in streams}
    for i in range(rounds + 1):
      for name, stream in streams.items():
        found = _rate(stream, lambda batch: batch, 4 * steps), _rate(stream, train, steps)
        if i:
          rates["batches", name].append(found[0])
          rates["steps", name].append(found[1])
  middle = {
    f"{kind}_per_s": {name: round(statistics.median(rates[kind, name]), 2) for name in streams}
    for kind in ("batches", "steps")
  }
  return {
    "benchmark": "data_cache",
    "batch_size": batch_size,
    **middle,
    "fill_s": round(fill, 2),
    "mib": round(sum(a.nbytes for a in cached.arrays.values()) / 2**20, 1),
    "rounds": rounds,
    "devices": jax.device_count(),
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--batch", type=int, default=512)
  parser.add_argument("--devices", type=int, help="virtual ones of a CPU")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=10)
  arguments = parser.parse_args()
  if arguments.devices:
    jax.config.update("jax_num_cpu_devices", arguments.devices)
  print(
    json.dumps(
      measure(
        arguments.data_dir,
        batch_size=arguments.batch,
        rounds=arguments.rounds,
        steps=arguments.steps,
      )
    )
  )
