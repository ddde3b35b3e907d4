"""Self-Classifier: two views get the same class, classes are used alike (arXiv 2103.10994).

The same scores are read twice. Read by columns, classes choose images: a softmax over the global
batch, then rows made to sum to one; these are the targets of the other views. Read by rows, images
choose classes, and columns are made to sum to one. The two readings rule out collapse, with no
teacher and no stopped gradient: it flows through the targets too. A batch of B < K images cannot
fill K classes, and the least loss is then ln(K / B).

One classifier of `num_prototypes` classes, whose weights are the prototypes: learned with trained
lengths as published, or a mixture (fed by the student's global views) or frozen. Of
`more_classifiers`, which are learned only, the paper has three. All classifiers are slices of one
array, so that LARS and clipping by tensor see one norm where the published code has one each. Left
out: the published queue of nearest neighbours.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from protojax import errors, losses
from protojax.methods import base
from protojax.methods.networks import student
from protojax.prototypes import soft, streaming

OPTIONS = {
  "prototypes": "learned",
  "train_prototype_norm": True,
  "row_temp": 0.1,  # of the softmax over classes, the predictions
  "column_temp": 0.05,  # of the softmax over the batch, the targets
  "eps": 1e-12,  # added to what the predictions' logarithm is taken of
  "more_classifiers": (),  # sizes of further classifiers on the same embedding, e.g. (2000, 4000)
}


def targets(scores: jax.Array, temperature: float) -> jax.Array:
  """Softmax over the batch, each row then divided by its sum.

  Args:
    scores: [B, V, K] of the global batch, any float dtype.
    temperature: positive.

  Returns:
    [B, V, K] float32, rows sum to one; with a gradient.
  """
  logits = losses.full(scores) / temperature
  return jax.nn.softmax(jax.nn.log_softmax(logits, axis=0), axis=-1)


def log_predictions(scores: jax.Array, temperature: float, eps: float) -> jax.Array:
  """Log of the softmax over classes, each column then divided by its mean over the batch, over K.

  Args:
    scores: [B, V, K] of the global batch, any float dtype.
    temperature: positive.
    eps: positive.

  Returns:
    [B, V, K] float32, ln(B / K p + eps) where p is the softmax over its column's sum.
  """
  logits = losses.full(scores) / temperature
  log_p = jax.nn.log_softmax(jax.nn.log_softmax(logits, axis=-1), axis=0)
  batch, _, num_classes = scores.shape
  return jnp.logaddexp(log_p + math.log(batch / num_classes), math.log(eps))


def cross_entropy(q: jax.Array, log_p: jax.Array) -> jax.Array:
  """Mean cross entropy over all ordered pairs of different views but those of two local ones.

  Args:
    q: [B, V, K] targets, with a gradient; views 0 and 1 are the global ones.
    log_p: [B, V, K] log predictions.

  Raises:
    ValueError: if there is no such pair.
  """
  if q.shape[1] < 2:
    raise ValueError(f"targets {q.shape} need 2 views, one of them global")
  return _mean_of_pairs(-_products(q, log_p) / q.shape[0])


def _products(q: jax.Array, log_p: jax.Array) -> jax.Array:
  """[B, V, K] each -> [V, V], targets of view i beside predictions of view j, summed."""
  return jnp.einsum("bik,bjk->ij", q, log_p, precision="highest")


def _mean_of_pairs(by_pair: jax.Array) -> jax.Array:
  """[V, V] -> [], the mean over the pairs that `cross_entropy` takes."""
  local = np.arange(by_pair.shape[0]) >= 2
  pairs = ~np.eye(by_pair.shape[0], dtype=bool) & ~(local[:, None] & local[None, :])
  return jnp.sum(jnp.where(pairs, by_pair, 0.0)) / pairs.sum()


class Readings(NamedTuple):
  """Both readings of a classifier's scores, compared.

  Attributes:
    cross_entropy: float32 [], see `cross_entropy`, with a gradient.
    target_entropy: float32 [], mean entropy of the targets.
    mean_target: float32 [K], of all images and views.
  """

  cross_entropy: jax.Array
  target_entropy: jax.Array
  mean_target: jax.Array


def compare(scores: soft.Scores, *, row_temp: float, column_temp: float, eps: float) -> Readings:
  """Targets beside predictions, of all classes at once or by blocks of them (`scores.block`).

  By blocks it takes three passes: the first finds what the columns of the targets and the rows of
  the predictions are divided by, the second, with that, the rows of the targets and the columns of
  the predictions, and the third compares.

  Args:
    scores: of rows [B, V, D], without a temperature.
    row_temp, column_temp, eps: see OPTIONS.
  """
  if not scores.block:
    dense = scores.dense()
    q, log_p = targets(dense, column_temp), log_predictions(dense, row_temp, eps)
    return Readings(cross_entropy(q, log_p), losses.entropy(q).mean(), q.mean(axis=(0, 1)))
  batch, views, _ = scores.rows.shape
  logits, blocks = soft.by_block(scores)

  def by_image(block):  # [m, n, B / n, V, k]
    own = logits(block)
    return own.reshape(*own.shape[:2], -1, views, own.shape[-1])

  def totals(block):
    own = by_image(block)
    return jax.nn.logsumexp(own / column_temp, axis=2), jax.nn.logsumexp(own / row_temp, axis=-1)

  def over_devices(columns, rows):  # [nb, m, n, V, k], [nb, m, n, B / n, V] -> as a loop reads them
    rows_on = columns.shape[2]
    columns = streaming.back(jax.nn.logsumexp(columns, axis=2), rows_on)
    return columns, streaming.beside(jax.nn.logsumexp(rows, axis=(0, 1)))

  target_columns, rows = over_devices(*streaming.each(totals, blocks))

  def totals_again(both):
    block, columns = both
    own = by_image(block)
    target = own / column_temp - columns[:, :, None]
    prediction = own / row_temp - rows[..., None]
    return jax.nn.logsumexp(prediction, axis=2), jax.nn.logsumexp(target, axis=-1)

  columns, target_rows = over_devices(*streaming.each(totals_again, (blocks, target_columns)))
  evenly = math.log(batch / scores.prototypes.shape[0])

  def compared(all_three):
    block, target_columns, columns = all_three
    own = by_image(block)
    log_q = own / column_temp - target_columns[:, :, None] - target_rows[..., None]
    q = jnp.exp(log_q)
    log_p = own / row_temp - rows[..., None] - columns[:, :, None]
    log_p = jnp.logaddexp(log_p + evenly, math.log(eps))
    return jax.vmap(jax.vmap(_products))(q, log_p), -jnp.sum(q * log_q), q.sum(axis=(2, 3))

  products, entropy, total = streaming.each(compared, (blocks, target_columns, columns))
  return Readings(
    _mean_of_pairs(-products.sum(axis=(0, 1, 2)) / batch),
    entropy.sum() / (batch * views),
    streaming.joined(total.sum(axis=2)) / (batch * views),
  )


def make(config) -> base.Method:
  """Self-Classifier from `config.method`.

  Raises:
    UserError: for options out of range.
  """
  options = config.method
  sizes = (options.num_prototypes, *options.more_classifiers)
  if min(sizes) < 2 or (len(sizes) > 1 and options.prototypes != "learned"):
    raise errors.UserError(
      f"method.num_prototypes={sizes[0]} with method.more_classifiers={sizes[1:]}: give each 2 "
      "classes or more, and set method.more_classifiers=() unless method.prototypes=learned"
    )
  errors.require_positive(options, "row_temp", "column_temp", "eps")
  joined_config = config.copy_and_resolve_references()
  joined_config.method.num_prototypes = sum(sizes)
  if len(sizes) > 1:
    joined_config.method.block = 0  # of each classifier its own
  net = student.build_with_prototypes(joined_config)
  names = ("prototypes", *(f"prototypes_{i + 1}" for i in range(1, len(sizes))))

  def split(x, axis=-1):
    """{name: the classifier's part} of an axis of length sum(sizes)."""
    return dict(zip(names, jnp.split(x, np.cumsum(sizes)[:-1], axis), strict=True))

  def block_size(z, num):
    return streaming.block_size(options.block, z.size // z.shape[-1], num)

  def loss(trained, frozen, views, key, step):
    del step
    z, state, stats = net.embed(trained, frozen, views, key)
    whole = net.scores(state, z)
    found = [
      compare(
        dataclasses.replace(whole, prototypes=rows, block=block_size(z, len(rows))),
        **{name: options[name] for name in ("row_temp", "column_temp", "eps")},
      )
      for rows in split(whole.prototypes, axis=0).values()
    ]

    def mean(function, every):
      return sum(map(function, every)) / len(sizes)

    value = mean(lambda one: one.cross_entropy, found)
    metrics = {
      "loss": value,
      "ln_k": jnp.float32(mean(math.log, sizes)),  # of predictions that say nothing
      "target_entropy": mean(lambda one: one.target_entropy, found),
      "mean_entropy": mean(lambda one: losses.entropy(one.mean_target), found),
    }
    return value, base.LossOut(metrics, stats)

  def codes(variables, images):
    return split(net.method.codes(variables, images)["prototypes"])

  def embeddings(variables, images):
    return dict.fromkeys(names, net.method.embeddings(variables, images)["prototypes"])

  def prototype_matrices(variables):
    return split(net.method.prototype_matrices(variables)["prototypes"], axis=0)

  def scoring(variables):
    one = net.method.scoring(variables)["prototypes"]
    parts = split(one.rows, axis=0)
    return {name: dataclasses.replace(one, rows=rows) for name, rows in parts.items()}

  return net.method._replace(
    loss=loss,
    codes=codes,
    embeddings=embeddings,
    prototype_matrices=prototype_matrices,
    scoring=scoring,
  )
