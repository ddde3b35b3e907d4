"""Projection head: the MLP from features to the space that prototypes live in."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from protojax import losses
from protojax.models import activations, kernels
from protojax.models import batch_norm as norm_lib

ACTIVATIONS = {
  "gelu": activations.gelu,
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
    fsdp: whether kernels are stored split over devices, see `kernels.whole`.
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
  fsdp: bool = False
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
      return nn.Dense(
        width,
        use_bias=self.bias,
        dtype=self.dtype,
        kernel_init=INITS[self.kernel_init],
        dot_general=kernels.dot_general if self.fsdp else None,
        name=f"fc{i}",
      )

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
    return losses.l2_normalize(x) if self.l2 else x
