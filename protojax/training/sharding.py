"""Meshes, placement by regular expression, and batches as global arrays.

The mesh has two axes: "model" splits the prototypes, both together split the batch, so that no
device encodes what another does (`placement`). Axes are `Auto`, and said so: JAX is moving to
`Explicit` where it is told nothing, and explicit axes refuse the covariances and batch statistics
that prototype methods are made of.
"""

import functools
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protojax import errors, placement

# First match wins; every leaf must match. Paths look like "teacher/prototypes/v" or, where a method
# has several sets, "prototypes/patch/means".
DEFAULT_RULES = (
  (r"(^|/)prototypes/(\w+/)?(step|kappa|key|feature_mean)$", "replicate"),
  (r"(^|/)prototypes/dictionary$", "dictionary"),
  (r"(^|/)prototypes/", "prototypes"),
  (r"(^|/)carry/center(/|$)", "prototypes"),
  (r"(^|/)carry/queue$", "rows"),
  (r"(^|/)carry/replay$", "images"),
  (r".*", "replicate"),
)
# With `mesh.fsdp`: the encoder, its teacher and what the optimizer keeps of it.
FSDP_RULES = (*DEFAULT_RULES[:-1], (r"(^|/)encoder/", "fsdp"), DEFAULT_RULES[-1])


def make_mesh(data: int = -1, model: int = 1, devices=None) -> jax.sharding.Mesh:
  """The mesh ("data", "model") over all devices of all processes.

  Args:
    data: groups of devices that share the prototypes; -1 takes what `model` leaves.
    model: devices of a group. The batch is split over all devices of all groups.
    devices: list of devices to use instead of all.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if data == -1 and model > 0 and count % model == 0:
    data = count // model
  if data < 1 or model < 1 or data * model != count:
    raise errors.UserError(
      f"mesh.data={data} x mesh.model={model} does not cover {count} device(s): choose sizes "
      "whose product is the number of devices (mesh.data=-1 takes what is left)"
    )
  # In the order of processes, not of the torus as jax.make_mesh would: the rows of a process are
  # contiguous then, which is what makes batches equal for any number of hosts.
  ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
  grid = np.array(ordered).reshape(data, model)
  return jax.sharding.Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _prototypes(shape: tuple[int, ...], mesh: jax.sharding.Mesh, axis: int = 0) -> PartitionSpec:
  """The K axis, which comes first in rows, over "model"."""
  if not shape or mesh.shape["model"] == 1:
    return PartitionSpec()
  if shape[axis] % mesh.shape["model"]:
    raise errors.UserError(
      f"{shape[axis]} prototypes cannot be split over mesh.model={mesh.shape['model']}: choose a "
      "number of prototypes that mesh.model divides"
    )
  return PartitionSpec(*[None] * axis, "model")


_TACTICS = {
  "replicate": lambda shape, mesh: PartitionSpec(),
  "fsdp": lambda shape, mesh: placement.largest(shape, mesh.shape["data"]),
  "prototypes": _prototypes,
  # A memory [B, S, ...] of S batches, each row where it came from: nothing is gathered to keep it.
  "rows": lambda shape, mesh: placement.COMPARED,  # of embeddings
  "images": lambda shape, mesh: placement.ENCODED,
  "dictionary": functools.partial(_prototypes, axis=1),  # [D, K]
}


def state_shardings(abstract: Any, mesh: jax.sharding.Mesh, rules=DEFAULT_RULES) -> Any:
  """Shardings of every leaf of `abstract` (a pytree of arrays or `ShapeDtypeStruct`).

  Args:
    abstract: pytree; a leaf's path is its keys joined with "/".
    mesh: from `make_mesh`.
    rules: pairs (regular expression, a key of _TACTICS: replicate, fsdp, prototypes, dictionary,
      rows or images).

  Raises:
    UserError: if a leaf matches no rule or a rule names no known placement.
  """

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, tactic in rules:
      if re.search(pattern, name):
        if tactic not in _TACTICS:
          raise errors.UserError(
            f"sharding rules: unknown placement {tactic!r} for {pattern!r}; there are "
            f"{', '.join(_TACTICS)}"
          )
        return NamedSharding(mesh, _TACTICS[tactic](leaf.shape, mesh))
    raise errors.UserError(
      f"sharding rules: no rule matches {name!r}; end the rules with ('.*', 'replicate')"
    )

  return jax.tree_util.tree_map_with_path(place, abstract)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Splits the first axis over all devices, in their order."""
  return NamedSharding(mesh, placement.ENCODED)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Puts the array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows_of_process(
  batch_size: int, mesh: jax.sharding.Mesh, name: str = "batch_size"
) -> tuple[int, int]:
  """Which contiguous rows of the global batch this process loads, as (part, number of parts).

  Args:
    batch_size: global.
    mesh: from `make_mesh`.
    name: of the setting, for the message.

  Raises:
    UserError: if the batch cannot be split over the devices.
  """
  if batch_size < 1 or batch_size % mesh.size:
    data, model = mesh.shape["data"], mesh.shape["model"]
    raise errors.UserError(
      f"{name}={batch_size} cannot be split over {mesh.size} devices (mesh.data={data} x "
      f"mesh.model={model}): use a multiple of {mesh.size}"
    )
  owners = [device.process_index for device in mesh.devices.ravel()]
  held = owners.count(jax.process_index())  # every process has as many
  return owners.index(jax.process_index()) // held, mesh.size // held


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Host rows of this process -> global arrays, rows over all devices."""
  target = batch_sharding(mesh)
  # The one transfer a guarded loop means to make; jax takes it for an accident with two processes.
  with jax.transfer_guard("allow"):
    return {k: jax.make_array_from_process_local_data(target, v) for k, v in batch.items()}
