"""Prototypes that a gradient moves: weight-normalised rows, and scores against any rows."""

import jax
import jax.numpy as jnp


def init(
  key: jax.Array, num_prototypes: int, dim: int, trainable_norm: bool = False
) -> dict[str, jax.Array]:
  """Start of weight-normalised prototypes.

  Args:
    key: random key.
    num_prototypes: K.
    dim: D.
    trainable_norm: whether the lengths of the rows are trained; else all are 1.

  Returns:
    {"v": [K, D] float32, U(-1/sqrt(D), 1/sqrt(D))}, and "g": ones [K, 1] if `trainable_norm`.
  """
  bound = dim**-0.5
  shape = (num_prototypes, dim)
  prototypes = {"v": jax.random.uniform(key, shape, minval=-bound, maxval=bound)}
  if trainable_norm:
    prototypes["g"] = jnp.ones((num_prototypes, 1))
  return prototypes


def rows(prototypes: dict[str, jax.Array]) -> jax.Array:
  """g v / ||v|| row by row (arXiv 1602.07868), [K, D] float32; g is 1 where there is none.

  The gradient to a row of v is orthogonal to that row.
  """
  v = prototypes["v"].astype(jnp.float32)
  # Not `losses.l2_normalize`, which differs from a division in the last bit: earlier runs go on.
  rows = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
  return prototypes["g"] * rows if "g" in prototypes else rows


def scores(rows: jax.Array, z: jax.Array) -> jax.Array:
  """Inner products of embeddings z [..., D] with prototypes rows [K, D]: [..., K] float32."""
  z, rows = z.astype(jnp.float32), rows.astype(jnp.float32)
  return jnp.einsum("...d,kd->...k", z, rows, precision="highest")
