"""Where a training step's time goes: python -m benchmarks.step --config=configs/gmm_cifar10.py

Times the compiled step and its parts on images in memory (no decoding), each part a program of its
own, the median of several runs taken in turn, so that a drifting machine drifts for all of them.
Prints one JSON line. Shares are of the whole step; alone, parts are fused differently than inside
it, so they need not add up to one. "backward" is value_and_grad minus forward; "update" is
method.update: teacher average, centre and, unless `method.em_order` is before_loss (then it is in
"forward"), EM; "prototypes" is the EM step alone; "ready" the whole step on views that are ready.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flops
from protojax import environment, losses, recipes, resolving, trees
from protojax.data import augment
from protojax.prototypes import prototype_set
from protojax.training import programs, sharding, train_step

PARTS = ("augment", "forward", "gradient", "update", "prototypes", "ready")


def matrix_peak(size: int, dtype=jnp.bfloat16) -> float:
  """Operations a second of a matrix product [size, size] x [size, size], the best of 5."""
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  x *= jnp.asarray(size**-0.5, dtype)  # so that powers stay of one size
  product = jax.jit(jnp.matmul)
  y, rounds, best = product(x, x), 10, float("inf")
  jax.block_until_ready(y)
  for _ in range(5):
    start = time.perf_counter()
    for _ in range(rounds):
      y = product(y, x)
    jax.block_until_ready(y)
    best = min(best, time.perf_counter() - start)
  return 2.0 * size**3 * rounds / best


def of_peak(found: dict, before: float, after: float) -> dict:
  """ "matrix_peak" and "share_of_peak" of what `measure` has found.

  Args:
    found: of `measure`.
    before, after: `matrix_peak` of one device before the step and after it; the larger counts.
  """
  peak = max(before, after)
  seconds = found["milliseconds"]["step"] / 1e3
  return {"matrix_peak": peak, "share_of_peak": found["flops"] / seconds / peak / found["devices"]}


def change(config, assignment: str) -> None:
  """Applies "model.patch_size=4" to a config, in the type that the setting has."""
  key, _, value = assignment.partition("=")
  old = trees.flat(config)[key]
  if isinstance(old, bool):
    value = value == "True"
  elif isinstance(old, (int, float)):
    value = type(old)(value)
  elif old is None:
    value = json.loads(value)
  config.update_from_flattened_dict({key: value})


def calls(program, step, parts=PARTS):
  """{part: call without arguments} over arrays that are on the device, and the step itself.

  Args:
    program: `programs.Program` without a probe.
    step: its compiled step.
    parts: of PARTS; "prototypes" is left out where nothing moves by EM.
  """
  config, method, mesh = program.config, program.method, program.mesh
  rng = np.random.default_rng(0)
  size = config.data.image_size
  batch = {
    "image": rng.integers(0, 256, (config.batch_size, size, size, 3), np.uint8),
    "size": np.full((config.batch_size, 2), size, np.int32),
    "index": np.arange(config.batch_size, dtype=np.int32),
  }
  batch = sharding.put_batch(batch, mesh)
  key = jax.random.key(1)
  state = program.init(config.seed)
  variables = train_step.variables_of(state)
  trained, frozen = train_step.split(variables, method.learns_prototypes)
  augmented = jax.jit(augment.make(config.augment))
  made = augmented(key, batch)
  views = {**made, "index": batch["index"]}
  value = jax.jit(lambda t, f, v: method.loss(t, f, v, key, state.step))
  gradient = jax.jit(
    lambda t, f, v: jax.value_and_grad(method.loss, has_aux=True)(t, f, v, key, state.step)
  )
  # Zeros take as long as what a loss hands over, and cost no forward program of their own.
  shapes = jax.eval_shape(value, trained, frozen, views)[1].stats
  stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  update = jax.jit(lambda v, s: method.update(v, s, state.step))
  found = {
    "augment": lambda: augmented(key, batch),
    "forward": lambda: value(trained, frozen, views),
    "gradient": lambda: gradient(trained, frozen, views),
    "update": lambda: update(variables, stats),
  }
  if config.method.prototypes == "mixture" and "prototypes" in parts:
    bank = prototype_set.build(config)
    dim = config.head.bottleneck
    features = jax.random.normal(key, (2 * config.batch_size, dim))  # of the two global views
    features = jax.device_put(losses.l2_normalize(features), sharding.batch_sharding(mesh))
    state_of_one = jax.jit(bank.init)(key)
    move = jax.jit(bank.move)
    found["prototypes"] = lambda: move(state_of_one, features)

  # Both whole steps donate their state.
  states = {"step": program.init(config.seed)}
  if "ready" in parts:
    states["ready"] = program.init(config.seed)
    on_views = jax.jit(
      functools.partial(
        train_step.train_step,
        method=method,
        tx=program.tx,
        evaluation=program.evaluation,
        augment=lambda key, batch: batch["views"],
      ),
      donate_argnums=0,
    )

    def ready():
      given = {"views": made, "index": batch["index"]}
      states["ready"], metrics = on_views(states["ready"], given)
      return metrics

    found["ready"] = ready

  def whole():
    states["step"], metrics = step(states["step"], batch, None)
    return metrics

  return {k: v for k, v in found.items() if k in parts} | {"step": whole}


def measure(config, repeats: int, parts=PARTS) -> dict:
  """Medians over `repeats` rounds, in milliseconds, with shares, operations and memory.

  Args:
    config: unresolved.
    repeats: rounds; one more goes before them.
    parts: of PARTS.
  """
  config = resolving.resolve(config, 50_000)
  program = programs.Program(config)
  with jax.set_mesh(program.mesh):
    start = time.perf_counter()
    compiled = program.lower().compile()
    compile_s = time.perf_counter() - start
    timed = calls(program, compiled, parts)
    seconds = {name: [] for name in timed}
    for i in range(repeats + 1):
      for name, call in timed.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        if i:
          seconds[name].append(time.perf_counter() - start)
  middle = {name: statistics.median(values) for name, values in seconds.items()}
  if "gradient" in middle:
    middle["backward"] = middle.pop("gradient") - middle["forward"]
  step = middle["step"]
  counted = config.copy_and_resolve_references()
  counted.model.attention = "xla"  # a fused kernel hides its products
  counted = programs.Program(counted)
  memory = compiled.memory_analysis()
  return {
    "img_per_s": round(config.batch_size / step, 1),
    "milliseconds": {k: round(1e3 * v, 3) for k, v in middle.items()},
    "share_of_step": {k: round(v / step, 4) for k, v in middle.items() if k != "step"},
    "flops": flops.of_step(counted),
    "flops_without_augmentation": flops.of_step(counted, augment=False),
    "compile_s": round(compile_s, 1),
    "peak_mib": round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20, 1),
    "batch_size": config.batch_size,
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "jax": jax.__version__,
    "repeats": repeats,
  }


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/gmm_cifar10.py")
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--set", nargs="*", default=[], metavar="model.patch_size=4")
  parser.add_argument(
    "--matrix", type=int, help="side of the large product; default: 8192, of a CPU 1024"
  )
  arguments = parser.parse_args()
  environment.keep_memory()
  recipe = recipes.load(arguments.config)
  for assignment in arguments.set:
    change(recipe, assignment)
  side = arguments.matrix or (1024 if jax.default_backend() == "cpu" else 8192)
  first = matrix_peak(side, recipe.precision)
  line = {"config": arguments.config, "set": arguments.set} | measure(recipe, arguments.repeats)
  print(json.dumps(line | of_peak(line, first, matrix_peak(side, recipe.precision))))
