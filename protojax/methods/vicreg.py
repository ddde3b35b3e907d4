"""VICReg: views agree, dimensions keep their variance and do not covary (arXiv 2105.04906).

Variances and covariances are those of each global view over the global batch. No teacher, no
prototypes, no local views. The head is the published one with layers=3, norm="batch",
activation="relu", init="uniform" and l2=False; a bias of its last layer would have no gradient.

The paper adds the variance terms of the two views, the authors' code averages them: half the
weight. `method.var_reduction` is "sum" or "mean". The loss is at least 0.
"""

import jax
import jax.numpy as jnp

from protojax import errors
from protojax.methods import base
from protojax.methods.networks import student

OPTIONS = {
  "prototypes": "none",
  "num_prototypes": 0,
  "invariance_weight": 25.0,
  "variance_weight": 25.0,
  "covariance_weight": 1.0,
  "var_reduction": "sum",  # over the views, as in the paper; "mean" as in the authors' code
}


def invariance(z: jax.Array) -> jax.Array:
  """Mean squared difference of the two views: [B, 2, D] any float dtype -> [] float32.

  Raises:
    ValueError: as `student.check_pairs`.
  """
  z = student.check_pairs(z)
  return jnp.mean(jnp.square(z[:, 0] - z[:, 1]))


def variance(z: jax.Array) -> jax.Array:
  """How far the standard deviations of a view stay below 1, on average over its dimensions.

  Args:
    z: [B, 2, D] embeddings of the global batch, any float dtype.

  Returns:
    [2] float32, mean of max(0, 1 - sqrt(var + 1e-4)), with the unbiased variance.

  Raises:
    ValueError: as `student.check_pairs`.
  """
  z = student.check_pairs(z)
  z = z - z.mean(axis=0, keepdims=True)
  deviation = jnp.sqrt(jnp.sum(jnp.square(z), axis=0) / (z.shape[0] - 1) + 1e-4)
  return jax.nn.relu(1.0 - deviation).mean(axis=-1)


def covariance(z: jax.Array) -> jax.Array:
  """Squared covariances of different dimensions of a view, their sum over D.

  Args:
    z: [B, 2, D] embeddings of the global batch, any float dtype.

  Returns:
    [2] float32; covariances are unbiased.

  Raises:
    ValueError: as `student.check_pairs`.
  """
  z = student.check_pairs(z)
  dim = z.shape[-1]
  z = z - z.mean(axis=0, keepdims=True)
  matrix = jnp.einsum("bvd,bve->vde", z, z, precision="highest") / (z.shape[0] - 1)
  others = matrix * (1.0 - jnp.eye(dim, dtype=z.dtype))[None]
  return jnp.sum(jnp.square(others), axis=(1, 2)) / dim


def make(config) -> base.Method:
  """VICReg from `config.method`.

  Raises:
    UserError: for an unknown `method.var_reduction`, local views, prototypes or a normalised
      embedding.
  """
  options = config.method
  if options.var_reduction not in ("sum", "mean"):
    raise errors.UserError(
      f"method.var_reduction={options.var_reduction!r} is unknown: choose sum or mean"
    )
  reduce = jnp.sum if options.var_reduction == "sum" else jnp.mean

  def objective(z):
    parts = {
      "invariance": invariance(z),
      "variance": reduce(variance(z)),
      "covariance": jnp.sum(covariance(z)),
    }
    return sum(options[f"{name}_weight"] * part for name, part in parts.items()), parts

  return student.two_views(config, objective)
