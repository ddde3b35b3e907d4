"""Where the rows of a batch lie on a mesh ("data", "model"), from the images to the prototypes.

"model" splits the prototypes. What comes before them has none, so images, views and all that an
encoder makes of them are spread over both axes, or every device of a model group would repeat the
work of the others. Where rows meet prototypes, those of a model group are brought together: one
gather of embeddings, [B, V, D]. What is made of scores stays over "data" and "model".
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

PyTree = Any

AXES = ("data", "model")
ENCODED = PartitionSpec(AXES)  # the first axis of images, views, features
COMPARED = PartitionSpec("data")  # the first axis of what meets prototypes


def beside_prototypes(rows: PyTree) -> PyTree:
  """Arrays [B, ...] where prototypes are: over "data", the same on all devices of a model group.

  It acts under jit inside `jax.set_mesh`, where the mesh splits prototypes; elsewhere it returns
  what it was given. A gradient goes back the same way.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get("model", 1) == 1:
    return rows
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, COMPARED), rows)
