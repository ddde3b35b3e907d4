"""The smallest config that still has every part, batches of random images for it, a little run."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from protojax import config as configs
from protojax import recipes, resolving
from protojax.data import sources
from protojax.prototypes import soft
from protojax.training import programs, sharding

ROOT = pathlib.Path(__file__).parents[1]
# A little run for the library and for the program: 6 steps on digits.
RUN = {
  "num_steps": 6,
  "batch_size": 16,
  "log_every": 1,
  "save_every": 2,
  "eval_every": 6,
  "monitor.every": 6,
  "monitor.images": 32,
  "probe.limit": 64,
  "augment.global_size": 16,
  "augment.local_size": 8,
  "model.depth": 2,
  "model.width": 48,
  "head.hidden": 32,
  "head.bottleneck": 16,
  "method.num_prototypes": 32,
}


def run_config(recipe="quickstart", changes=RUN, **more):
  """The config of a recipe's `:debug` mode with these changes and more, by dotted key."""
  c = recipes.load(str(ROOT / "configs" / f"{recipe}.py:debug"))
  for key, value in (changes | more).items():
    section, _, leaf = key.rpartition(".")
    (c[section] if section else c)[leaf] = value
  return c


def arrays(path):
  """What an .npz file holds, by name; the file is closed."""
  with np.load(path) as file:
    return dict(file)


def unresolved(**changes):
  """The default config with 100 steps and these changes, by dotted key."""
  config = configs.default()
  config.num_steps = 100
  for key, value in changes.items():
    section, _, leaf = key.replace("__", ".").rpartition(".")
    (config[section] if section else config)[leaf] = value
  return config


def config(name="dino", prototypes="mixture", **overrides):
  """A resolved config: one block, 16 px, K = 32, D = 16, batch 16; overrides by dotted key."""
  c = configs.debug(configs.default(name))
  c.update(
    {"num_steps": 6, "steps_per_epoch": 4, "log_every": 1, "save_every": 100, "eval_every": 100}
  )
  c.monitor.update({"every": 100, "images": 32})
  c.probe.update({"limit": 64, "batch_size": 16})
  c.augment.update({"global_size": 16, "local_size": 8, "num_local": 2})
  c.model.update({"depth": 1, "width": 32, "heads": 2, "drop_path": 0.0})
  c.head.update({"hidden": 32, "bottleneck": 16})
  c.method.update({"prototypes": prototypes, "num_prototypes": 32})
  c.optim.update({"freeze_prototypes_epochs": 0.0, "lr": 0.05})
  c.mixture.horizon_steps = 20.0
  for key, value in overrides.items():
    section, _, leaf = key.replace("__", ".").rpartition(".")
    (c[section] if section else c)[leaf] = value
  return resolving.resolve(c, 64)


def batch(c, seed=0):
  """A host batch of random smooth images, as `data.pipeline.batches` gives them."""
  rng = np.random.default_rng(seed)
  size = c.data.image_size
  low = rng.uniform(0, 255, (c.batch_size, 4, 4, 3))
  image = np.asarray(jax.image.resize(low, (c.batch_size, size, size, 3), "linear"))
  return {
    "image": image.clip(0, 255).astype(np.uint8),
    "size": np.full((c.batch_size, 2), size, np.int32),
    "index": np.arange(c.batch_size, dtype=np.int32),
  }


def scores(x):
  """Scores that are there already, [B, ..., K], as a loss takes them."""
  return soft.Scores(x, jnp.eye(x.shape[-1], dtype=x.dtype))


@functools.cache
def _digits():
  return np.stack([row["image"] for row in sources.build("digits", split="train").read(range(64))])


def digits(c, step):
  """A host batch like `batch`, of 64 handwritten digits that come round again."""
  index = (step * c.batch_size + np.arange(c.batch_size, dtype=np.int32)) % 64
  return {**batch(c), "image": _digits()[index], "index": index}


def run_steps(c, steps, devices=None, num_classes=0):
  """(program, state, [metrics]) after `steps` updates on one random batch."""
  program = programs.Program(c, num_classes, devices=devices)
  with jax.set_mesh(program.mesh):
    state = program.init(c.seed)
    rows = batch(c)
    if num_classes:
      rows["label"] = np.arange(c.batch_size, dtype=np.int32) % num_classes
    rows = sharding.put_batch(rows, program.mesh)
    metrics = []
    for _ in range(steps):
      state, out = program.step(state, rows, None)
      metrics.append({k: float(v) for k, v in out.items()})
  return program, state, metrics


def abstract_views(c):
  """Shapes of the views of a batch, without "index"."""
  look = c.augment
  shapes = {"global": (2, look.global_size, look.global_size, 3)}
  if look.num_local:
    shapes["local"] = (look.num_local, look.local_size, look.local_size, 3)
  return {
    name: jax.ShapeDtypeStruct((c.batch_size, *shape), jnp.float32)
    for name, shape in shapes.items()
  }
