"""Barlow Twins: two views agree in every dimension, dimensions do not repeat (arXiv 2103.03230).

Each dimension of the two global views is standardised over the global batch; the cross-correlation
matrix of the views is pulled to the identity. No teacher, no prototypes, no local views. The head
is the published one with layers=3, norm="batch", activation="relu", bias=False, init="uniform" and
l2=False.

`method.scale` multiplies the loss. Under LARS that changes the steps of biases and norms, and
divides the weight decay: the published ImageNet code now gives biases and norms a learning rate of
their own, .024 of the weights', as a scale of .024 did before. The loss is at least 0.
"""

import jax
import jax.numpy as jnp

from protojax.methods import base
from protojax.methods.networks import student

OPTIONS = {
  "prototypes": "none",
  "num_prototypes": 0,
  "off_diagonal_weight": 0.0051,  # lambda
  "scale": 1.0,  # of the whole loss; the CIFAR recipes of solo-learn have .1
}


def cross_correlation(z: jax.Array) -> jax.Array:
  """Correlation of every dimension of view 0 with every dimension of view 1.

  Args:
    z: [B, 2, D] embeddings of the global batch, any float dtype.

  Returns:
    [D, D] float32, in [-1, 1]. The variance is the biased one plus 1e-5, as in batch norm, so that
    a constant dimension correlates with nothing and keeps a finite gradient.

  Raises:
    ValueError: if z is not [B, 2, D] with B of 2 or more.
  """
  z = student.check_pairs(z)
  z = z - z.mean(axis=0, keepdims=True)
  z *= jax.lax.rsqrt(jnp.square(z).mean(axis=0, keepdims=True) + 1e-5)
  return jnp.einsum("bd,be->de", z[:, 0], z[:, 1], precision="highest") / z.shape[0]


def redundancy(correlation: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(sum of (1 - diagonal)^2, sum of the other squares) of a [D, D] matrix, each []."""
  diagonal = jnp.diagonal(correlation)
  # A mask and no difference of sums, where the diagonal's D would cancel.
  others = correlation * (1.0 - jnp.eye(*correlation.shape, dtype=correlation.dtype))
  return jnp.sum(jnp.square(1.0 - diagonal)), jnp.sum(jnp.square(others))


def make(config) -> base.Method:
  """Barlow Twins from `config.method`.

  Raises:
    UserError: for local views, prototypes or a normalised embedding.
  """
  options = config.method

  def objective(z):
    on_diagonal, off_diagonal = redundancy(cross_correlation(z))
    value = options.scale * (on_diagonal + options.off_diagonal_weight * off_diagonal)
    return value, {"on_diagonal": on_diagonal, "off_diagonal": off_diagonal}

  return student.two_views(config, objective)
