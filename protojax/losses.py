"""Losses and entropies: arrays in, float32 out, nothing else.

Arrays may be those of JAX, of NumPy or of a library whose arrays have `__array__` or `__dlpack__`;
gradients are JAX's.

Views are [B, V, ...] and view t of a teacher is the same crop as view t of its student, so a pair
counts only where the two differ. Arithmetic is float32 (float64 stays float64), products are
summed at the highest precision, and no gradient reaches a teacher.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST
_PAIRS = 2**26  # cosines that `koleo` holds at a time: 256 MiB of float32
_NEAREST = 1e-4  # distances below it count as it: no infinite logarithm, no gradient above 1e4


def as_array(x: Any) -> jax.Array:
  """An array of JAX from one of JAX, NumPy or any library with `__array__` or `__dlpack__`."""
  # The second only where there is nothing else: JAX takes no strided slice that way.
  foreign = hasattr(x, "__dlpack__") and not hasattr(x, "__array__")
  return jnp.from_dlpack(x) if foreign else jnp.asarray(x)


def full(x: Any) -> jax.Array:
  """`as_array` in float32 at least: float64 stays, where JAX has it."""
  x = as_array(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
  """x / max(norm, epsilon) over the last axis; the gradient at 0 is finite.

  The only unit rows of training, but for those of `weight_norm.rows`.
  """
  x = as_array(x)
  squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, epsilon**2))


def mean_over_other_views(by_pair: jax.Array) -> jax.Array:
  """Mean of a value by pair of views, [V, T], over the pairs whose views differ."""
  other = 1.0 - jnp.eye(by_pair.shape[0], by_pair.shape[1], dtype=by_pair.dtype)
  return jnp.sum(by_pair * other) / jnp.sum(other)


def _check(student: jax.Array, teacher: jax.Array, ndim: int) -> None:
  same = student.shape[:1] + student.shape[2:] == teacher.shape[:1] + teacher.shape[2:]
  if student.ndim != ndim or teacher.ndim != ndim or not same:
    raise ValueError(f"student {student.shape} and teacher {teacher.shape} do not fit together")
  if student.shape[1] < max(teacher.shape[1], 2):
    raise ValueError(
      f"student {student.shape} needs 2 views or more and those of teacher {teacher.shape}"
    )


def cross_view_entropy(
  student_logits: jax.Array, teacher_probs: jax.Array, *, temperature: float
) -> jax.Array:
  """Cross entropy of every student view against the other views' targets (arXiv 2104.14294).

  The loss of DINO, SwAV and iBOT's class tokens.

  >>> scores = jnp.zeros((8, 4, 10))  # 8 images, 4 views, 10 prototypes: all as likely
  >>> targets = jax.nn.one_hot(jnp.zeros((8, 2), int), 10)  # of the two global views
  >>> print(cross_view_entropy(scores, targets, temperature=0.1).round(4))  # ln 10
  2.3026

  Args:
    student_logits: [B, V, K] scores, any float dtype.
    teacher_probs: [B, T, K] targets, rows sum to one, T <= V; no gradient.
    temperature: the student's.

  Returns:
    [] float32, the mean over images and over the V T - T pairs of views.

  Raises:
    ValueError: if the shapes do not fit or there is no pair of different views.
  """
  logits, targets = full(student_logits), jax.lax.stop_gradient(full(teacher_probs))
  _check(logits, targets, 3)
  log_p = jax.nn.log_softmax(logits / temperature)
  by_pair = -jnp.einsum("bvk,btk->bvt", log_p, targets, precision=_HIGHEST).mean(axis=0)
  return mean_over_other_views(by_pair)


def carp_consistency(student_scores: jax.Array, teacher_scores: jax.Array) -> jax.Array:
  """-log of the probability that two views get the same prototype, block by block.

  Inside a block assignments are softmaxes without temperature; the agreement <p, q> is clipped to
  [eps, 1 - eps] with the eps of the dtype (Silva and Ramírez Rivera, NeurIPS 2023; CARP's code).

  Args:
    student_scores: [B, V, P, n] scores, cut into P blocks of n prototypes; any float dtype.
    teacher_scores: [B, T, P, n], cut alike, T <= V; no gradient.

  Returns:
    [] float32, the mean over images, blocks and the V T - T pairs of views.

  Raises:
    ValueError: if the shapes do not fit or there is no pair of different views.
  """
  student, teacher = full(student_scores), jax.lax.stop_gradient(full(teacher_scores))
  _check(student, teacher, 4)
  p, q = jax.nn.softmax(student), jax.nn.softmax(teacher)
  agreement = jnp.einsum("bvpn,btpn->bpvt", p, q, precision=_HIGHEST)
  eps = float(jnp.finfo(agreement.dtype).eps)
  by_pair = -jnp.log(jnp.clip(agreement, eps, 1.0 - eps)).mean(axis=(0, 1))
  return mean_over_other_views(by_pair)


def carp_entropy(student_scores: jax.Array, teacher_scores: jax.Array) -> jax.Array:
  """ln n minus the entropy of the mean assignment in a block: 0 if all prototypes are used alike.

  The mean is over the rows of all student and teacher views of the global batch; the gradient flows
  through the student's rows (Silva and Ramírez Rivera, NeurIPS 2023; CARP's code).

  Args:
    student_scores: [B, V, P, n] scores, any float dtype.
    teacher_scores: [B, T, P, n]; no gradient.

  Returns:
    [] float32 in [0, ln n], the mean over blocks.

  Raises:
    ValueError: if the shapes do not fit.
  """
  student, teacher = full(student_scores), jax.lax.stop_gradient(full(teacher_scores))
  _check(student, teacher, 4)
  p, q = jax.nn.softmax(student), jax.nn.softmax(teacher)
  rows = p.shape[0] * (p.shape[1] + q.shape[1])
  mean = (p.sum(axis=(0, 1)) + q.sum(axis=(0, 1))) / rows
  return jnp.mean(math.log(p.shape[-1]) - entropy(mean))


def mutual_cross_entropies(log_p: jax.Array) -> jax.Array:
  """-sum_k p^t_k ln p^v_k, mean over images, for all views v and global views t.

  Args:
    log_p: [B, V, K] log probabilities, or those of some of the K; views 0 and 1 are the global
      ones.

  Returns:
    [V, 2], with a gradient through both sides.
  """
  p = jnp.exp(log_p[:, :2])
  return -jnp.einsum("bvk,btk->bvt", log_p, p, precision=_HIGHEST).mean(axis=0)


def log_batch_mean(log_p: jax.Array) -> jax.Array:
  """ln of the mean probability over the batch, [B, ...] -> [...].

  A logsumexp: probabilities underflow, and so would their mean.
  """
  return jax.nn.logsumexp(log_p, axis=0) - math.log(log_p.shape[0])


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean over a view's patches that count, then over views: [B, V, M] and bool [B, V, M] -> [].

  A view without any counts as 0 (arXiv 2111.07832).
  """
  chosen = mask.astype(values.dtype)
  share = jnp.sum(chosen * values, axis=-1) / jnp.maximum(jnp.sum(chosen, axis=-1), 1.0)
  return jnp.mean(share)


def masked_patch_entropy(
  student_logits: jax.Array, teacher_probs: jax.Array, mask: jax.Array, *, temperature: float
) -> jax.Array:
  """Cross entropy of hidden patches against the targets of the same crop (arXiv 2111.07832).

  Args:
    student_logits: [B, V, M, K] scores of all patches, or of those that may be hidden; any float
      dtype.
    teacher_probs: [B, V, M, K] targets, rows sum to one; no gradient.
    mask: bool [B, V, M], True where the student did not see the patch.
    temperature: the student's.

  Returns:
    [] float32, see `masked_mean`.

  Raises:
    ValueError: if the shapes do not fit.
  """
  logits, targets = full(student_logits), jax.lax.stop_gradient(full(teacher_probs))
  mask = as_array(mask)
  shapes = logits.shape, targets.shape, mask.shape
  if shapes[0] != shapes[1] or shapes[0][:3] != shapes[2]:
    raise ValueError(f"student, teacher and mask of {shapes} do not fit together")
  log_p = jax.nn.log_softmax(logits / temperature)
  return masked_mean(-jnp.sum(targets * log_p, axis=-1), mask)


def entropy(probs: jax.Array) -> jax.Array:
  """Entropy in nats of each row, with 0 ln 0 = 0.

  The cross entropy of a view minus the entropy of its targets is their Kullback-Leibler divergence:
  with every target view in equally many pairs, `cross_view_entropy(...) - entropy(targets).mean()`
  is the mean divergence of student from teacher.

  Args:
    probs: [..., K], rows sum to one, any float dtype.

  Returns:
    [...] float32.
  """
  p = full(probs)
  # The floor keeps the derivative at 0 finite.
  return -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)), axis=-1)


def koleo(rows: jax.Array, picked: jax.Array | None = None) -> jax.Array:
  """KoLeo: minus the mean log distance of unit rows to their nearest other row.

  It falls as rows spread out. Rows are normalised here, so any norm may come.

  >>> print(koleo(jnp.eye(3)).round(4))  # distances sqrt(2): -ln(2) / 2
  -0.3466

  Of a batch's features it is the regulariser of arXiv 2304.07193, of prototypes that of
  arXiv 2410.14060. The gradient reaches a row and its neighbour; which row that is has none, so the
  backward pass holds [N, D] arrays only. Distances are Euclidean, measured on differences (cosines
  of near copies would cancel) and clamped at 1e-4: a copy adds -ln 1e-4 and no gradient, and so
  does a row without another.

  Args:
    rows: [N, D], any norm and float dtype.
    picked: int32 [M], the rows whose neighbours are looked for (among all N); None takes all.

  Returns:
    [] float32.
  """
  rows = l2_normalize(full(rows))
  detached = jax.lax.stop_gradient(rows)
  num = rows.shape[0]

  def nearest(query):
    index, row = query
    cosine = jnp.matmul(detached, row, precision=_HIGHEST)
    return jnp.argmax(jnp.where(jnp.arange(num) == index, -jnp.inf, cosine))

  index, queries = (jnp.arange(num), rows) if picked is None else (picked, rows[picked])
  chunk = max(1, min(index.size, _PAIRS // num))
  others = jax.lax.map(nearest, (index, jax.lax.stop_gradient(queries)), batch_size=chunk)
  distance = jnp.sum(jnp.square(queries - rows[others]), axis=-1)
  return -0.5 * jnp.mean(jnp.log(jnp.maximum(distance, _NEAREST**2)))


def info_nce(
  queries: jax.Array, keys: jax.Array, negatives: jax.Array, *, temperature: float
) -> jax.Array:
  """-log of the share of its own key among a query's key and the negatives (arXiv 2005.04966).

  Args:
    queries: [B, D], any float dtype, of length one where cosines are meant.
    keys: [B, D], row by row.
    negatives: [R, D], for all queries.
    temperature: divides the inner products.

  Returns:
    [] float32, the mean over the queries.
  """
  queries, keys, negatives = full(queries), full(keys), full(negatives)
  own = jnp.sum(queries * keys, axis=-1, keepdims=True)
  others = jnp.einsum("bd,rd->br", queries, negatives, precision=_HIGHEST)
  logits = jnp.concatenate([own, others], axis=1) / temperature
  return -jax.nn.log_softmax(logits)[:, 0].mean()


def proto_nce(
  queries: jax.Array,
  centroids: jax.Array,
  phi: jax.Array,
  clusters: jax.Array,
  *,
  precision: str = "highest",
) -> jax.Array:
  """Cross entropy of finding a query's cluster among all of a set (arXiv 2005.04966).

  Args:
    queries: [B, D], any float dtype.
    centroids: [K, D].
    phi: [K], temperature of every cluster.
    clusters: int32 [B], the cluster of each query.
    precision: of the products, one of `streaming.PRECISIONS`.

  Returns:
    [] float32, the mean over the queries.
  """
  inner = jnp.einsum("bd,kd->bk", full(queries), full(centroids), precision=precision)
  log_p = jax.nn.log_softmax(inner / as_array(phi)[None, :])
  return -jnp.take_along_axis(log_p, as_array(clusters)[:, None], axis=1).mean()
