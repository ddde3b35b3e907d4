"""Measures of collapse: pure functions of arrays. What they mean together: `verdicts.verdict`.

Rows are compared by cosine distance 1 - cos(a, b) in float32; no K x K array is ever built.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from scipy import special

from protojax import local_devices, losses

PyTree = Any

# Of cosine distance; the ones of arXiv 2510.20108. A larger one is harder to pass.
THRESHOLDS = (0.025, 0.05, 0.1, 0.25, 0.5)
# Rows compared with as many others at a time: what fits a CPU's cache, and what keeps others busy.
_BLOCK, _LARGE_BLOCK = 512, 2048
_LANES = 16  # numbers that a CPU compares at once
_ROWS, _PRODUCTS = 256, 2**26  # rows, and products, of a comparison with all others at a time
_NEGLIGIBLE = 1e-3  # expected near pairs of random rows, below which there are none
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


# Partial prototype collapse.


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


def random_prototypes(num: int, dim: int) -> jax.Array:
  """Draws prototypes uniformly from the sphere, the same ones every time: float32 [K, D]."""
  return unit_rows(jax.random.normal(jax.random.key(0), (num, dim)))


def near_share(dim: int, threshold: float) -> float:
  """Probability that two random prototypes of D dimensions are nearer than `threshold`.

  They are uniform on the sphere: half of a cosine distance is distributed as
  Beta((D - 1) / 2, (D - 1) / 2).
  """
  if dim == 1:
    return 0.5  # the same sign
  return float(special.betainc((dim - 1) / 2, (dim - 1) / 2, min(threshold / 2, 1.0)))


def near_pairs(num: int, dim: int, threshold: float) -> float:
  """Expected number of pairs of K random prototypes that are nearer than `threshold`."""
  return num * (num - 1) / 2 * near_share(dim, threshold)


def all_apart(num: int, dim: int, thresholds: Sequence[float] = THRESHOLDS) -> bool:
  """Whether random prototypes have room: fewer than 1e-3 pairs are expected to be near at any."""
  return near_pairs(num, dim, max(thresholds)) < _NEGLIGIBLE


@functools.cache
def random_unique(num: int, dim: int, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
  """Counts the unique ones of random prototypes, as many as K and D allow: int [T].

  Of `random_prototypes`, counted once a process up to the largest threshold with near pairs: where
  fewer than 1e-3 pairs are expected to be near, all K are unique and none is compared.
  """
  counts = np.full(len(thresholds), num)
  crowded = [t for t, limit in enumerate(thresholds) if not all_apart(num, dim, (limit,))]
  if crowded:
    limits = tuple(thresholds[t] for t in crowded)
    counts[crowded] = unique_counts(random_prototypes(num, dim), limits)
  counts.setflags(write=False)
  return counts


class Partners(NamedTuple):
  """How many of K prototypes are unique, and how near others are, by all or by some of them.

  Attributes:
    num: K.
    looked: M, whose partners were looked for among all K; M = K counts, M < K estimates.
    unique: float [T], see `partners`.
    random: float [T], the same of random prototypes with this K and D.
    nearest: float32 [M], cosine distance to the nearest other prototype; inf if K = 1.
  """

  num: int
  looked: int
  unique: np.ndarray
  random: np.ndarray
  nearest: np.ndarray


def partners(
  prototypes: jax.Array, looked: int = 0, thresholds: Sequence[float] = THRESHOLDS
) -> Partners:
  """Counts unique prototypes by all pairs, or estimates their number by those of some with all.

  All: `unique_counts` and `nearest_distances`. Some: M evenly spaced prototypes are compared with
  all K, M * K * D multiplications. One with n - 1 others nearer than the threshold counts 1 / n,
  and K times the mean of that is the estimate. Where copies are copies of one another, as in a
  collapse, its expectation is the number of the greedy cover, whatever M is, with a standard error
  of at most K / (2 sqrt(M)); where nearness does not carry over, it is what a cover in random order
  reaches at least (Caro and Wei's bound). The value of random prototypes is counted on drawn ones
  (`random_unique`), or is the expectation of K / n.

  Args:
    prototypes: [K, D], any norm.
    looked: M; 0, or K and more, takes all.
    thresholds: T cosine distances.
  """
  num, dim = prototypes.shape
  if not 0 < looked < num:
    owner, nearest = pairs(prototypes, thresholds)
    unique = np.sum(np.asarray(owner) == np.arange(num), axis=1)
    random = random_unique(num, dim, tuple(thresholds))
    return Partners(num, num, unique, random, np.asarray(nearest))
  rows = np.asarray(prototypes)
  chosen = (np.arange(looked) * num // looked).astype(np.int32)
  found = _by_row(_one_of_how_many(tuple(thresholds)), rows[chosen], rows, chosen)
  share = np.array([near_share(dim, limit) for limit in thresholds])
  # The expectation of 1 / n, n - 1 of K - 1 being near with this probability each.
  random = -np.expm1(num * np.log1p(-share)) / np.maximum(share, np.finfo(float).tiny)
  random = np.where(num * share < 1e-9, num, random)
  return Partners(num, looked, num * found[:, 1:].mean(axis=0), random, found[:, 0])


def _by_row(function: Callable, queries, rows, numbers=None) -> np.ndarray:
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


def _nearest(query, number, rows):
  """Cosine distance of a query to the nearest row: float32 []."""
  del number
  return jnp.maximum(_distance(query[None, :], rows)[0].min(), 0.0)


@functools.cache
def _one_of_how_many(thresholds: Sequence[float]) -> Callable:
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
  return jnp.asarray(_by_row(_most_similar, embeddings, prototypes))


def nearest_distances(prototypes: jax.Array) -> jax.Array:
  """Measures how far each prototype is from its nearest other one: [K, D] -> float32 [K].

  Cosine distances; inf if K = 1. A row of zeros is 1 from all others, one that is not finite has
  NaN.
  """
  return pairs(prototypes, ()).nearest


def nearest_quantiles(prototypes: jax.Array, quantiles=(0.05, 0.5, 0.95)) -> jax.Array:
  """Takes quantiles of `nearest_distances`: float32, as many as asked for."""
  return jnp.quantile(nearest_distances(prototypes), jnp.asarray(quantiles, jnp.float32))


def relative_uniqueness(
  prototypes: jax.Array, embeddings: jax.Array, nearest: jax.Array | None = None
) -> jax.Array:
  """Compares how far prototypes are apart with how far embeddings are from them: float32 [].

  median over k of dist(prototype k, nearest other prototype), divided by
  median over n of dist(embedding n, nearest prototype); both cosine distances.

  Duplicates give 0. Near 1 or above, prototypes stand as far apart as embeddings from theirs: a low
  `unique_counts` then says that embeddings fill a narrow cone, not that prototypes are redundant.

  Args:
    prototypes: [K, D], any norm.
    embeddings: [N, D], any norm.
    nearest: `nearest_distances` of all or of some of the prototypes, if known.
  """
  spacing = jnp.median(nearest_distances(prototypes) if nearest is None else nearest)
  spread = jnp.median(_by_row(_nearest, embeddings, prototypes))
  return spacing / jnp.maximum(spread, jnp.finfo(jnp.float32).eps)


def drift(prototypes: jax.Array, initial: jax.Array) -> jax.Array:
  """Measures how far prototypes have moved from where they started: 1 if never, float32 [].

  The mean over k of cos(prototype k now, prototype k at step 0); [K, D] each.
  """
  return jnp.sum(unit_rows(prototypes) * unit_rows(initial), axis=-1).mean()


# Cluster collapse and intra-cluster collapse.


def _usage(assignments, num):
  return jnp.bincount(jnp.asarray(assignments), length=num) / max(len(assignments), 1)


def used_fraction(assignments: jax.Array, num: int) -> jax.Array:
  """Share of the prototypes that are some image's code: float32 [], at most N / num.

  Args:
    assignments: int [N], the code of each image, 0 to num - 1.
    num: K.
  """
  return jnp.mean(_usage(assignments, num) > 0.0)


def usage_perplexity(assignments: jax.Array, num: int) -> jax.Array:
  """Says how many prototypes are in use, effectively: float32 [], 1 (a single one) to `num`.

  exp of the entropy of the histogram of the codes.

  Args:
    assignments: int [N], the code of each image, 0 to num - 1.
    num: K.
  """
  return jnp.exp(losses.entropy(_usage(assignments, num)))


def mean_assignment_entropy(probs: jax.Array) -> jax.Array:
  """Says how evenly all codes are used: the entropy of the mean row of [N, K], nats, float32 [].

  ln K when all codes are used alike.
  """
  return losses.entropy(jnp.asarray(probs, jnp.float32).mean(axis=0))


def assignment_entropy(probs: jax.Array) -> jax.Array:
  """Says how uncertain assignments are: the mean entropy of the rows of [N, K], nats, float32 [].

  0 for one-hot, ln K for uniform rows.
  """
  return losses.entropy(jnp.asarray(probs, jnp.float32)).mean()


def within_variance_ratio(features: jax.Array, assignments: jax.Array, num: int) -> jax.Array:
  """Share of the features' variance that lies inside the codes: 0 if every code is a point.

  sum |z - mean of its code|^2 / sum |z - mean|^2; 0 where nothing varies.

  Args:
    features: [N, D].
    assignments: int [N], the code of each, 0 to num - 1.
    num: K.

  Returns:
    float32 [].
  """
  features = jnp.asarray(features, jnp.float32)
  centred = features - features.mean(axis=0, keepdims=True)
  sums = jax.ops.segment_sum(centred, assignments, num)
  counts = jax.ops.segment_sum(jnp.ones(features.shape[0]), assignments, num)
  means = sums / jnp.maximum(counts, 1.0)[:, None]
  return jnp.sum((centred - means[assignments]) ** 2) / jnp.maximum(jnp.sum(centred**2), _TINY)


# Representation collapse and dimensional collapse.


def feature_std(features: jax.Array) -> jax.Array:
  """Measures how far features spread over the sphere: 1 if uniformly, 0 if all are the same.

  sqrt(D) * mean over d of the standard deviation of z_d / |z| (arXiv 2011.10566, 4.1): [N, D] ->
  float32 [].
  """
  unit = unit_rows(features)
  return jnp.std(unit, axis=0).mean() * unit.shape[1] ** 0.5


def mean_pairwise_cosine(features: jax.Array) -> jax.Array:
  """Averages the cosine over all pairs of different rows: [N, D], N > 1 -> float32 []."""
  num = features.shape[0]  # N unit rows with mean m have (N |m|^2 - 1) / (N - 1)
  return (num * jnp.sum(unit_rows(features).mean(axis=0) ** 2) - 1.0) / (num - 1)


@jax.jit
def spectrum(features: jax.Array) -> jax.Array:
  """Variance along every principal direction, largest first: [N, D] -> float32 [D].

  The eigenvalues of the covariance.
  """
  features = jnp.asarray(features, jnp.float32)
  # Singular values instead of eigenvalues: the squared matrix would lose half the digits.
  s = jnp.linalg.svd(features - features.mean(axis=0, keepdims=True), compute_uv=False)
  return jnp.pad(s**2 / features.shape[0], (0, features.shape[1] - s.size))


@jax.jit
def rankme(features: jax.Array) -> jax.Array:
  """Says how many directions features fill, effectively: float32 [], 1 to min(N, D).

  exp of the entropy of the singular values of [N, D] over their sum (RankMe, arXiv 2210.02885,
  equation 1). Not centred: a common offset lowers it.
  """
  s = jnp.linalg.svd(jnp.asarray(features, jnp.float32), compute_uv=False)
  share = s / jnp.maximum(s.sum(), _TINY) + 1e-7
  # Not `losses.entropy`: compiled, its last digits are others than those of earlier runs.
  return jnp.exp(jax.scipy.special.entr(share).sum())


# Teacher and student.


@jax.jit
def teacher_distance(encoder: PyTree, teacher: PyTree) -> jax.Array:
  """Measures how far the teacher's weights are from the student's, relative to their length.

  |encoder - teacher| / |encoder|, L2 over all leaves of two trees of one structure: float32 [].
  0 at step 0; exactly 0 after an update means that the teacher is the student.
  """

  def square(tree):
    return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))

  gap = square(jax.tree.map(jnp.subtract, encoder, teacher))
  return jnp.sqrt(gap / jnp.maximum(square(encoder), _TINY))


def shared_buffers(encoder: PyTree, teacher: PyTree) -> int:
  """Counts leaves of `teacher` that lie in the same memory as a leaf of `encoder`: 0 when sound.

  Of this process. Both are pytrees of jax.Array, not deleted. Two trees that share cannot both be
  donated.
  """

  def pointers(leaf):
    return {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}

  students = set().union(*map(pointers, jax.tree.leaves(encoder)))
  return sum(not students.isdisjoint(pointers(leaf)) for leaf in jax.tree.leaves(teacher))
