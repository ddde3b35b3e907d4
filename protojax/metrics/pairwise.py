"""Which rows are near which: all pairs once, or some rows with all, on every device of a process.

Rows are compared by cosine distance 1 - cos(a, b) in float32; no K x K array is ever built.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from protojax import local_devices

# Of cosine distance; the ones of arXiv 2510.20108. A larger one is harder to pass.
THRESHOLDS = (0.025, 0.05, 0.1, 0.25, 0.5)
# Rows compared with as many others at a time: what fits a CPU's cache, and what keeps others busy.
_BLOCK, _LARGE_BLOCK = 512, 2048
_LANES = 16  # numbers that a CPU compares at once
_ROWS, _PRODUCTS = 256, 2**26  # rows, and products, of a comparison with all others at a time
_TINY = 1e-12


def unit_rows(rows: jax.Array) -> jax.Array:
  """Scales every row to length one; a row of zeros stays one: [N, D] -> float32 [N, D].

  Divided by the norm: `losses.l2_normalize` multiplies by its reciprocal, which rounds otherwise,
  and measures are compared with those of earlier runs.
  """
  rows = jnp.asarray(rows, jnp.float32)
  return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), _TINY)


def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """[N, D], [M, D] unit rows -> [N, M]; a bfloat16 product would err by as much as a threshold."""
  return 1.0 - jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


class Pairs(NamedTuple):
  """What comparing all pairs of K prototypes gives, T thresholds.

  Attributes:
    owner: int32 [T, K], see `cover`.
    nearest: float32 [K], see `nearest_distances`.
  """

  owner: jax.Array
  nearest: jax.Array


def pairs(prototypes: jax.Array, thresholds: Sequence[float] = THRESHOLDS) -> Pairs:
  """Compares all pairs of prototypes once: K * (K - 1) / 2 * D multiplications in float32.

  Every device of this process compares each block of rows with its share of the blocks before. A
  threshold costs something only where an unrepresented row has another that is nearer.

  Args:
    prototypes: [K, D], any norm.
    thresholds: T cosine distances (static tuple), each covered for itself; may be none.
  """
  prototypes = local_devices.everywhere(prototypes)
  block = _BLOCK if local_devices.mesh().devices[0].platform == "cpu" else _LARGE_BLOCK
  return _pairs(prototypes, thresholds=tuple(thresholds), block=block)


@functools.partial(jax.jit, static_argnames=("thresholds", "block"))
def _pairs(prototypes: jax.Array, *, thresholds: Sequence[float], block: int) -> Pairs:
  num, mesh = prototypes.shape[0], local_devices.mesh()
  block = min(block, num + -num % _LANES)
  padding = -num % block
  rows = unit_rows(prototypes)
  finite = jnp.isfinite(rows).all(axis=1)
  directed = finite & (jnp.abs(rows).max(axis=1) > 0.0)
  rows = jnp.pad(jnp.where(directed[:, None], rows, 0.0), ((0, padding), (0, 0)))
  free = num + padding  # not represented yet
  owner = jnp.where(jnp.pad(directed, (0, padding)), jnp.int32(free), -1)
  owner = jnp.tile(owner, (len(thresholds), 1))
  nearest = jnp.full(num + padding, jnp.inf)
  local, limits = jnp.arange(block), jnp.asarray(thresholds, jnp.float32)
  cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=block)
  put = jax.lax.dynamic_update_slice_in_dim

  def one_block(b, rows, owner, nearest):
    start, device = b * block, jax.lax.axis_index(local_devices.AXIS)
    here = cut(rows, start)
    of_block = start + local < num

    def against(turn, carry):
      found, closest, nearest = carry
      c = jnp.minimum(turn * mesh.size + device, b - 1)  # a device may have one less
      ids = c * block + local
      leads = cut(owner, c * block, axis=1) == ids[None, :]
      distance = _distance(cut(rows, c * block), here)  # all of an earlier block are rows
      near = distance.min(axis=0)
      back = jnp.where(of_block[None, :], distance, jnp.inf)
      # Two minima: a compiler for CPUs makes vectors of the first alone.
      back = back.reshape(block, -1, _LANES).min(axis=1).min(axis=1)
      nearest = put(nearest, jnp.minimum(cut(nearest, c * block), back), c * block, axis=0)

      def led_by(found, t):
        ours = (distance < limits[t]) & leads[t][:, None]
        return jnp.minimum(found, jnp.where(ours, ids[:, None], free).min(axis=0))

      found = [
        jax.lax.cond(
          jnp.any((one == free) & (near < limits[t])),
          functools.partial(led_by, t=t),
          lambda one: one,
          one,
        )
        for t, one in enumerate(found)
      ]
      return found, jnp.minimum(closest, near), nearest

    carry = list(cut(owner, start, axis=1)), cut(nearest, start), nearest
    found, closest, nearest = jax.lax.fori_loop(0, -(-b // mesh.size), against, carry)
    distance = jnp.where(of_block[:, None], _distance(here, here), jnp.inf)
    distance = jnp.where(local[:, None] == local[None, :], jnp.inf, distance)
    closest = jnp.minimum(closest, distance.min(axis=0))
    nearest = put(nearest, closest, start, axis=0)
    if not thresholds:
      return owner, nearest
    found = jax.lax.pmin(jnp.stack(found), local_devices.AXIS)

    def one_row(i, found):
      near = (distance[i][None, :] < limits[:, None]) | (local == i)[None, :]
      leads = (found[:, i] == free)[:, None]
      return jnp.where(leads & near & (found == free), start + i, found)

    found = jax.lax.fori_loop(0, block, one_row, found)
    return put(owner, found, start, axis=1), nearest

  def all_blocks(rows, owner, nearest):
    blocks = (num + padding) // block
    owner, nearest = jax.lax.fori_loop(
      0, blocks, lambda b, carry: one_block(b, rows, *carry), (owner, nearest)
    )
    return owner, jax.lax.pmin(nearest, local_devices.AXIS)

  everywhere = PartitionSpec()
  compared = local_devices.on_each(all_blocks, in_specs=everywhere, out_specs=everywhere)
  owner, nearest = compared(rows, owner, nearest)
  nearest = jnp.where(finite, jnp.maximum(nearest[:num], 0.0), jnp.nan)
  return Pairs(owner[:, :num], nearest)


def cover(prototypes: jax.Array, thresholds: Sequence[float] = THRESHOLDS) -> jax.Array:
  """Representative of every prototype in the greedy cover (arXiv 2510.20108, definition 2.1).

  In index order, the first row that nobody represents represents itself and all unrepresented rows
  nearer than the threshold (strictly). Depends on the order, does not chain.

  `uniqueness.measure` finds the same cover on the host, and counts more.

  Args:
    prototypes: [K, D], any norm.
    thresholds: T cosine distances (static tuple), each covered for itself.

  Returns:
    int32 [T, K], index of each row's representative; -1 for a row that is zero or not finite.
  """
  return pairs(prototypes, thresholds).owner


def unique_counts(prototypes: jax.Array, thresholds: Sequence[float] = THRESHOLDS) -> jax.Array:
  """Counts the prototypes that are no copies of others: the representatives of the greedy `cover`.

  >>> import numpy as np
  >>> unique_counts(np.eye(4)[[0, 1, 2, 2]], thresholds=(0.025, 0.5)).tolist()
  [3, 3]

  Args:
    prototypes: [K, D], any norm.
    thresholds: T cosine distances below which two count as one.

  Returns:
    int32 [T].
  """
  owner = cover(prototypes, tuple(thresholds))
  return jnp.sum(owner == jnp.arange(prototypes.shape[0])[None, :], axis=1, dtype=jnp.int32)


def by_row(function: Callable, queries, rows, numbers=None) -> np.ndarray:
  """[N, ...] of (query [D], its number, unit rows [K, D]) -> numbers; each device has some queries.

  Args:
    function: the same object every time, or it is compiled again.
    queries: [N, D].
    rows: [K, D].
    numbers: int32 [N]; None counts the queries.
  """
  numbers = np.arange(len(queries), dtype=np.int32) if numbers is None else numbers
  numbered = local_devices.split((queries, numbers))
  out = _of_queries(numbered, local_devices.everywhere(rows), function=function)
  return np.asarray(out)[: len(queries)]


@functools.partial(jax.jit, static_argnames="function")
def _of_queries(numbered, rows, *, function):
  at_a_time = max(1, min(_ROWS, _PRODUCTS // rows.shape[0]))

  def share(numbered, rows):
    queries, number = numbered
    rows, queries = unit_rows(rows), unit_rows(queries)
    return jax.lax.map(lambda q: function(*q, rows), (queries, number), batch_size=at_a_time)

  return local_devices.by_share(share)(numbered, rows)


def to_nearest(query: jax.Array, number: jax.Array, rows: jax.Array) -> jax.Array:
  """Cosine distance of a query [D] to the nearest row of [K, D]: float32 []."""
  del number
  return jnp.maximum(_distance(query[None, :], rows)[0].min(), 0.0)


@functools.cache
def one_of_how_many(thresholds: Sequence[float]) -> Callable:
  """Distance of row `number` to the nearest other, and 1 / n at T thresholds: float32 [1 + T]."""
  limits = jnp.asarray(thresholds, jnp.float32)

  def of_row(query, number, rows):
    others = jnp.arange(rows.shape[0]) != number
    distance = jnp.where(others, _distance(query[None, :], rows)[0], jnp.inf)
    directed = jnp.isfinite(query).all() & (jnp.abs(query).max() > 0.0)
    near = jnp.sum(distance[None, :] < limits[:, None], axis=1)
    nearest = jnp.maximum(distance.min(), 0.0)
    return jnp.concatenate([nearest[None], jnp.where(directed, 1.0 / (1 + near), 0.0)])

  return of_row


def _most_similar(query, number, rows):
  """Row of the largest cosine, of equal ones the first: int32 []."""
  del number
  similarity = jnp.matmul(rows, query, precision=jax.lax.Precision.HIGHEST)
  return jnp.argmax(similarity).astype(jnp.int32)


def nearest_prototypes(prototypes: jax.Array, embeddings: jax.Array) -> jax.Array:
  """int32 [N]: row of [K, D] with the largest cosine to each of [N, D]; of equal ones the first."""
  return jnp.asarray(by_row(_most_similar, embeddings, prototypes))


def nearest_distances(prototypes: jax.Array) -> jax.Array:
  """Measures how far each prototype is from its nearest other one: [K, D] -> float32 [K].

  Cosine distances; inf if K = 1. A row of zeros is 1 from all others, one that is not finite has
  NaN.
  """
  return pairs(prototypes, ()).nearest


def nearest_quantiles(prototypes: jax.Array, quantiles=(0.05, 0.5, 0.95)) -> jax.Array:
  """Takes quantiles of `nearest_distances`: float32, as many as asked for."""
  return jnp.quantile(nearest_distances(prototypes), jnp.asarray(quantiles, jnp.float32))
