"""Measures of collapse: pure functions of arrays. What they mean together: `verdicts.verdict`.

Those of prototypes rest on comparisons of rows (`pairwise`) and on what random ones would score
(`chance`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from protojax import losses
from protojax.metrics import chance, pairwise

PyTree = Any

_TINY = 1e-12
_PIECE = 65_536  # rows


# Partial prototype collapse.


class Partners(NamedTuple):
  """How many of K prototypes are unique, and how near others are, by all or by some of them.

  Attributes:
    num: K.
    looked: M, whose partners were looked for among all K; M = K counts, M < K estimates.
    unique: float [T], see `partners`.
    random: float [T], the same of random prototypes with this K and D.
    nearest: float32 [M], cosine distance to the nearest other prototype; inf if K = 1.
    no_direction: share of the M that are zero or not finite: neither unique nor copies.
  """

  num: int
  looked: int
  unique: np.ndarray
  random: np.ndarray
  nearest: np.ndarray
  no_direction: float = 0.0


def partners(
  prototypes: jax.Array, looked: int = 0, thresholds: Sequence[float] = pairwise.THRESHOLDS
) -> Partners:
  """Counts unique prototypes by all pairs, or estimates them by the pairs of some with all.

  All: `pairwise.unique_counts` and `pairwise.nearest_distances`. Some: M evenly spaced prototypes
  are compared with all K, M * K * D multiplications. One with n - 1 others nearer than the
  threshold counts 1 / n, and K times the mean of that is the estimate. Where copies are copies of
  one another, as in a collapse, its expectation is the number of the greedy cover, whatever M is,
  with a standard error of at most K / (2 sqrt(M)); where nearness does not carry over, it is what a
  cover in random order reaches at least (Caro and Wei's bound). The value of random prototypes is
  counted on drawn ones (`chance.random_unique`), or is the expectation of K / n.

  Args:
    prototypes: [K, D], any norm.
    looked: M; 0, or K and more, takes all.
    thresholds: T cosine distances.
  """
  num, dim = prototypes.shape
  if not 0 < looked < num:
    owner, nearest = pairwise.pairs(prototypes, thresholds)
    owner = np.asarray(owner)
    unique = np.sum(owner == np.arange(num), axis=1)
    random = chance.random_unique(num, dim, tuple(thresholds))
    return Partners(num, num, unique, random, np.asarray(nearest), np.mean(owner[0] < 0))
  rows = np.asarray(prototypes)
  chosen = (np.arange(looked) * num // looked).astype(np.int32)
  found = pairwise.by_row(pairwise.one_of_how_many(tuple(thresholds)), rows[chosen], rows, chosen)
  share = np.array([chance.near_share(dim, limit) for limit in thresholds])
  # The expectation of 1 / n, n - 1 of K - 1 being near with this probability each.
  random = -np.expm1(num * np.log1p(-share)) / np.maximum(share, np.finfo(float).tiny)
  random = np.where(num * share < 1e-9, num, random)
  lengths = np.linalg.norm(rows[chosen], axis=1)
  lost = np.mean(~(np.isfinite(lengths) & (lengths > 0.0)))
  return Partners(num, looked, num * found[:, 1:].mean(axis=0), random, found[:, 0], lost)


def relative_uniqueness(
  prototypes: jax.Array, embeddings: jax.Array, nearest: jax.Array | None = None
) -> jax.Array:
  """Compares how far prototypes are apart with how far embeddings are from them: float32 [].

  median over k of dist(prototype k, nearest other prototype), divided by
  median over n of dist(embedding n, nearest prototype); both cosine distances.

  Duplicates give 0. Near 1 or above, prototypes stand as far apart as embeddings from theirs: a low
  count of unique ones then says that embeddings fill a narrow cone, not that prototypes are
  redundant.

  Args:
    prototypes: [K, D], any norm.
    embeddings: [N, D], any norm.
    nearest: `pairwise.nearest_distances` of all or of some of the prototypes, if known.
  """
  spacing = jnp.median(pairwise.nearest_distances(prototypes) if nearest is None else nearest)
  spread = jnp.median(pairwise.by_row(pairwise.to_nearest, embeddings, prototypes))
  return spacing / jnp.maximum(spread, jnp.finfo(jnp.float32).eps)


def drift(prototypes: jax.Array, initial: jax.Array) -> jax.Array:
  """Measures how far prototypes have moved from where they started: 1 if never, float32 [].

  The mean over k of cos(prototype k now, prototype k at step 0); [K, D] each.
  """
  return jnp.sum(pairwise.unit_rows(prototypes) * pairwise.unit_rows(initial), axis=-1).mean()


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
  unit = pairwise.unit_rows(features)
  return jnp.std(unit, axis=0).mean() * unit.shape[1] ** 0.5


def mean_pairwise_cosine(features: jax.Array) -> jax.Array:
  """Averages the cosine over all pairs of different rows: [N, D], N > 1 -> float32 []."""
  num = features.shape[0]  # N unit rows with mean m have (N |m|^2 - 1) / (N - 1)
  return (num * jnp.sum(pairwise.unit_rows(features).mean(axis=0) ** 2) - 1.0) / (num - 1)


def spectrum(features: jax.Array | np.ndarray) -> jax.Array:
  """Variance along every principal direction, largest first: [N, D] -> float32 [D].

  The eigenvalues of the covariance. Of a numpy array one piece of `_PIECE` rows at a time is on the
  device, so that N may be the images of ImageNet.
  """
  pieces = [features[i : i + _PIECE] for i in range(0, len(features), _PIECE)]
  mean = sum(len(piece) / len(features) * _mean(piece) for piece in pieces)
  triangle = _centred(pieces[0], mean)
  for piece in pieces[1:]:
    triangle = _fold(triangle, _centred(piece, mean))
  # Singular values instead of eigenvalues: the squared matrix would lose half the digits.
  s = jnp.linalg.svd(triangle, compute_uv=False, full_matrices=False)
  return jnp.pad(s**2 / len(features), (0, features.shape[1] - s.size))


@jax.jit
def _mean(rows):
  return jnp.asarray(rows, jnp.float32).mean(axis=0, keepdims=True)


@jax.jit
def _centred(rows, mean):
  return jnp.asarray(rows, jnp.float32) - mean


@jax.jit
def _fold(above, below):
  """[D, D] with the singular values that both have on top of each other."""
  return jnp.linalg.qr(jnp.concatenate([above, below]), mode="r")


@jax.jit
def rankme(features: jax.Array) -> jax.Array:
  """Says how many directions features fill, effectively: float32 [], 1 to min(N, D).

  exp of the entropy of the singular values of [N, D] over their sum (RankMe, arXiv 2210.02885,
  equation 1). Not centred: a common offset lowers it.
  """
  s = jnp.linalg.svd(jnp.asarray(features, jnp.float32), compute_uv=False, full_matrices=False)
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
