"""Where the rows of a batch lie on a mesh ("data", "model"), from the images to the prototypes.

"model" splits the prototypes. What comes before them has none, so images, views and all that an
encoder makes of them are spread over both axes, or every device of a model group would repeat the
work of the others. Where rows meet prototypes, those of a model group are brought together: one
gather of embeddings, [B, V, D]. What is made of scores stays over "data" and "model".
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

PyTree = Any

AXES = ("data", "model")
ENCODED = PartitionSpec(AXES)  # the first axis of images, views, features
COMPARED = PartitionSpec("data")  # the first axis of what meets prototypes


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


def on_each_device(rows: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Rows [B, ...] -> [m, n, B / n, ...], of which each of n x m devices holds its own [B / n, ...].

  What is computed of the result part by part stays where it is, loops included, and so does its
  gradient until the parts are added up.

  Args:
    rows: placed by `beside_prototypes`.
    shape: (n, m), that of `extent`, or (1, 1) to leave the placement alone.
  """
  n, m = shape
  parts = rows.reshape(1, n, -1, *rows.shape[1:])
  parts = jnp.broadcast_to(parts, (m, *parts.shape[1:]))
  if n * m == 1:
    return parts
  return jax.lax.with_sharding_constraint(parts, PartitionSpec("model", "data"))
