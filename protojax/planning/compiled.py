"""Compiles the training step of a config for devices that need not be here, and measures it."""

import re
import time
from typing import NamedTuple

import jax
import ml_collections

from protojax import errors, progress, resolving
from protojax.planning import counting, targets
from protojax.training import programs, sharding

_ASSUMED = (0.5, 0.25)  # mean and deviation where a run would measure them: they cost the same


class Memory(NamedTuple):
  """Bytes on one device, as XLA has laid them out; on a TPU in whole tiles.

  Attributes:
    arguments: state and batch.
    results: the next state and the metrics.
    shared: results that take the place of arguments.
    temporary: all that lives only within the step: activations, gradients, what is gathered.
  """

  arguments: int
  results: int
  shared: int
  temporary: int

  @property
  def peak(self) -> int:
    return self.arguments + self.results - self.shared + self.temporary


class Step(NamedTuple):
  """A compiled step; its numbers are those of one device.

  Attributes:
    config: resolved.
    mesh: {"data": size, "model": size}.
    parts: {part of the state, or batch: bytes}, as arrays, without padding.
    places: {path of a leaf of the state: its PartitionSpec as text}.
    memory, counts: None where the step needs more memory than there is.
    refused: what the compiler says it needs and what there is, bytes, where that is more.
    seconds: that lowering and compiling took.
  """

  config: ml_collections.ConfigDict
  mesh: dict[str, int]
  parts: dict[str, int]
  places: dict[str, str]
  memory: Memory | None
  counts: counting.Counts | None
  refused: tuple[float, float] | None
  seconds: float


def resolved(config: ml_collections.ConfigDict, num_images: int) -> ml_collections.ConfigDict:
  """The config of a run on so many images, none of which is read.

  Raises:
    UserError: see `resolving.resolve`.
  """
  config = resolving.resolve(config, num_images)
  with config.unlocked(), config.ignore_type():
    for key, value in zip(("mean", "std"), _ASSUMED, strict=True):
      if resolving.to_be_measured(config, key):
        config.augment[key] = (value,) * config.data.channels
  return config


def compile_step(
  config: ml_collections.ConfigDict, num_classes: int, target: targets.Target
) -> Step:
  """Compiles the step that training would run.

  Args:
    config: of `resolved`.
    num_classes: of the online probe; 0 leaves it out.
    target: devices.

  Raises:
    UserError: if the mesh does not cover the devices, or divides neither batch nor prototypes.
  """
  started = time.perf_counter()
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, target.devices)
  _check_rows(config.batch_size, mesh, "batch_size")
  if num_classes and config.probe.batch_size:
    _check_rows(config.probe.batch_size, mesh, "probe.batch_size")
  program = programs.Program(config, num_classes, devices=target.devices)
  with progress.during(f"lowering the step for {target.name}"):
    lowered = program.lower()
  parts = _parts(program, lowered)
  memory = counts = refused = None
  try:
    title = f"compiling the step for {target.name}"
    with progress.during(title), targets.environment(target.here):
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refused = _too_much(str(error))
    if refused is None:
      raise
  else:
    memory, counts = measure(compiled)
  return Step(
    config,
    dict(program.mesh.shape),
    parts,
    places(program.shardings),
    memory,
    counts,
    refused,
    time.perf_counter() - started,
  )


def measure(compiled: jax.stages.Compiled) -> tuple[Memory, counting.Counts]:
  """Memory and work of a compiled step on one device.

  Raises:
    UserError: if the compiler is newer than this JAX, which then cannot read what it made.
  """
  said = compiled.memory_analysis()
  memory = Memory(
    said.argument_size_in_bytes,
    said.output_size_in_bytes,
    said.alias_size_in_bytes,
    said.temp_size_in_bytes,
  )
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    if "Unknown opcode" not in str(error):
      raise
    raise errors.UserError(
      f"the step was compiled, and jax {jax.__version__} cannot read it ({error}): libtpu is newer "
      f'than it, take the one that goes with it: pip install "jax[tpu]=={jax.__version__}"'
    ) from None
  return memory, counting.count(text)


def places(shardings) -> dict[str, str]:
  """{path of a leaf of a state: the axes of the mesh that split it}; "" on every device."""
  leaves = jax.tree_util.tree_leaves_with_path(shardings)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): ", ".join(
      str(axis) for axis in place.spec
    )
    for path, place in leaves
  }


def _check_rows(count: int, mesh: jax.sharding.Mesh, name: str) -> None:
  """As `sharding.rows_of_process` does, which looks at the devices of this process alone."""
  parts = mesh.size // sharding.batch_sharding(mesh).shard_shape((mesh.size,))[0]
  if count % parts:
    raise errors.UserError(
      f"{name}={count} cannot be split over {parts} devices (mesh.data={mesh.shape['data']}): use "
      f"a multiple of {parts}"
    )


def _parts(program: programs.Program, lowered: jax.stages.Lowered) -> dict[str, int]:
  state, lies = program.abstract, program.shardings
  parts = {
    "encoder": (state.encoder, lies.encoder),
    "prototypes": (state.prototypes, lies.prototypes),
    "teacher": (state.teacher, lies.teacher),
    "optimizer": (state.opt_state, lies.opt_state),
    "queues and probe": (state.carry, lies.carry),
  }
  batch = lowered.args_info[0][1:]
  rows = sharding.batch_sharding(program.mesh)
  parts["batch"] = (batch, jax.tree.map(lambda _: rows, batch))
  return {name: _bytes(*pair) for name, pair in parts.items()}


def _bytes(tree, places) -> int:
  """Of a tree on one device."""

  def size(leaf, place):
    local = jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      local = jax.eval_shape(jax.random.key_data, local)
    return local.size * local.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(size, tree, places)))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _too_much(message: str) -> tuple[float, float] | None:
  """(bytes needed, bytes there) of what a compiler says that ran out of memory."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
  found = found or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", message)
  if not found:
    return None
  needed, unit, there, other = found.groups()
  return float(needed) * _UNITS[unit], float(there) * _UNITS[other]
