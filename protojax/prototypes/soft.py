"""Soft assignments of embeddings to prototypes, by a matrix [N, K] or by blocks of prototypes.

A loss says what it wants of assignments: their entropy, their mean, how well one predicts another.
Where K is small all probabilities are there at once and that is a line; where K is large
(`streaming.block_size`) the same number is a sum over blocks, and nothing of size [N, K] is ever
there. What makes that possible for the cross entropy of a student s against targets q:

    -sum_k q_k ln softmax(s W')_k = ln sum_k exp(s.w_k) - s.(sum_k q_k w_k)

The second sum is a vector of D numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from protojax import errors, losses
from protojax.prototypes import assignment, streaming

PyTree = Any


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rows", "prototypes", "bias", "temperature"],
  meta_fields=["block", "precision"],
)
@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores that need not be computed: (rows @ prototypes' + bias) / temperature.

  Attributes:
    rows: [B, ..., D] embeddings, images first.
    prototypes: [K, D].
    bias: [K], added to the products; or None.
    temperature: positive.
    block: prototypes compared at a time, see `streaming.block_size`; 0: all.
    precision: of the products, one of `streaming.PRECISIONS`.
  """

  rows: jax.Array
  prototypes: jax.Array
  bias: jax.Array | None = None
  temperature: float | jax.Array = 1.0
  block: int = 0
  precision: str = "highest"

  def over(self, temperature: float | jax.Array) -> "Scores":
    """Divided by a temperature more."""
    return dataclasses.replace(self, temperature=self.temperature * temperature)

  def plus(self, bias: jax.Array) -> "Scores":
    """With a bias [K] more, added before what is divided."""
    bias = bias if self.bias is None else self.bias + bias
    return dataclasses.replace(self, bias=bias)

  def dense(self) -> jax.Array:
    """[B, ..., K] float32; float64 stays float64."""
    rows, prototypes = losses.full(self.rows), losses.full(self.prototypes)
    products = jnp.einsum("...d,kd->...k", rows, prototypes, precision=self.precision)
    if self.bias is not None:
      products += jnp.expand_dims(self.bias, range(products.ndim - 1))
    return products / self.temperature

  def mean(self) -> jax.Array:
    """[K] float32, the mean over all rows; they are linear, so it is the score of the mean row."""
    middle = self.rows.reshape(-1, self.rows.shape[-1]).mean(axis=0)
    return dataclasses.replace(self, rows=middle).dense()


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["scores", "log_partition", "log_p"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Assignments:
  """Of every row a distribution over the prototypes, exp(scores - log_partition).

  Attributes:
    scores: logits of K prototypes.
    log_partition: [n, R], of each row as `streaming.own_rows` lays them; None where `log_p` is.
    log_p: [B, ..., K] float32 where prototypes are compared all at once, else None.
  """

  scores: Scores
  log_partition: jax.Array | None = None
  log_p: jax.Array | None = None


def by_block(scores: Scores) -> tuple[Callable, PyTree]:
  """(logits, blocks) as functions of `streaming` take them; `scores.block` is not 0."""
  own = streaming.own_rows(losses.full(scores.rows) / scores.temperature)
  bias = None if scores.bias is None else scores.bias / scores.temperature
  blocks = streaming.cut((scores.prototypes, bias), scores.block)

  def logits(block):
    rows, offset = block
    products = jnp.einsum("mnrd,mkd->mnrk", own, losses.full(rows), precision=scores.precision)
    return products if offset is None else products + offset[:, None, None]

  return logits, blocks


def _as_rows(scores: Scores, x: jax.Array) -> jax.Array:
  """[n, R, ...] -> [B, ..., ...], a number or vector for each row of the scores."""
  return x.reshape(*scores.rows.shape[:-1], *x.shape[2:])


def softmax(scores: Scores) -> Assignments:
  """Assignments in proportion to exp(scores), with a gradient."""
  if not scores.block:
    return Assignments(scores, log_p=jax.nn.log_softmax(scores.dense()))
  return Assignments(scores, streaming.log_partition(*by_block(scores)))


def balanced(
  scores: Scores,
  *,
  num_steps: int = 3,
  counted: jax.Array | None = None,
  normalized: bool = False,
) -> Assignments:
  """`assignment.log_sinkhorn` of all rows together, without a gradient.

  Args:
    scores: logits.
    num_steps: of Sinkhorn.
    counted: bool [B, ...], the rows that are balanced; None: all.
    normalized: begin with the rows' log probabilities instead of the logits as they are.
  """
  scores = jax.lax.stop_gradient(scores)
  if not scores.block:
    logits = scores.dense()
    logits = jax.nn.log_softmax(logits) if normalized else logits
    flat = logits.reshape(-1, logits.shape[-1])
    counted = None if counted is None else counted.reshape(-1)
    log_q = assignment.log_sinkhorn(flat, num_steps=num_steps, counted=counted)
    return Assignments(scores, log_p=log_q.reshape(logits.shape))
  logits, blocks = by_block(scores)
  log_z = streaming.log_partition(logits, blocks)
  offsets, log_z = streaming.sinkhorn(
    logits,
    blocks,
    num_steps=num_steps,
    log_z=log_z if normalized else jnp.zeros_like(log_z),
    counted=None if counted is None else counted.reshape(log_z.shape),
  )
  return Assignments(scores.plus(-scores.temperature * streaming.joined(offsets)), log_z)


def first(q: Assignments) -> Assignments:
  """Those of q's rows [B, S, D] that come first of each image: of rows [B, 1, D]."""
  scores = dataclasses.replace(q.scores, rows=q.scores.rows[:, :1])
  if q.log_p is not None:
    return Assignments(scores, log_p=q.log_p[:, :1])
  log_z = q.log_partition  # image by image
  each = log_z.reshape(log_z.shape[0], -1, q.scores.rows.shape[1])
  return Assignments(scores, each[..., 0])


def targets(
  scores: Scores,
  center: jax.Array,
  *,
  kind: str,
  num_steps: int = 3,
  counted: jax.Array | None = None,
) -> Assignments:
  """Targets of a teacher, "center" or "sinkhorn" over all rows, without a gradient.

  Args:
    scores: of the teacher, over its temperature.
    center: [K], subtracted from the products; unused by Sinkhorn.
    kind: `method.targets`.
    num_steps, counted: see `balanced`.

  Raises:
    UserError: for an unknown kind.
  """
  if kind == "center":
    return softmax(jax.lax.stop_gradient(scores.plus(-center)))
  if kind == "sinkhorn":
    return balanced(scores, num_steps=num_steps, counted=counted)
  raise errors.UserError(f"method.targets={kind!r} is unknown: choose center or sinkhorn")


def log_mean(q: Assignments, counted: jax.Array | None = None) -> jax.Array:
  """ln of the mean assignment over all rows, or those that count, bool [B, ...]: float32 [K]."""
  if counted is None:
    rows = q.scores.rows.size // q.scores.rows.shape[-1]
  else:
    rows = jnp.maximum(counted.sum(), 1)
  if q.log_p is not None:
    where = None if counted is None else counted.reshape(-1, 1)
    flat = q.log_p.reshape(-1, q.log_p.shape[-1])
    return jax.nn.logsumexp(flat, axis=0, where=where) - jnp.log(rows)
  log_z = q.log_partition
  if counted is not None:
    log_z = jnp.where(counted.reshape(log_z.shape), log_z, streaming.LEFT_OUT)
  return streaming.log_column_sums(*by_block(q.scores), log_z) - jnp.log(rows)


def mean(q: Assignments, counted: jax.Array | None = None) -> jax.Array:
  """The mean assignment, see `log_mean`: float32 [K], sums to one."""
  if q.log_p is None:
    return jnp.exp(log_mean(q, counted))
  p = jnp.exp(q.log_p)
  if counted is None:
    return p.mean(axis=tuple(range(p.ndim - 1)))
  total = jnp.sum(jnp.where(counted[..., None], p, 0.0), axis=tuple(range(p.ndim - 1)))
  return total / jnp.maximum(counted.sum(), 1)


class Comparison(NamedTuple):
  """Predictions beside targets, in nats; only the cross entropy has a gradient.

  Attributes:
    cross_entropy: see `views` and `rows`.
    entropy: of every target, which no prediction can be below: float32, of the shape of their rows
      [B, ...].
    mean: the mean target over all rows, or those that count: float32 [K].
  """

  cross_entropy: jax.Array
  entropy: jax.Array
  mean: jax.Array


def compare_views(p: Assignments, q: Assignments) -> Comparison:
  """Views of an image beside the targets of its views.

  Args:
    p: predictions, of rows [B, V, D], with a gradient.
    q: targets, of rows [B, T, D]; no gradient.

  Returns:
    `Comparison` whose cross entropy is float32 [V, T], by pair the mean over images.
  """
  q = jax.lax.stop_gradient(q)
  product = functools.partial(jnp.einsum, precision=p.scores.precision)
  if q.log_p is not None:
    targets = jnp.exp(q.log_p)
    by_pair = -product("bvk,btk->bvt", p.log_p, targets).mean(axis=0)
    return Comparison(by_pair, losses.entropy(targets), mean(q))
  rows, bias, entropy, average = _moments(q, p.scores)
  products = product("bvd,btd->bvt", p.scores.rows, rows)
  log_z = _as_rows(p.scores, p.log_partition)[..., None]
  by_pair = (log_z - (products + bias[:, None]) / p.scores.temperature).mean(axis=0)
  return Comparison(by_pair, entropy, average)


def compare_rows(p: Assignments, q: Assignments, counted: jax.Array) -> Comparison:
  """Every row beside the target in its place.

  Args:
    p: predictions, of rows [B, ..., D], with a gradient.
    q: targets, of as many rows; no gradient.
    counted: bool [B, ...], rows that count in `Comparison.mean`.

  Returns:
    `Comparison` whose cross entropy is float32 [B, ...].
  """
  q = jax.lax.stop_gradient(q)
  if q.log_p is not None:
    targets = jnp.exp(q.log_p)
    by_row = -jnp.sum(targets * p.log_p, axis=-1)
    return Comparison(by_row, losses.entropy(targets), mean(q, counted))
  rows, bias, entropy, average = _moments(q, p.scores, counted)
  products = jnp.sum(p.scores.rows * rows, axis=-1) + bias
  by_row = _as_rows(p.scores, p.log_partition) - products / p.scores.temperature
  return Comparison(by_row, entropy, average)


class Agreement(NamedTuple):
  """Views beside one another and beside uniform targets, in nats, with a gradient through all.

  Attributes:
    cross_entropy: float32 [V, 2], -sum_k p_k ln p'_k of any view v (p') and global view t (p), the
      mean over images; v = t is the entropy of the assignments of a view.
    log_mean: float32 [2, K], ln of the mean assignment of a global view over the batch.
  """

  cross_entropy: jax.Array
  log_mean: jax.Array


def agreement(p: Assignments) -> Agreement:
  """Compares assignments of views, of rows [B, V, D], views 0 and 1 the global ones.

  All in the log domain: sharp probabilities underflow, and so would their mean over a batch.
  """

  def part(log_p):  # [B, V, k] of some images and some prototypes
    return losses.mutual_cross_entropies(log_p), losses.log_batch_mean(log_p[:, :2])

  if p.log_p is not None:
    return Agreement(*part(p.log_p))
  logits, blocks = by_block(p.scores)
  log_z, views = streaming.beside(p.log_partition)[..., None], p.scores.rows.shape[1]

  def one(block):
    log_p = logits(block) - log_z
    return jax.vmap(jax.vmap(part))(log_p.reshape(*log_p.shape[:2], -1, views, log_p.shape[-1]))

  cross_entropy, log_mean = streaming.each(one, blocks)  # [nb, m, n, V, 2], [nb, m, n, 2, k]
  log_mean = losses.log_batch_mean(jnp.moveaxis(log_mean, 2, 0))
  log_mean = jax.vmap(streaming.joined)(jnp.moveaxis(log_mean, 2, 0))
  return Agreement(cross_entropy.mean(axis=2).sum(axis=(0, 1)), log_mean)


def best(scores: Scores) -> jax.Array:
  """The prototype of the largest score of each row, of equal ones the first: int32 [B, ...]."""
  if not scores.block:
    return scores.dense().argmax(axis=-1).astype(jnp.int32)
  return _as_rows(scores, streaming.best(*by_block(jax.lax.stop_gradient(scores))))


def log_partition(scores: Scores) -> jax.Array:
  """ln of the sum of exp(scores) of each row, with a gradient: float32 [B, ...]."""
  if not scores.block:
    return jax.nn.logsumexp(scores.dense(), axis=-1)
  return _as_rows(scores, streaming.log_partition(*by_block(scores)))


def _moments(q: Assignments, of: Scores, counted: jax.Array | None = None):
  """Under each of q: mean prototype [B, ..., D], bias [B, ...] of `of`, entropy; and the mean."""
  logits, blocks = by_block(q.scores)
  bias = None if of.bias is None else of.bias[:, None]
  values = streaming.cut((of.prototypes, bias), q.scores.block)
  laid = None if counted is None else counted.reshape(q.log_partition.shape)
  found = streaming.moments(logits, blocks, q.log_partition, values, laid, of.precision)
  rows, bias = jax.tree.map(lambda x: _as_rows(q.scores, x), found.values)
  entropy = _as_rows(q.scores, found.entropy)
  bias = jnp.zeros(entropy.shape) if bias is None else bias[..., 0]
  num = entropy.size if counted is None else jnp.maximum(counted.sum(), 1)
  return rows, bias, entropy, found.counts / num
