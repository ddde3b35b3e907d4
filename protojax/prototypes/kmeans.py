"""k-means on devices in row chunks, deterministic, and how tight its clusters are."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from protojax import local_devices, progress

_PAIRS = 2**24  # row-centroid pairs held at a time: twice 64 MiB of float32
_SHARPEST = 0.01  # least concentration over the mean one: finite logits for clusters of copies


class Clusters(NamedTuple):
  """What k-means found.

  Attributes:
    centroids: [K, D] float32.
    codes: int32 [N], the nearest centroid of every row.
    counts: [K] float32, rows of every cluster.
    distances: [K] float32, mean Euclidean distance of a cluster's rows to its centroid.
    inertia: [] float32, sum of all squared distances.
  """

  centroids: jax.Array
  codes: jax.Array
  counts: jax.Array
  distances: jax.Array
  inertia: jax.Array


def _assign(rows, real, centroids):
  """(sums of rows [K, D], sums of distances [K], counts [K], codes [N], squared distances [N]).

  `real` [N] is 1, and 0 for a row that is padding: it adds nothing, and its distance is 0. Sums are
  products with one-hot codes: a scatter would add in another order each time on a GPU.
  """
  (num, dim), k = rows.shape, centroids.shape[0]
  chunk = max(1, min(num, _PAIRS // k))
  padding = -num % chunk
  parts = jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, chunk, dim)
  real = jnp.pad(real, (0, padding)).reshape(-1, chunk)
  half_norms = 0.5 * jnp.sum(jnp.square(centroids), axis=1)
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

  def one(totals, part):
    x, weight = part
    codes = jnp.argmax(product(x, centroids.T) - half_norms[None, :], axis=1).astype(jnp.int32)
    squares = weight * jnp.sum(jnp.square(x - centroids[codes]), axis=1)
    member = jax.nn.one_hot(codes, k) * weight[:, None]
    new = product(member.T, x), product(jnp.sqrt(squares), member), member.sum(axis=0)
    return jax.tree.map(jnp.add, totals, new), (codes, squares)

  start = jnp.zeros((k, dim)), jnp.zeros(k), jnp.zeros(k)
  totals, (codes, squares) = jax.lax.scan(one, start, (parts, real))
  return *totals, codes.reshape(-1)[:num], squares.reshape(-1)[:num]


def lloyd(rows: jax.Array, centroids: jax.Array, num_steps: int) -> Clusters:
  """Lloyd's iterations from given centroids; one that loses all rows goes to the farthest row.

  Args:
    rows: [N, D] float32.
    centroids: [K, D] float32, K <= N.
    num_steps: iterations.
  """
  return _lloyd(_assign, rows, jnp.ones(rows.shape[0]), centroids, num_steps)


def _lloyd(assign, rows, real, centroids, num_steps):
  """`lloyd` by an `assign` such as `_assign`; padding comes last."""

  def step(_, centroids):
    sums, _, counts, _, squares = assign(rows, real, centroids)
    empty = counts == 0
    # The first empty cluster takes the farthest row, the second the next one, ...
    _, far = jax.lax.top_k(squares, centroids.shape[0])
    spare = rows[far[jnp.cumsum(empty) - 1]]
    return jnp.where(empty[:, None], spare, sums / jnp.maximum(counts, 1.0)[:, None])

  centroids = jax.lax.fori_loop(0, num_steps, step, centroids)
  _, distances, counts, codes, squares = assign(rows, real, centroids)
  return Clusters(centroids, codes, counts, distances / jnp.maximum(counts, 1.0), jnp.sum(squares))


def _start(rows, key, num_rows, num_clusters):
  """Distinct ones of the first `num_rows` rows."""
  return rows[jax.random.choice(key, num_rows, (num_clusters,), replace=False)]


def _assign_by_share(rows, real, centroids):
  """`_assign` of rows that `local_devices.split` has spread: only sums leave a device."""

  def of_share(share, centroids):
    *sums, codes, squares = _assign(*share, centroids)
    return [x[None] for x in sums], codes, squares

  sums, codes, squares = local_devices.by_share(of_share)((rows, real), centroids)
  return *(x.sum(axis=0) for x in sums), codes, squares


@functools.partial(jax.jit, static_argnames=("num_rows", "num_clusters", "num_steps"))
def _once_by_share(rows, real, key, *, num_rows, num_clusters, num_steps):
  start = _start(rows, key, num_rows, num_clusters)
  return _lloyd(_assign_by_share, rows, real, start, num_steps)


@functools.partial(jax.jit, static_argnames=("num_clusters", "num_steps", "num_restarts"))
def fit(
  rows: jax.Array, key: jax.Array, *, num_clusters: int, num_steps: int = 20, num_restarts: int = 1
) -> Clusters:
  """k-means from random distinct rows; of several starts the one with the least inertia.

  >>> rows = jnp.asarray([[0.0, 0.1], [0.0, -0.1], [5.0, 0.0]])
  >>> found = fit(rows, jax.random.key(0), num_clusters=2, num_restarts=4)
  >>> bool(found.codes[0] == found.codes[1] != found.codes[2])
  True
  >>> print(found.centroids.shape, sorted(found.counts.tolist()))
  (2, 2) [1.0, 2.0]

  Args:
    rows: [N, D], any float dtype; a copy of them and 128 MiB are held besides.
    key: the only source of randomness.
    num_clusters: K, at most N.
    num_steps: Lloyd's iterations.
    num_restarts: starts, one after the other.
  """
  rows = rows.astype(jnp.float32)
  runs = jax.lax.map(
    lambda key: lloyd(rows, _start(rows, key, len(rows), num_clusters), num_steps),
    jax.random.split(key, num_restarts),
  )
  best = jnp.argmin(runs.inertia)
  return jax.tree.map(lambda x: x[best], runs)


def fit_by_starts(
  rows: jax.Array, key: jax.Array, *, num_clusters: int, num_steps: int = 20, num_restarts: int = 1
) -> Clusters:
  """`fit` on all devices of this process, start by start; not for inside of a jit.

  Every device holds its share of the rows; sums of clusters and single rows go between them, so
  that centroids are those of `fit` up to rounding. The host says how many starts are done.

  Args:
    rows: [N, D], any float dtype, that the host can read.
    key: as of `fit`, with the same starts.
    num_clusters: K, at most N.
    num_steps: Lloyd's iterations.
    num_restarts: starts; of equally good ones the first is taken.

  Returns:
    As `fit`, in NumPy's arrays.
  """
  num, best = len(rows), None
  spread, real = local_devices.split((np.asarray(rows, np.float32), np.ones(num, np.float32)))
  for start in progress.over(jax.random.split(key, num_restarts), "k-means, start"):
    found = _once_by_share(
      spread, real, start, num_rows=num, num_clusters=num_clusters, num_steps=num_steps
    )
    if best is None or found.inertia < best.inertia:
      best = found
  found = jax.device_get(best)
  return found._replace(codes=found.codes[:num])


def concentration(distances: jax.Array, counts: jax.Array, temperature: float) -> jax.Array:
  """Temperature of every cluster, small where it is tight (arXiv 2005.04966).

  phi = mean distance / ln(n + 10); clusters of one row or none take the largest; all are clipped to
  the 10th and 90th percentile and scaled to the mean `temperature`. A floor of a hundredth of that
  is ours: it acts only where many clusters consist of copies.

  Args:
    distances: [K] mean Euclidean distance of the rows to their centroid.
    counts: [K] rows.
    temperature: mean of the result.

  Returns:
    [K] float32, positive.
  """
  phi = distances / jnp.log(counts + 10.0)
  several = counts > 1
  phi = jnp.where(several, phi, jnp.max(jnp.where(several, phi, 0.0)))
  low, high = jnp.percentile(phi, jnp.array([10.0, 90.0]))
  phi = jnp.clip(phi, low, high)
  phi = phi / jnp.maximum(phi.mean(), jnp.finfo(phi.dtype).tiny)
  return temperature * jnp.maximum(phi, _SHARPEST)
