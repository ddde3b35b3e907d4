"""The devices of this process, which share work that splits by rows.

For evaluations: every process holds all their arrays on its host and computes the same, so none of
them waits for another, but each uses all the devices that it has.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
AXIS = "rows"


@functools.cache
def mesh() -> Mesh:
  """One axis, `AXIS`, over the devices of this process."""
  return Mesh(np.array(jax.local_devices()), (AXIS,), axis_types=(AxisType.Auto,))


def split(rows: PyTree, multiple: int = 1) -> PyTree:
  """Puts an equal share of the rows on every device.

  Args:
    rows: pytree of arrays [N, ...] that the host can read.
    multiple: of which every share's rows are one.

  Returns:
    The same with [N + padding, ...]; the padding is zeros and comes last.
  """
  over = NamedSharding(mesh(), PartitionSpec(AXIS))

  def put(x):
    x = np.asarray(x)
    padding = -len(x) % (mesh().size * multiple)
    return jax.device_put(np.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))), over)

  return jax.tree.map(put, rows)


def everywhere(x: Any) -> jax.Array:
  """Puts an array that the host can read on every device, whole."""
  return jax.device_put(np.asarray(x), NamedSharding(mesh(), PartitionSpec()))


def on_each(function: Callable, *, in_specs: PyTree, out_specs: PyTree) -> Callable:
  """`jax.shard_map` over `mesh()`, also for a caller who is in `jax.set_mesh` of a training."""
  shared = jax.shard_map(
    function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False
  )

  def run(*args):
    with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
      return shared(*args)

  return run


def by_share(function: Callable, *, summed: bool = False) -> Callable:
  """Runs a function of rows on every device's share of them; to be called inside of `jax.jit`.

  Args:
    function: (rows, shared) -> rows or, if `summed`, arrays of a share that add up to those of all.
      Both are pytrees.
    summed: whether the results are added over the devices.

  Returns:
    The function of all rows, as from `split`, and of what every device gets whole.
  """

  def of_share(rows, shared):
    out = function(rows, shared)
    return jax.lax.psum(out, AXIS) if summed else out

  return on_each(
    of_share,
    in_specs=(PartitionSpec(AXIS), PartitionSpec()),
    out_specs=PartitionSpec() if summed else PartitionSpec(AXIS),
  )
