"""A data set that lies on the devices, so that a step needs nothing of the host but row numbers.

Every image is decoded once and kept as uint8, rows split over the mesh's devices. A batch is
gathered there in the order of `pipeline.batches`, record for record, so training on it is equal to
the bit to training without: views, checkpoints and resuming know nothing of it.
"""

import os
from collections.abc import Iterator
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from protojax import errors, placement, progress
from protojax.data import pipeline, sources

CHOICES = ("auto", "device", "off")
# What cached data sets may take of a device's memory. CIFAR-10 is .15 GB, ImageNet-1k at 256 px
# 252 GB over all devices together.
SHARE = 1 / 8
_DECODED = 1024  # images decoded at a time


class Cache(NamedTuple):
  """A source on the devices; see `load`.

  Attributes:
    arrays: {"image": uint8 [M, S, S, C], "size": int32 [M, 2], "index", "label": int32 [M]}, rows
      over all devices, as `pipeline.batches` describes them; M is N rounded up to a multiple of
      their number.
    skipped: int32 [N] on the host, the corrupt row that row i stands for, or -1.
    mesh: over which the rows lie.
  """

  arrays: dict[str, jax.Array]
  skipped: np.ndarray
  mesh: jax.sharding.Mesh


def choose(
  choice: str, sources: list[sources.Source], *, image_size: int, images_drawn: int, mesh
) -> list[sources.Source]:
  """Which sources are to be cached.

  With "auto" none if the devices do not say how much memory they have (CPUs do not) or the run is
  shorter than an epoch of the first source; else those, in their order, that fit into `SHARE` of
  a device's memory together. "device" asks for the first in any case; "off" takes none.

  Args:
    choice: `data.cache`.
    sources: the first is the one to train on.
    image_size: S, pixels.
    images_drawn: by the whole run.
    mesh: ("data", "model").

  Raises:
    UserError: for an unknown choice, or "device" with a source that cannot fit.
  """
  if choice not in CHOICES:
    raise errors.UserError(f"data.cache={choice!r} is unknown: choose {', '.join(CHOICES)}")
  if choice == "off":
    return []
  room = _room(mesh)
  if choice == "auto" and (room is None or images_drawn < len(sources[0])):
    return []
  chosen, taken = [], 0
  for one in dict.fromkeys(sources):
    size = -(-len(one) // mesh.size) * image_size**2 * one.channels
    if room is None or taken + size <= room:
      chosen.append(one)
      taken += size
    elif choice == "device" and one is sources[0]:
      raise errors.UserError(
        f"data.cache=device: {one.name} takes {_mib(size)} of each device, more than {_mib(room)}, "
        f"{SHARE:.1%} of its memory: use more devices, a smaller data.image_size or data.cache=off"
      )
  return chosen


def _room(mesh) -> int | None:
  """Bytes that cached data may take of the smallest device of all processes; None if unknown.

  All rows of a process pass through the memory of its host: no more than half of that.
  """
  stats = [device.memory_stats() or {} for device in mesh.local_devices]
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / SHARE / len(stats)
  limit = min([host, *(s.get("bytes_limit", 0) for s in stats)])
  limit = int(limit / 2**20)  # bytes would overflow int32
  if jax.process_count() > 1:  # every process must come to the same answer
    limit = multihost_utils.process_allgather(np.int32(limit)).min()
  return int(limit * 2**20 * SHARE) or None


def _mib(size: int) -> str:
  return f"{size / 2**20:,.0f} MiB"


def load(
  data: sources.Source,
  *,
  image_size: int,
  mesh,
  num_workers: int | None = 0,
  part: int = 0,
  parts: int = 1,
) -> Cache:
  """Decodes all images of `data` and puts them on the devices.

  Args:
    data: from `sources.build`.
    image_size: S, storage size in pixels.
    mesh: ("data", "model").
    num_workers: processes that decode; 0 uses threads, None chooses.
    part: which of `parts` contiguous runs of rows lie on the devices of this process.
    parts: how many there are.

  Raises:
    UserError: if 100 images in a row cannot be read.
  """
  logging.info("decoding %d images of %s to keep them on the devices", len(data), data.name)
  padded = -(-len(data) // mesh.size) * mesh.size
  held = padded // parts
  rows = np.arange(part * held, (part + 1) * held)
  rows[rows >= len(data)] = -1
  arrays = {
    "image": np.empty((held, image_size, image_size, data.channels), np.uint8),
    "size": np.empty((held, 2), np.int32),
    "index": np.empty(held, np.int32),
    "label": np.empty(held, np.int32),
    "skipped": np.empty(held, np.int32),
  }
  batches = pipeline.ordered(
    data, rows, batch_size=min(_DECODED, held), image_size=image_size, num_workers=num_workers
  )
  done = 0
  with progress.Line(f"decoding {data.name}", held) as line:
    for batch in batches:
      count = min(len(batch["index"]), held - done)
      for name, array in arrays.items():
        array[done : done + count] = batch[name][:count]
      done += count
      line.to(done)
  skipped = arrays.pop("skipped")
  if jax.process_count() > 1:
    skipped = multihost_utils.process_allgather(skipped).reshape(-1)
  place = NamedSharding(mesh, placement.ENCODED)
  arrays = {k: jax.make_array_from_process_local_data(place, v) for k, v in arrays.items()}
  logging.info(
    "%s lies on the device%s: %d images, %s",
    data.name,
    "s" if mesh.size > 1 else "",
    len(data),
    _mib(sum(a.nbytes for a in arrays.values())),
  )
  return Cache(arrays, skipped[: len(data)], mesh)


def batches(
  cache: Cache, *, seed: int, step: int, batch_size: int, keys: tuple[str, ...]
) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
  """The batches of `pipeline.batches` from `step` on, as global arrays, rows over all devices.

  Yields:
    ({key: array [B, ...]}, the corrupt rows that were replaced, or -1, int32 [B] on the host).
  """

  def rows_of(step: int) -> np.ndarray:
    return pipeline.shuffled_rows(len(cache.skipped), seed, step * batch_size, batch_size)

  with futures.ThreadPoolExecutor(1) as ahead:  # milliseconds, while the devices are at work
    following = ahead.submit(rows_of, step)
    while True:
      rows = following.result()
      step += 1
      following = ahead.submit(rows_of, step)
      yield gather(cache, rows, keys), cache.skipped[rows]


def sequential(
  cache: Cache, *, batch_size: int, limit: int | None, keys: tuple[str, ...]
) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
  """The batches of `pipeline.sequential`, as global arrays, rows over all devices.

  Yields:
    ({key: array [B, ...]}, mask bool [B] on the host: the rows that count).
  """
  rows = pipeline.spread(len(cache.skipped), limit).astype(np.int32)
  for first in range(0, len(rows), batch_size):
    some = rows[first : first + batch_size]
    mask = np.pad(cache.skipped[some] < 0, (0, batch_size - len(some)))
    yield gather(cache, np.pad(some, (0, batch_size - len(some))), keys), mask


def gather(cache: Cache, rows: np.ndarray, keys: tuple[str, ...]) -> dict[str, jax.Array]:
  """Records of a cache: rows int32 [B], the same in every process -> {key: [B, ...]}."""
  everywhere = NamedSharding(cache.mesh, PartitionSpec())
  with jax.transfer_guard("allow"):
    rows = jax.make_array_from_process_local_data(everywhere, rows)
  return _gather({key: cache.arrays[key] for key in keys}, rows, cache.mesh)


def _pick(arrays, rows):
  """On each device: its own rows of the batch, zeros for others', then everybody's added up."""

  def one(array):
    local = rows - jax.lax.axis_index(placement.AXES) * array.shape[0]
    mine = (local >= 0) & (local < array.shape[0])
    found = array[jnp.where(mine, local, 0)]
    found = jnp.where(jnp.expand_dims(mine, range(1, array.ndim)), found, jnp.zeros_like(found))
    return jax.lax.psum_scatter(found, placement.AXES, scatter_dimension=0, tiled=True)

  return jax.tree.map(one, arrays)


@jax.jit(static_argnums=2)
def _gather(arrays, rows, mesh):
  split, everywhere = placement.ENCODED, PartitionSpec()
  return jax.shard_map(_pick, mesh=mesh, in_specs=(split, everywhere), out_specs=split)(
    arrays, rows
  )
