"""Batch normalisation over the global batch, one view at a time."""

import flax.linen as nn
import jax
import jax.numpy as jnp

_EPSILON = 1e-5
_MOMENTUM = 0.9


class BatchNorm(nn.Module):
  """Batch normalisation (arXiv 1502.03167) whose statistics are those of the whole batch.

  The statistics are plain means, so under jit over a mesh they cover every device ("SyncBN").
  The merged rows come image by image (rows b V to b V + V - 1 are the V views of image b); by
  default every view is normalised with statistics of its own, as if the views had been passed
  one after the other.

  Running statistics are in the collection "batch_stats": "mean" and "var" [C] float32, moved once
  a call in train mode by .1 towards the mean over views of the batch's statistics (variance
  with n - 1). Pass `mutable=["batch_stats"]` to `apply` in train mode.

  Sums and sums of squares are taken together, about the running mean: x is read once and devices
  exchange statistics once, forwards and backwards. What float32 loses of the variance is about 1e-7
  of the squared distance of the two means, a billionth of the variance where they are a tenth of
  a standard deviation apart, and a ten thousandth at 30, as may happen in the first steps. Several
  calls in a step (one a resolution) do not wait for one another if the optional collection "start"
  holds what "batch_stats" did before the first.

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
      # About a value that every device knows, so that one exchange of two sums gives both moments.
      shift = self.get_variable("start", "mean", running_mean.value)
      y -= shift[None, None, None]
      mean = y.mean(axis=(0, 2), keepdims=True)
      var = jnp.square(y).mean(axis=(0, 2), keepdims=True) - jnp.square(mean)
      var = jnp.maximum(var, 0.0)  # rounding
      if not self.is_initializing():
        count = y.shape[0] * y.shape[2]
        unbiased = var * (count / max(count - 1, 1))
        running_mean.value = _move(running_mean.value, shift[None, None, None] + mean)
        running_var.value = _move(running_var.value, unbiased)
    else:
      mean, var = running_mean.value, running_var.value
      mean, var = mean[None, None, None], var[None, None, None]
    y = (y - mean) * (jax.lax.rsqrt(var + _EPSILON) * scale[None, None, None])
    return (y + bias[None, None, None]).reshape(x.shape).astype(self.dtype)


def _move(running: jax.Array, batch: jax.Array) -> jax.Array:
  """[C] running statistic after one batch whose statistic is [1, V, 1, C]."""
  return _MOMENTUM * running + (1.0 - _MOMENTUM) * batch.mean(axis=(0, 1, 2))
