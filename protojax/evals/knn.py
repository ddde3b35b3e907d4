"""Weighted k-nearest neighbours by cosine, exact (the protocol of arXiv 2104.14294).

Every device of this process has its share of the queries. The bank is sent to all of them part by
part, so it may be larger than a device's memory. Print k and the temperature beside every number:
other settings move it by several points.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from protojax import errors, local_devices, progress
from protojax.metrics import pairwise

# Similarities held at once, and numbers of the bank on a device at once: 256 MiB of float32.
_PAIRS = 2**26
_PART = 2**26


@functools.partial(jax.jit, static_argnames="chunk")
def _merge(best, part, start, num, queries, *, chunk):
  """`best` (similarities, rows; [M, k] each) after rows `start` and on of `num`, which are `part`.

  What was found before stands first, and `top_k` takes the first of equals: the lower row.
  """

  def share(of_queries, of_bank):
    (queries, *best), (part, start, num) = of_queries, of_bank
    part = pairwise.unit_rows(part)
    k, rows = best[0].shape[1], start + jnp.arange(part.shape[0], dtype=jnp.int32)

    def one(old):
      query, nearest, found = old
      similarity = jnp.matmul(part, query, precision=jax.lax.Precision.HIGHEST)
      similarity = jnp.where(rows < num, similarity, -jnp.inf)  # the last part is padded
      new, at = jax.lax.top_k(similarity, min(k, part.shape[0]))
      nearest, order = jax.lax.top_k(jnp.concatenate([nearest, new]), k)
      return nearest, jnp.concatenate([found, rows[at]])[order]

    return jax.lax.map(one, (pairwise.unit_rows(queries), *best), batch_size=chunk)

  return local_devices.by_share(share)((queries, *best), (part, start, num))


def _check_k(k: int, num: int) -> None:
  if not 1 <= k <= num:
    raise errors.UserError(
      f"k-NN: k={k} neighbours of a bank of {num} images: choose 1 to {num} with config.probe.k"
    )


def nearest(
  bank: jax.Array,
  queries: jax.Array,
  *,
  k: int,
  chunk: int | None = None,
  part: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The k most similar bank rows of every query, most similar first; of equals the lower row.

  Args:
    bank: [N, D] features, any norm and float dtype; stays on the host but for one part.
    queries: [M, D].
    k: at most N.
    chunk: queries that a device compares with a part at a time; None fits 256 MiB of similarities.
    part: bank rows on a device at a time; None fits 256 MiB.

  Returns:
    (cosines float32 [M, k], bank rows int32 [M, k]).

  Raises:
    UserError: if k is not in 1..N.
  """
  num = len(bank)
  _check_k(k, num)
  bank, queries = np.asarray(bank), np.asarray(queries)
  part = min(num, part or max(1, _PART // bank.shape[1]))
  share = -(-len(queries) // local_devices.mesh().size)
  chunk = min(chunk or max(1, min(1024, _PAIRS // part)), max(share, 1))
  shape = len(queries), k
  best = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32)
  queries, *best = local_devices.split((queries, *best))
  with progress.during("k-NN, part of the bank", -(-num // part)) as line:
    for start in range(0, num, part):
      rows = bank[start : start + part]
      rows = np.pad(rows, ((0, part - len(rows)), (0, 0)))
      jax.block_until_ready(best)  # until here the host was a part ahead of the device
      line.to(start // part)
      best = _merge(best, rows, start, num, queries, chunk=chunk)
    similarity, found = (jnp.asarray(np.asarray(x)[: shape[0]]) for x in best)
  return similarity, found


def _votes(similarity, classes, temperature, num_classes):
  """Share of each class in the votes of neighbours [k], the most similar first: float32 [C]."""
  # The largest weight is 1, so that exp never overflows; shares do not change.
  weights = jnp.exp((similarity - similarity[0]) / temperature)
  return jax.ops.segment_sum(weights, classes, num_classes) / weights.sum()


@functools.partial(jax.jit, static_argnames="num_classes")
def _scores(similarity, classes, temperature, *, num_classes):
  return jax.vmap(lambda s, c: _votes(s, c, temperature, num_classes))(similarity, classes)


@functools.partial(jax.jit, static_argnames=("num_classes", "ks"))
def _ranks(similarity, classes, labels, temperatures, *, num_classes, ks):
  """How many classes come before the right one: int32 [M, len(ks), T]; C if no neighbour has it."""

  def one(query):
    similarity, classes, label = query

    def rank(k, temperature):
      near = classes[:k]
      votes = _votes(similarity[:k], near, temperature, num_classes)
      present = jnp.zeros(num_classes, bool).at[near].set(True)
      votes = jnp.where(present, votes, -1.0)  # behind those whose weight rounds to 0
      before = (votes > votes[label]) | (
        (votes == votes[label]) & (jnp.arange(num_classes) < label)
      )
      return jnp.where(present[label], before.sum(dtype=jnp.int32), num_classes)

    return jnp.stack([jax.vmap(functools.partial(rank, k))(temperatures) for k in ks])

  return jax.lax.map(one, (similarity, classes, labels), batch_size=1024)


def _check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
  if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
    bad = labels[(labels < 0) | (labels >= num_classes)][0]
    raise errors.UserError(
      f"k-NN: the {name} holds label {bad}, outside 0..{num_classes - 1}: give labelled images"
    )


def _check_temperature(temperature: float) -> None:
  if not temperature > 0:
    raise errors.UserError(
      f"k-NN: temperature={temperature:g} must be positive: set config.probe.temperature"
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
  part: int | None = None,
) -> jax.Array:
  """Share of each class in the votes of the k most similar bank rows, weighted exp(cosine / T).

  Args:
    bank: [N, D] features, any norm and float dtype.
    bank_labels: int [N], 0 to num_classes - 1.
    queries: [M, D].
    num_classes: C.
    k: neighbours that vote, at most N. Of equally similar rows the earlier ones vote.
    temperature: T.
    chunk: as for `nearest`.
    part: as for `nearest`.

  Returns:
    float32 [M, C], rows sum to 1.

  Raises:
    UserError: if k is not in 1..N, the temperature not positive, or a label out of range.
  """
  _check_temperature(temperature)
  bank_labels = np.asarray(bank_labels, np.int32)
  _check_labels("bank", bank_labels, num_classes)
  similarity, rows = nearest(bank, queries, k=k, chunk=chunk, part=part)
  return _scores(similarity, jnp.asarray(bank_labels)[rows], temperature, num_classes=num_classes)


def predict(bank, bank_labels, queries, **options) -> jax.Array:
  """Classifies each query by the largest share of `scores`, same arguments; of equals the lowest.

  Returns:
    int32 [M].
  """
  return jnp.argmax(scores(bank, bank_labels, queries, **options), axis=-1).astype(jnp.int32)


def accuracy(bank, bank_labels, queries, query_labels, *, num_classes: int, **options) -> float:
  """Share of queries that weighted k-nearest neighbours classify right, 0 to 1.

  >>> import numpy as np
  >>> bank, labels = np.eye(4)[[0, 0, 1, 1]], np.array([0, 0, 1, 1])
  >>> queries, truth = np.eye(4)[[0, 1, 1, 1]], np.array([0, 1, 1, 0])
  >>> accuracy(bank, labels, queries, truth, num_classes=2, k=2)
  0.75

  Args:
    bank: [N, D].
    bank_labels: int [N].
    queries: [M, D], M > 0.
    query_labels: int [M], 0 to num_classes - 1.
    num_classes: C.
    **options: k, temperature, chunk, part of `scores`.

  Raises:
    UserError: as `scores`, and for query labels out of range.
  """
  query_labels = np.asarray(query_labels)
  _check_labels("test set", query_labels, num_classes)
  predicted = predict(bank, bank_labels, queries, num_classes=num_classes, **options)
  return float(np.mean(np.asarray(predicted) == query_labels))


def evaluate(
  bank: jax.Array,
  bank_labels: jax.Array,
  queries: jax.Array,
  query_labels: jax.Array,
  *,
  num_classes: int,
  ks: Sequence[int] = (10, 20, 100, 200),
  temperatures: Sequence[float] = (0.07,),
  chunk: int | None = None,
  part: int | None = None,
) -> dict[str, float]:
  """Accuracies at several k and T from one pass over the bank.

  Args:
    bank: [N, D].
    bank_labels: int [N], 0 to num_classes - 1.
    queries: [M, D], M > 0.
    query_labels: int [M], 0 to num_classes - 1.
    num_classes: C.
    ks: numbers of neighbours, each at most N.
    temperatures: all tried with every k.
    chunk: as for `nearest`.
    part: as for `nearest`.

  Returns:
    {"top1_k20_T0.07": share of queries whose class has the most votes, of equals the lowest,
    "top5_k20_T0.07": share of those whose class is among the five with the most, ...}, 0 to 1;
    top5 only with five classes or more. A class that no neighbour has is never among them.

  Raises:
    UserError: as `scores`, and for query labels out of range.
  """
  for k in ks:
    _check_k(k, len(bank))
  for temperature in temperatures:
    _check_temperature(temperature)
  bank_labels, query_labels = np.asarray(bank_labels, np.int32), np.asarray(query_labels, np.int32)
  _check_labels("bank", bank_labels, num_classes)
  _check_labels("test set", query_labels, num_classes)
  similarity, rows = nearest(bank, queries, k=max(ks), chunk=chunk, part=part)
  ranks = _ranks(
    similarity,
    jnp.asarray(bank_labels)[rows],
    query_labels,
    jnp.asarray(temperatures, jnp.float32),
    num_classes=num_classes,
    ks=tuple(ks),
  )
  ranks, out = np.asarray(ranks), {}
  for i, k in enumerate(ks):
    for j, temperature in enumerate(temperatures):
      for top in (1, 5) if num_classes >= 5 else (1,):
        out[f"top{top}_k{k}_T{temperature:g}"] = float(np.mean(ranks[:, i, j] < top))
  return out
