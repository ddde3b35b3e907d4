"""Weighted k-nearest neighbours by cosine, exact, on the device (the protocol of arXiv 2104.14294).

Print k and the temperature beside every number: other settings move it by several points.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from protojax import errors

# Similarities held at once: 256 MiB of float32.
_PAIRS = 2**26


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "chunk"))
def _scores(bank, labels, queries, temperature, *, num_classes, k, chunk):
  def unit(rows):
    rows = rows.astype(jnp.float32)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

  bank = unit(bank)

  def one(query):
    similarity = jnp.matmul(bank, query, precision=jax.lax.Precision.HIGHEST)
    nearest, rows = jax.lax.top_k(similarity, k)  # of equals, the lower index
    # The largest weight is 1, so that exp never overflows; shares do not change.
    weights = jnp.exp((nearest - nearest[0]) / temperature)
    votes = jax.ops.segment_sum(weights, labels[rows], num_classes)
    return votes / weights.sum()

  return jax.lax.map(one, unit(queries), batch_size=chunk)


def _check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
  if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
    bad = labels[(labels < 0) | (labels >= num_classes)][0]
    raise errors.UserError(
      f"k-NN: the {name} holds label {bad}, outside 0..{num_classes - 1}: give labelled images"
    )


def scores(
  bank: jax.Array,
  bank_labels: jax.Array,
  queries: jax.Array,
  *,
  num_classes: int,
  k: int = 20,
  temperature: float = 0.07,
  chunk: int | None = None,
) -> jax.Array:
  """Share of each class in the votes of the k most similar bank rows, weighted exp(cosine / T).

  Args:
    bank: [N, D] features, any norm and float dtype.
    bank_labels: int [N], 0 to num_classes - 1.
    queries: [M, D].
    num_classes: C.
    k: neighbours that vote, at most N. Of equally similar rows the earlier ones vote.
    temperature: T.
    chunk: queries compared with the bank at a time; None fits 256 MiB of similarities.

  Returns:
    float32 [M, C], rows sum to 1.

  Raises:
    UserError: if k is not in 1..N, the temperature not positive, or a label out of range.
  """
  num = len(bank)
  if not 1 <= k <= num:
    raise errors.UserError(
      f"k-NN: k={k} neighbours of a bank of {num} images: choose 1 to {num} with --config.probe.k"
    )
  if not temperature > 0:
    raise errors.UserError(
      f"k-NN: temperature={temperature:g} must be positive: set --config.probe.temperature"
    )
  _check_labels("bank", np.asarray(bank_labels), num_classes)
  if chunk is None:
    chunk = max(1, min(1024, _PAIRS // num))
  return _scores(
    jnp.asarray(bank), jnp.asarray(bank_labels, jnp.int32), jnp.asarray(queries),
    temperature, num_classes=num_classes, k=k, chunk=min(chunk, max(len(queries), 1)),
  )  # fmt: skip


def predict(bank, bank_labels, queries, **options) -> jax.Array:
  """int32 [M]: class with the largest share of `scores` (same arguments); of equals the lowest."""
  return jnp.argmax(scores(bank, bank_labels, queries, **options), axis=-1).astype(jnp.int32)


def accuracy(bank, bank_labels, queries, query_labels, *, num_classes: int, **options) -> float:
  """Share of queries whose class `predict` finds, 0 to 1.

  Args:
    bank: [N, D].
    bank_labels: int [N].
    queries: [M, D], M > 0.
    query_labels: int [M], 0 to num_classes - 1.
    num_classes: C.
    **options: k, temperature, chunk of `scores`.

  Raises:
    UserError: as `scores`, and for query labels out of range.
  """
  query_labels = np.asarray(query_labels)
  _check_labels("test set", query_labels, num_classes)
  predicted = predict(bank, bank_labels, queries, num_classes=num_classes, **options)
  return float(np.mean(np.asarray(predicted) == query_labels))
