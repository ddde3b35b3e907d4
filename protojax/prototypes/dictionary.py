"""A dictionary of random codes that never moves: prototypes by the hundred thousand, unlearned.

Every code is a corner of the hypercube {-1, 1}^D. Codes of many dimensions are nearly orthogonal:
their cosines have mean 0 and variance 1 / D, the largest of K (K - 1) / 2 is about
sqrt(2 ln(K (K - 1)) / D). A number takes a byte: 192 MB at D = 384 and K = 500,000.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from protojax import losses
from protojax.prototypes import soft


def init(key: jax.Array, dim: int, num: int) -> dict[str, jax.Array]:
  """Draws codes; the same ones from the same key, on any mesh.

  Args:
    key: typed key.
    dim: D.
    num: K.

  Returns:
    {"dictionary": int8 [D, K], each -1 or 1 with probability 1/2, "key": `key`}.
  """
  return {"dictionary": jax.random.rademacher(key, (dim, num), jnp.int8), "key": key}


def rows(codes: jax.Array) -> jax.Array:
  """int8 [D, K] -> unit rows float32 [K, D]."""
  return codes.T.astype(jnp.float32) * codes.shape[0] ** -0.5


def inverse_temperature(num: int, eps: float) -> float:
  """L such that softmax(L cos(x, codes)) at x = code leaves eps to each of K - 1 orthogonal others.

  ln((1 - eps (K - 1)) / eps), positive for eps below 1 / K (arXiv 2410.04959).
  """
  return math.log((1.0 - eps * (num - 1)) / eps)


def scores(codes: jax.Array, x: jax.Array) -> jax.Array:
  """Inner products of x [..., D] with codes int8 [D, K], over D: 1 at x = code.

  Returns:
    [..., K] float32; float64 stays float64.
  """
  x = losses.full(x)
  products = jnp.einsum("...d,dk->...k", x, codes.astype(x.dtype), precision="highest")
  return products / codes.shape[0]


class Comparison(NamedTuple):
  """What two global views say of the codes, as means over the batch, in nats.

  Attributes:
    cross_entropy: [V, 2], -sum_k p_k ln p'_k of any view v (p') and global view t (p); v = t is the
      entropy of the assignments of a view.
    mean_entropy: [2], entropy of the mean assignment.
    uniform: [2], cross entropy of the mean assignment under uniform targets.
  """

  cross_entropy: jax.Array
  mean_entropy: jax.Array
  uniform: jax.Array


def compare(
  codes: jax.Array, x: jax.Array, *, scale: float, block: int = 0, precision: str = "highest"
) -> Comparison:
  """Softmax assignments of views to codes, beside one another and beside uniform ones.

  All in the log domain: at scale 147 probabilities underflow, and so would their mean over a batch,
  whose logarithm is wanted. In blocks the scores are computed twice in the forward pass and twice
  in the backward one, and never stored.

  Args:
    codes: int8 [D, K].
    x: [B, V, D] embeddings of norm sqrt(D) or less, views 0 and 1 the global ones; any float dtype.
    scale: the score of x = code, an inverse temperature.
    block: codes that a device compares at a time, see `streaming.block_size`; 0 takes all.
    precision: of the products, one of `streaming.PRECISIONS`; codes are exact in all of them.
  """
  temperature = codes.shape[0] / scale
  every = soft.Scores(x, codes.T, temperature=temperature, block=block, precision=precision)
  cross_entropy, log_mean = soft.agreement(soft.softmax(every))
  # Not `losses.entropy`: these probabilities underflow, their logarithms do not.
  mean_entropy = -jnp.sum(jnp.exp(log_mean) * log_mean, axis=-1)
  return Comparison(cross_entropy, mean_entropy, -log_mean.mean(axis=-1))
