"""One pass of a compiled function over the images of a source, gathered on the host."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from protojax import progress
from protojax.data import cache, pipeline, sources
from protojax.training import sharding

PyTree = Any
_KEYS = ("image", "size", "index", "label")


def chunks(
  forward: Callable[[dict[str, jax.Array]], PyTree],
  data: sources.Source,
  *,
  mesh: jax.sharding.Mesh,
  batch_size: int,
  image_size: int,
  num_workers: int | None = 0,
  limit: int = 0,
  cached: cache.Cache | None = None,
) -> Iterator[PyTree]:
  """Runs `forward` on every image that can be read, batch by batch, in their order.

  Warns of every other one.

  Args:
    forward: of a batch {"image": uint8 [B, S, S, C], "size": int32 [B, 2], "index", "label": int32
      [B]} of global arrays, rows over all devices, to a pytree of replicated arrays [B, ...].
    data: from `sources.build`.
    mesh: from `sharding.make_mesh`.
    batch_size: B at least; rounded up to a multiple of the mesh's devices.
    image_size: S, storage size in pixels.
    num_workers: processes that decode; 0 uses threads, None chooses.
    limit: at most so many images, evenly spread; 0 takes all.
    cached: `data` on the devices, which takes the host's place.

  Yields:
    The same pytree of NumPy arrays [n, ...], n up to B, the same in every process.

  Raises:
    UserError: if not one image can be read.
  """
  size = -(-batch_size // mesh.size) * mesh.size
  if cached is None:
    batches = _from_host(data, mesh, size, image_size, num_workers, limit or None)
  else:
    for row in cached.skipped[cached.skipped >= 0]:
      pipeline.tell_unreadable(data.describe(int(row)))
    batches = cache.sequential(cached, batch_size=size, limit=limit or None, keys=_KEYS)
  total, done = min(limit or len(data), len(data)), 0
  with progress.during(f"encoding {data.name}", total) as line, contextlib.closing(batches):
    for out, keep in _one_late((forward(batch), mask) for batch, mask in batches):
      yield jax.tree.map(lambda x, keep=keep: x[keep], out)
      done += size
      line.to(min(total, done))


def _one_late(results: Iterator[PyTree]) -> Iterator[PyTree]:
  """Fetches each of the results when the next one is under way: the device never waits for it."""
  before = None
  for result in results:
    if before is not None:
      yield jax.device_get(before)
    before = result
  if before is not None:
    yield jax.device_get(before)


def rows(
  forward: Callable[[dict[str, jax.Array]], PyTree], data: sources.Source, **options: Any
) -> PyTree:
  """The results of `chunks`, which takes the same arguments, in one: NumPy arrays [N, ...]."""
  parts = list(chunks(forward, data, **options))
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _from_host(data, mesh, batch_size, image_size, num_workers, limit):
  """Yields (batch, mask bool [B] on every device), once over the images."""
  part, count = sharding.rows_of_process(batch_size, mesh)
  batches = pipeline.sequential(
    data,
    batch_size=batch_size,
    image_size=image_size,
    limit=limit,
    num_workers=num_workers,
    process_index=part,
    process_count=count,
  )
  with contextlib.closing(batches):  # at once, also where the caller stops before the end
    log = pipeline.SkippedLog(data.describe)
    for batch in batches:
      for name in log.update(batch["skipped"]):
        pipeline.tell_unreadable(name)
      put = sharding.put_batch({k: batch[k] for k in (*_KEYS, "mask")}, mesh)
      mask = jax.device_put(put.pop("mask"), sharding.replicated(mesh))
      yield put, mask
