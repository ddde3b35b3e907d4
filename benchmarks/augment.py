"""Times the augmentation, whole and by stage; prints one JSON line each.

  python benchmarks/augment.py [--batch 128] [--preset cifar|imagenet] [--repeats 20]

Images a second are images of the batch, each with all its views. Every number is a median over the
repeats of one call that blocks until the device is done; compiling is timed apart. "draw" makes
keys and random numbers; "crop", "jitter" and "blur" run alone on inputs that lie ready; "all" is
the augmentation as the training step calls it.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from protojax import config as config_lib
from protojax.data import augment, color, resize


def _config(preset: str):
  config = config_lib.default().augment
  if preset == "cifar":
    config.update({
      "global_size": 32, "local_size": 16, "num_local": 4,
      "blur_prob": (0.0, 0.0, 0.0), "solarize_prob": (0.0, 0.2, 0.0),
    })  # fmt: skip
  return config


def _measure(fn, args, repeats: int) -> tuple[float, float]:
  """(seconds to compile, median seconds of a call)."""
  start = time.perf_counter()
  compiled = jax.jit(fn).lower(*args).compile()
  compile_s = time.perf_counter() - start
  jax.block_until_ready(compiled(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    times.append(time.perf_counter() - start)
  return compile_s, statistics.median(times)


def _stages(config, batch, stored: int):
  """{stage: (function, arguments)}."""
  rng = np.random.default_rng(0)
  groups = [(2, config.global_size, config.global_scale)]
  if config.num_local:
    groups.append((config.num_local, config.local_size, config.local_scale))
  images = jnp.asarray(rng.integers(0, 256, (batch, stored, stored, 3), np.uint8))
  sizes = jnp.full((batch, 2), stored, jnp.int32)
  corner = [rng.uniform(0, stored / 3, (batch, v, 2)).astype(np.float32) for v, _, _ in groups]
  boxes = [jnp.asarray(np.concatenate([c, c + stored / 2], axis=-1)) for c in corner]
  crops = [jnp.asarray(rng.random((batch, v, s, 3, s), np.float32)) for v, s, _ in groups]
  factors = [
    jnp.asarray(rng.uniform(0.8, 1.2, (batch, v, 4)).astype(np.float32)) for v, _, _ in groups
  ]
  order = [jnp.asarray(rng.random((batch, v), np.float32)) for v, _, _ in groups]

  def crop(images, boxes):
    return [resize.crop_resize(images, b, s) for b, (_, s, _) in zip(boxes, groups, strict=True)]

  def jitter(crops, factors, order):
    slots = [augment.sample_slots(u) for u in order]
    return [color.color_jitter(*z) for z in zip(crops, factors, slots, strict=True)]

  def blur(crops, order):
    return [color.gaussian_blur(x, 2.0 * u) for x, u in zip(crops, order, strict=True)]

  batch = {"image": images, "size": sizes}
  return {
    "draw": (
      lambda key: augment.draw(key, images.shape[0], 2 + config.num_local),
      (jax.random.key(0),),
    ),
    "crop": (crop, (images, boxes)),
    "jitter": (jitter, (crops, factors, order)),
    "blur": (blur, (crops, order)),
    "all": (augment.make(config), (jax.random.key(0), batch)),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--preset", choices=("cifar", "imagenet"), default="cifar")
  parser.add_argument("--repeats", type=int, default=20)
  args = parser.parse_args()
  config = _config(args.preset)
  stored = 32 if args.preset == "cifar" else 256
  for stage, (fn, inputs) in _stages(config, args.batch, stored).items():
    compile_s, seconds = _measure(fn, inputs, args.repeats)
    print(
      json.dumps(
        {
          "benchmark": "augment",
          "stage": stage,
          "preset": args.preset,
          "batch": args.batch,
          "num_local": config.num_local,
          "img_per_s": round(args.batch / seconds, 1),
          "ms": round(1e3 * seconds, 3),
          "compile_s": round(compile_s, 3),
          "repeats": args.repeats,
          "backend": jax.default_backend(),
          "device": jax.devices()[0].device_kind,
          "jax": jax.__version__,
        }
      ),
      flush=True,
    )


if __name__ == "__main__":
  main()
