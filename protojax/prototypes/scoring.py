"""How one set of prototypes scores images, as plain arrays: all that codes need beside the encoder.

A set compares an embedding, made of what the head gives, with its rows; the largest score is the
image's code:

  z = head(class token), or that of every patch token
  z = |z| (z - mean) / |z - mean|, where there is a mean
  z = z / |z| or tanh(z), where `place` says so
  embedding = z, the mean over patches of z
  scores = scale * rows @ embedding + bias
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from protojax import losses
from protojax.prototypes import mixture, soft, streaming, weight_norm

PLACES = ("as_is", "unit", "tanh")
TOKENS = ("class", "patch")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rows", "mean", "bias"],
  meta_fields=["tokens", "place", "scale"],
)
@dataclasses.dataclass(frozen=True)
class Scoring:
  """One set of K prototypes of dimension D.

  Attributes:
    rows: [K, D], any dtype and any norm, as embeddings meet them.
    mean: float32 [D], the running mean of the features that a mixture was fitted to; or None.
    bias: float32 [K], added to the scores; or None.
    tokens: whose head output is compared, of TOKENS.
    place: what becomes of it, of PLACES.
    scale: factor of the products.
  """

  rows: jax.Array
  mean: jax.Array | None = None
  bias: jax.Array | None = None
  tokens: str = "class"
  place: str = "as_is"
  scale: float = 1.0


def even(scoring: Scoring) -> bool:
  """Whether all rows are of one length, so that the largest product is the largest cosine."""
  lengths = jnp.linalg.norm(jnp.asarray(scoring.rows, jnp.float32), axis=1)
  return bool(lengths.max() <= 1.001 * lengths.min())


def embeddings(scoring: Scoring, z: jax.Array) -> jax.Array:
  """What is compared with the rows: the head's output, [B, D] or of patches [B, T, D] -> [B, D]."""
  if scoring.mean is not None:
    z = mixture.without_mean(z, scoring.mean)
  if scoring.place == "unit":
    z = losses.l2_normalize(z)
  elif scoring.place == "tanh":
    z = jnp.tanh(z)
  return z.mean(axis=1) if scoring.tokens == "patch" else z


def scores(scoring: Scoring, embedded: jax.Array) -> jax.Array:
  """[B, D] from `embeddings` -> float32 [B, K]."""
  out = scoring.scale * weight_norm.scores(scoring.rows, embedded)
  return out if scoring.bias is None else out + scoring.bias[None]


def codes(method: Any, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
  """The prototype with the largest score of every image, of equal ones the first.

  Where a device has many scores [B, K] (`streaming.block_size`) they are made by blocks of
  prototypes. A method without `scoring` makes all of them.

  Args:
    method: what has `codes`, `embeddings` and `scoring` of `methods.Method`.
    variables: its own.
    images: [B, S, S, 3].

  Returns:
    {set: int32 [B]}.
  """
  sets = method.scoring(variables) if method.scoring else {}
  blocks = {k: streaming.block_size(None, len(images), len(one.rows)) for k, one in sets.items()}
  if not any(blocks.values()):
    every = method.codes(variables, images)
    return {k: scores.argmax(axis=-1).astype(jnp.int32) for k, scores in every.items()}
  embedded = method.embeddings(variables, images)

  def best(name, one):
    bias = None if one.bias is None else one.bias / one.scale
    return soft.best(soft.Scores(embedded[name], one.rows, bias, block=blocks[name]))

  return {name: best(name, one) for name, one in sets.items()}
