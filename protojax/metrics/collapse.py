"""Measures of collapse: pure functions of arrays. What they mean together: `verdicts.verdict`.

Rows are compared by cosine distance 1 - cos(a, b) in float32; no K x K array is ever built.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from protojax import local_devices, losses

PyTree = Any

# Of cosine distance; the ones of arXiv 2510.20108. A larger one is harder to pass.
THRESHOLDS = (0.025, 0.05, 0.1, 0.25, 0.5)
_BLOCK = 1024  # rows of the greedy cover that are compared with one another at a time
_ROWS = 256  # rows compared with all others at a time
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


def cover(prototypes: jax.Array, thresholds: Sequence[float] = THRESHOLDS) -> jax.Array:
  """Representative of every prototype in the greedy cover (arXiv 2510.20108, definition 2.1).

  In index order, the first row that nobody represents represents itself and all unrepresented rows
  nearer than the threshold (strictly). Depends on the order, does not chain.

  Every device of this process compares each block with its share of the ones before.

  `uniqueness.measure` finds the same cover on the host: it is faster there, as it passes over
  blocks without near pairs, which a compiled loop cannot, and counts more; this one stays on the
  device, beside the training state.

  Args:
    prototypes: [K, D], any norm.
    thresholds: T cosine distances (static tuple), each covered for itself.

  Returns:
    int32 [T, K], index of each row's representative; -1 for a row that is zero or not finite.
  """
  return _cover(local_devices.everywhere(prototypes), thresholds=tuple(thresholds))


@functools.partial(jax.jit, static_argnames="thresholds")
def _cover(prototypes: jax.Array, thresholds: Sequence[float]) -> jax.Array:
  num, mesh = prototypes.shape[0], local_devices.mesh()
  block = min(_BLOCK, num)
  padding = -num % block
  rows = unit_rows(prototypes)
  directed = jnp.isfinite(rows).all(axis=1) & (jnp.abs(rows).max(axis=1) > 0.0)
  rows = jnp.pad(jnp.where(directed[:, None], rows, 0.0), ((0, padding), (0, 0)))
  free = num + padding  # not represented yet
  owner = jnp.where(jnp.pad(directed, (0, padding)), jnp.int32(free), -1)
  owner = jnp.tile(owner, (len(thresholds), 1))
  local, limits = jnp.arange(block), jnp.asarray(thresholds, jnp.float32)

  def one_block(b, rows, owner):
    start, device = b * block, jax.lax.axis_index(local_devices.AXIS)
    here = jax.lax.dynamic_slice_in_dim(rows, start, block)

    def against(turn, found):
      c = jnp.minimum(turn * mesh.size + device, b - 1)  # a device may have one less
      ids = c * block + local
      those = jax.lax.dynamic_slice_in_dim(owner, c * block, block, axis=1)
      leaders = jnp.where(those == ids[None, :], ids[None, :], free)  # [T, block]
      distance = _distance(here, jax.lax.dynamic_slice_in_dim(rows, c * block, block))
      near = distance[None] < limits[:, None, None]  # [T, block, block], fused into the minimum
      return jnp.minimum(found, jnp.where(near, leaders[:, None, :], free).min(axis=2))

    found = jax.lax.dynamic_slice_in_dim(owner, start, block, axis=1)
    found = jax.lax.fori_loop(0, -(-b // mesh.size), against, found)
    found = jax.lax.pmin(found, local_devices.AXIS)
    distance = _distance(here, here)

    def one_row(i, found):
      near = (distance[i][None, :] < limits[:, None]) | (local == i)[None, :]
      leads = (found[:, i] == free)[:, None]
      return jnp.where(leads & near & (found == free), start + i, found)

    found = jax.lax.fori_loop(0, block, one_row, found)
    return jax.lax.dynamic_update_slice_in_dim(owner, found, start, axis=1)

  def all_blocks(rows, owner):
    blocks = (num + padding) // block
    return jax.lax.fori_loop(0, blocks, lambda b, owner: one_block(b, rows, owner), owner)

  everywhere = PartitionSpec()
  shared = jax.shard_map(
    all_blocks, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
  )
  return shared(rows, owner)[:, :num]


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


@functools.cache
def random_unique(num: int, dim: int, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
  """Counts the unique ones of random prototypes, as many as K and D allow: int [T].

  Of `random_prototypes`; counted once a process.
  """
  counts = np.array(unique_counts(random_prototypes(num, dim), thresholds))
  counts.setflags(write=False)
  return counts


def _by_row(function: Callable, queries: jax.Array, rows: jax.Array) -> np.ndarray:
  """[N] of (query [D], its number, unit rows [K, D]) -> number; each device has some queries."""
  numbered = local_devices.split((queries, np.arange(len(queries), dtype=np.int32)))
  out = _of_queries(numbered, local_devices.everywhere(rows), function=function)
  return np.asarray(out)[: len(queries)]


@functools.partial(jax.jit, static_argnames="function")
def _of_queries(numbered, rows, *, function):
  def share(numbered, rows):
    queries, number = numbered
    rows, queries = unit_rows(rows), unit_rows(queries)
    return jax.lax.map(lambda q: function(*q, rows), (queries, number), batch_size=_ROWS)

  return local_devices.by_share(share)(numbered, rows)


def _nearest(query, number, rows):
  """Cosine distance of a query to the nearest row: float32 []."""
  del number
  return jnp.maximum(_distance(query[None, :], rows)[0].min(), 0.0)


def _nearest_other(query, number, rows):
  """That of row `number` to the nearest other one; inf without one."""
  distance = _distance(query[None, :], rows)[0]
  others = jnp.arange(rows.shape[0]) != number
  return jnp.maximum(jnp.where(others, distance, jnp.inf).min(), 0.0)


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

  Cosine distances; inf if K = 1.
  """
  return jnp.asarray(_by_row(_nearest_other, prototypes, prototypes))


def nearest_quantiles(prototypes: jax.Array, quantiles=(0.05, 0.5, 0.95)) -> jax.Array:
  """Takes quantiles of `nearest_distances`: float32, as many as asked for."""
  return jnp.quantile(nearest_distances(prototypes), jnp.asarray(quantiles, jnp.float32))


def relative_uniqueness(prototypes: jax.Array, embeddings: jax.Array) -> jax.Array:
  """Compares how far prototypes are apart with how far embeddings are from them: float32 [].

  median over k of dist(prototype k, nearest other prototype), divided by
  median over n of dist(embedding n, nearest prototype); both cosine distances.

  Duplicates give 0. Near 1 or above, prototypes stand as far apart as embeddings from theirs: a low
  `unique_counts` then says that embeddings fill a narrow cone, not that prototypes are redundant.

  Args:
    prototypes: [K, D], any norm.
    embeddings: [N, D], any norm.
  """
  spacing = jnp.median(nearest_distances(prototypes))
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
