"""Projection head, and weight-normalised prototypes as plain functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from protojax.models import norm as norm_lib

ACTIVATIONS = {
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "relu": jax.nn.relu,
  "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01),
}


def _uniform(key, shape, dtype=jnp.float32):
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


# Of the weights; "uniform" is U(-1/sqrt(fan in), 1/sqrt(fan in)), the default of PyTorch.
INITS = {"normal": nn.initializers.normal(0.02), "uniform": _uniform}


class Projector(nn.Module):
  """MLP from features to the space the prototypes live in (arXiv 2104.14294).

  layers - 1 times (Linear, norm, activation), then Linear and, if `norm_output`, a norm. Biases
  start at 0.

  Attributes:
    layers: number of linear layers; 1 is a single Linear.
    hidden: width between the layers.
    bottleneck: output dimension D.
    norm: "none" or "batch", before each activation.
    norm_output: batch norm after the last Linear.
    activation: a key of ACTIVATIONS.
    bias: whether the Linears have one; before a norm it does nothing.
    kernel_init: of the weights, a key of INITS.
    joint_norm: batch norm over all views together instead of view by view.
    l2: normalise the output to length one.
    dtype: of the matrix products; parameters, norms and output are float32.
  """

  layers: int = 3
  hidden: int = 2048
  bottleneck: int = 256
  norm: str = "none"
  norm_output: bool = False
  activation: str = "gelu"
  bias: bool = True
  kernel_init: str = "normal"
  joint_norm: bool = False
  l2: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, views: int = 1, train: bool = False) -> jax.Array:
    """Projects features.

    Args:
      x: [B * V, F], the V views of an image in consecutive rows.
      views: V, for the statistics of batch norm.
      train: mode of batch norm.

    Returns:
      [B * V, D] float32.
    """
    def dense(width, i):
      return nn.Dense(width, use_bias=self.bias, dtype=self.dtype,
                      kernel_init=INITS[self.kernel_init], name=f"fc{i}")

    def batch_norm(i, dtype):
      return norm_lib.BatchNorm(joint=self.joint_norm, dtype=dtype, name=f"norm{i}")

    for i in range(1, self.layers):
      x = dense(self.hidden, i)(x)
      if self.norm == "batch":
        x = batch_norm(i, self.dtype)(x, views=views, train=train)
      x = ACTIVATIONS[self.activation](x)
    x = dense(self.bottleneck, self.layers)(x).astype(jnp.float32)
    if self.norm_output:
      x = batch_norm(self.layers, jnp.float32)(x, views=views, train=train)
    return l2_normalize(x) if self.l2 else x


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
  """x / max(norm, epsilon) over the last axis; the gradient at 0 is finite."""
  squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, epsilon**2))


def init_prototypes(
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


def prototype_rows(prototypes: dict[str, jax.Array]) -> jax.Array:
  """g v / ||v|| row by row (arXiv 1602.07868), [K, D] float32; g is 1 where there is none.

  The gradient to a row of v is orthogonal to that row.
  """
  v = prototypes["v"].astype(jnp.float32)
  rows = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
  return prototypes["g"] * rows if "g" in prototypes else rows


def prototype_scores(rows: jax.Array, z: jax.Array) -> jax.Array:
  """Inner products of embeddings z [..., D] with prototypes rows [K, D]: [..., K] float32."""
  z, rows = z.astype(jnp.float32), rows.astype(jnp.float32)
  return jnp.einsum("...d,kd->...k", z, rows, precision="highest")
