"""Batch normalisation over the global batch, one view at a time."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from protojax import placement

_EPSILON = 1e-5
_MOMENTUM = 0.9


class BatchNorm(nn.Module):
  """Batch normalisation (arXiv 1502.03167) whose statistics are those of the whole batch.

  Under jit over a mesh the statistics cover every device ("SyncBN"), which exchange them once
  forwards and once backwards (inside `jax.set_mesh`; elsewhere the first takes two).
  The merged rows come image by image (rows b V to b V + V - 1 are the V views of image b); by
  default every view is normalised with statistics of its own, as if the views had been passed
  one after the other.

  Running statistics are in the collection "batch_stats": "mean" and "var" [C] float32, moved once
  a call in train mode by .1 towards the mean over views of the batch's statistics (variance
  with n - 1). Pass `mutable=["batch_stats"]` to `apply` in train mode.

  Attributes:
    joint: take the statistics over all views together.
    zero_scale: start the scale at 0 instead of 1 (last norm of a residual branch).
    dtype: of the result; everything before is float32.
  """

  joint: bool = False
  zero_scale: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, views: int = 1, train: bool = False) -> jax.Array:
    """Normalises the last axis.

    Args:
      x: [B * V, ..., C], B major.
      views: V.
      train: use the batch's statistics and move the running ones, instead of reading those.

    Returns:
      [B * V, ..., C] in `dtype`.

    Raises:
      ValueError: the rows are not a multiple of `views`.
    """
    if x.shape[0] % views:
      raise ValueError(f"{x.shape[0]} rows are not a multiple of {views} views")
    channels = x.shape[-1]
    scale_init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
    scale = self.param("scale", scale_init, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))

    groups = 1 if self.joint else views
    # [B, V, positions, C]: the view axis is kept, B and the positions are averaged over.
    y = x.astype(jnp.float32).reshape(x.shape[0] // groups, groups, -1, channels)
    if train:
      mean, var = _moments(y)
      if not self.is_initializing():
        count = y.shape[0] * y.shape[2]
        unbiased = var * (count / max(count - 1, 1))
        running_mean.value = _move(running_mean.value, mean)
        running_var.value = _move(running_var.value, unbiased)
    else:
      mean, var = running_mean.value, running_var.value
      mean, var = mean[None, None, None], var[None, None, None]
    y = (y - mean) * (jax.lax.rsqrt(var + _EPSILON) * scale[None, None, None])
    return (y + bias[None, None, None]).reshape(x.shape).astype(self.dtype)


def _move(running: jax.Array, batch: jax.Array) -> jax.Array:
  """[C] running statistic after one batch whose statistic is [1, V, 1, C]."""
  return _MOMENTUM * running + (1.0 - _MOMENTUM) * batch.mean(axis=(0, 1, 2))


def _moments(y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and variance over images and positions: float32 [B, V, P, C] -> [1, V, 1, C] twice.

  E[y^2] - E[y]^2 cancels where the mean is large. So a device takes the moments of its own rows
  about one of them, and what is added up of its mean are two parts: the upper eight bits, whose
  sums and sums of squares are exact for 256 devices of like means, and the small rest.
  """
  y = placement.parts(y)  # [N, B / N, V, P, C], a part each device
  devices = y.shape[0]
  near = jax.lax.stop_gradient(y[:, :1, :, :1])
  offset = (y - near).mean(axis=(1, 3), keepdims=True)
  var = jnp.square(y - near).mean(axis=(1, 3), keepdims=True) - jnp.square(offset)
  mean = near + offset  # [N, 1, V, 1, C]

  high = jax.lax.stop_gradient(_eight_bits(mean))
  low = mean - high
  parts = jnp.stack([var, high, high * high, low, low * (2.0 * high + low)])
  var, high, high_squares, low, squares = parts.sum(axis=1)  # [1, V, 1, C], one exchange
  about = jax.lax.stop_gradient(_eight_bits(high / devices))
  high_offset = high - devices * about
  # The sum of squares of the devices' means about `about`, large terms first.
  spread = (high_squares - about * high) - about * high_offset + (squares - 2.0 * about * low)
  offset = (high_offset + low) / devices
  var = var / devices + (spread / devices - jnp.square(offset))
  return about + offset, jnp.maximum(var, 0.0)


def _eight_bits(x: jax.Array) -> jax.Array:
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
