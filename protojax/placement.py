"""Where the rows of a batch lie on a mesh ("data", "model"), from the images to the prototypes.

"model" splits the prototypes. What comes before them has none, so images, views and all that an
encoder makes of them are spread over both axes, or every device of a model group would repeat the
work of the others. Where rows meet prototypes, those of a model group are brought together: one
gather of embeddings, [B, V, D]. What is made of scores stays over "data" and "model".
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

PyTree = Any

AXES = ("data", "model")
ENCODED = PartitionSpec(AXES)  # the first axis of images, views, features
COMPARED = PartitionSpec("data")  # the first axis of what meets prototypes


_LARGE = 2**18  # numbers, 1 MiB of float32: smaller ones are not worth a gather


def largest(shape: tuple[int, ...], size: int) -> PartitionSpec:
  """The largest dimension that `size` divides over "data": how `mesh.fsdp` stores parameters.

  None of small arrays, nor where `size` is 1.
  """
  dims = [d for d in range(len(shape)) if shape[d] % size == 0 and shape[d] >= size]
  if size == 1 or not dims or math.prod(shape) < _LARGE:
    return PartitionSpec()
  first = max(dims, key=lambda d: shape[d])
  return PartitionSpec(*[None] * first, "data")


def extent() -> tuple[int, int]:
  """Devices along "data" and along "model" of the mesh of `jax.set_mesh`; 1 and 1 without one."""
  shape = jax.sharding.get_abstract_mesh().shape
  return shape.get("data", 1), shape.get("model", 1)


def beside_prototypes(rows: PyTree) -> PyTree:
  """Arrays [B, ...] where prototypes are: over "data", the same on all devices of a model group.

  It acts under jit inside `jax.set_mesh`, where the mesh splits prototypes; elsewhere it returns
  what it was given. A gradient goes back the same way.
  """
  if extent()[1] == 1:
    return rows
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, COMPARED), rows)


def parts(rows: jax.Array) -> jax.Array:
  """Rows [B, ...] as they are encoded -> [N, B / N, ...], of which each of N devices holds its own.

  What is computed part by part is computed without an exchange, until the parts are added up. N is
  1 where the devices of the mesh do not divide B.
  """
  devices = math.prod(extent())
  if devices == 1 or rows.shape[0] % devices:
    return rows[None]
  own = rows.reshape(devices, -1, *rows.shape[1:])
  return jax.lax.with_sharding_constraint(own, ENCODED)


def over_rows(function: Callable, in_specs: PyTree, count: int) -> Callable:
  """A function of `count` rows on every device for its own, as they are encoded.

  The compiler would do the same, but for one thing: the gradient of what a loop reads whole is
  added up over the devices once, behind the loop, and not in every turn.

  Args:
    function: of arrays; gives rows, [count, ...].
    in_specs: of its arguments: `ENCODED` for rows, `PartitionSpec()` for what each device reads
      whole.
    count: where the devices of the mesh do not divide it the compiler divides the work.
  """
  devices = math.prod(extent())
  if devices == 1 or count % devices:
    return function
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=ENCODED, axis_names=set(AXES), check_vma=False
  )


def parts_beside_prototypes(rows: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Rows [B, ...] from `beside_prototypes` -> [m, n, B / n, ...], m copies, one for each device.

  As in `parts`, and a gradient is added up over the copies at the end alone, behind loops.

  Args:
    rows: n divides B.
    shape: (n, m), that of `extent`, or (1, 1) to leave the placement to the compiler.
  """
  n, m = shape
  own = rows.reshape(1, n, -1, *rows.shape[1:])
  own = jnp.broadcast_to(own, (m, *own.shape[1:]))
  if n * m == 1:
    return own
  return jax.lax.with_sharding_constraint(own, PartitionSpec("model", "data"))
