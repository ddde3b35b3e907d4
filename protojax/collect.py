"""One pass of a compiled function over the images of a source, gathered on the host."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from protojax import sharding
from protojax.data import pipeline, source

PyTree = Any


def rows(
  forward: Callable[[dict[str, jax.Array]], PyTree],
  data: source.Source,
  *,
  mesh: jax.sharding.Mesh,
  batch_size: int,
  image_size: int,
  num_workers: int = 0,
  limit: int = 0,
) -> PyTree:
  """What `forward` makes of every image that can be read, in the order of the source.

  Args:
    forward: of a batch {"image": uint8 [B, S, S, 3], "size": int32 [B, 2], "index", "label": int32
      [B]} of global arrays, rows over "data", to a pytree of replicated arrays [B, ...].
    data: from `source.build`.
    mesh: from `sharding.make_mesh`.
    batch_size: B at least; rounded up to a multiple of the mesh's "data".
    image_size: S, storage size in pixels.
    num_workers: processes that decode; 0 uses threads.
    limit: at most so many images, evenly spread; 0 takes all.

  Returns:
    The same pytree of NumPy arrays [N, ...], whole in every process.

  Raises:
    UserError: if not one image can be read.
  """
  size = -(-batch_size // mesh.shape["data"]) * mesh.shape["data"]
  part, count = sharding.rows_of_process(size, mesh)
  batches = pipeline.sequential(
    data, batch_size=size, image_size=image_size, limit=limit or None, num_workers=num_workers,
    process_index=part, process_count=count,
  )  # fmt: skip
  seen = []
  for batch in batches:
    batch = {k: batch[k] for k in ("image", "size", "index", "label", "mask")}
    batch = sharding.put_batch(batch, mesh)
    out = jax.device_get({"out": forward(batch), "mask": _whole(batch["mask"], mesh)})
    seen.append(jax.tree.map(lambda x, keep=out["mask"]: x[keep], out["out"]))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *seen)


def _whole(x: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
  return jax.device_put(x, sharding.replicated(mesh))
