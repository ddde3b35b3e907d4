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

import jax
import jax.numpy as jnp
import numpy as np

from protojax import errors, losses
from protojax.methods import base
from protojax.methods.networks import student

OPTIONS = {
  "block": 0,  # nothing else
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
  num_views = q.shape[1]
  local = np.arange(num_views) >= 2
  pairs = ~np.eye(num_views, dtype=bool) & ~(local[:, None] & local[None, :])
  if not pairs.any():
    raise ValueError(f"targets {q.shape} need 2 views, one of them global")
  by_pair = -jnp.einsum("bik,bjk->ij", q, log_p, precision="highest") / q.shape[0]
  return jnp.sum(jnp.where(pairs, by_pair, 0.0)) / pairs.sum()


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
  errors.require(config, {"method.block": 0}, "self_classifier compares all classes at once")
  joined_config = config.copy_and_resolve_references()
  joined_config.method.num_prototypes = sum(sizes)
  net = student.build_with_prototypes(joined_config)
  names = ("prototypes", *(f"prototypes_{i + 1}" for i in range(1, len(sizes))))

  def split(x, axis=-1):
    """{name: the classifier's part} of an axis of length sum(sizes)."""
    return dict(zip(names, jnp.split(x, np.cumsum(sizes)[:-1], axis), strict=True))

  def loss(trained, frozen, views, key, step):
    del step
    z, state, stats = net.embed(trained, frozen, views, key)
    scores = list(split(net.scores(state, z).dense()).values())
    q = [targets(s, options.column_temp) for s in scores]
    log_p = [log_predictions(s, options.row_temp, options.eps) for s in scores]

    def mean(function, *lists):
      return sum(map(function, *lists)) / len(sizes)

    value = mean(cross_entropy, q, log_p)
    metrics = {
      "loss": value,
      "ln_k": jnp.float32(mean(math.log, sizes)),  # of predictions that say nothing
      "target_entropy": mean(lambda a: losses.entropy(a).mean(), q),
      "mean_entropy": mean(lambda a: losses.entropy(a.mean(axis=(0, 1))), q),
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
