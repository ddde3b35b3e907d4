"""Batch normalisation over the global batch, one view at a time."""

import functools

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
    if not train:
      mean, var = running_mean.value[None], running_var.value[None]
      return _affine(x, mean, _inverse(var) * scale[None], bias[None]).astype(self.dtype)
    y, mean, var = _normalise(x, scale, bias, groups, self.dtype)
    if not self.is_initializing():
      mean, var = jax.lax.stop_gradient((mean, var))
      count = x.size // (groups * channels)
      unbiased = var * (count / max(count - 1, 1))
      running_mean.value = _move(running_mean.value, mean)
      running_var.value = _move(running_var.value, unbiased)
    return y


def _move(running: jax.Array, batch: jax.Array) -> jax.Array:
  """[C] running statistic after one batch whose statistic is [V, C]."""
  return _MOMENTUM * running + (1.0 - _MOMENTUM) * batch.mean(axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(
  x: jax.Array, scale: jax.Array, bias: jax.Array, views: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises every view with its own moments over images and positions.

  The derivative is written out so that what is kept for it is `x` in its own dtype, and no array
  of its size in float32; it says nothing of the moments, which are not to be differentiated.

  Args:
    x: [B V, ..., C].
    scale: [C] float32.
    bias: [C] float32.
    views: V.
    dtype: of the first result.

  Returns:
    [B V, ..., C] in `dtype`; mean and variance, float32 [V, C].
  """
  return _forwards(x, scale, bias, views, dtype)[0]


def _forwards(x, scale, bias, views, dtype):
  """What `_normalise` returns, and what is kept."""
  mean, var = _moments(x, views)
  inverse = _inverse(var)
  y = _affine(x, mean, inverse * scale[None], bias[None]).astype(dtype)
  return (y, mean, var), (x, scale, mean, inverse)


def _backwards(views, dtype, kept, gradients):
  """dx = scale / std (dy - mean(dy) - n mean(dy n)), n the normalised x, which is made again."""
  del dtype
  x, scale, mean, inverse = kept
  dy = gradients[0].astype(jnp.float32)
  normalised = _affine(x, mean, inverse, jnp.zeros_like(mean))
  sums = jnp.stack([_own_sums(dy, views), _own_sums(dy * normalised, views)])
  dbias, dscale = sums.sum(axis=1)  # [V, C], one exchange
  count = x.size // mean.size
  dx = dy - _to_rows(dbias / count, x) - normalised * _to_rows(dscale / count, x)
  dx = dx * _to_rows(inverse * scale[None], x)
  return dx.astype(x.dtype), dscale.sum(axis=0), dbias.sum(axis=0)


_normalise.defvjp(_forwards, _backwards)


def _moments(x: jax.Array, views: int) -> tuple[jax.Array, jax.Array]:
  """Mean and variance over images and positions: [B V, ..., C] -> float32 [V, C] twice.

  E[x^2] - E[x]^2 cancels where the mean is large. So a device takes the moments of its own rows
  about one of them, and what is added up of its mean are two parts: the upper eight bits, whose
  sums and sums of squares are exact for 256 devices of like means, and the small rest.
  """
  corners = x[(slice(None), *(0,) * (x.ndim - 2))].astype(jnp.float32)  # [B V, C]
  corners = jax.lax.stop_gradient(_parts(corners, views))
  near = corners[:, 0]  # [N, V, C]
  centres = jnp.broadcast_to(near[:, None], corners.shape).reshape(-1, *near.shape[1:])
  centred = x.astype(jnp.float32) - _to_rows(centres, x)
  devices, count = near.shape[0], x.size // near.size
  offset = _own_sums(centred, views) / count
  var = _own_sums(jnp.square(centred), views) / count - jnp.square(offset)
  mean = near + offset  # [N, V, C]

  high = jax.lax.stop_gradient(_eight_bits(mean))
  low = mean - high
  parts = jnp.stack([var, high, high * high, low, low * (2.0 * high + low)])
  var, high, high_squares, low, squares = parts.sum(axis=1)  # [V, C], one exchange
  about = jax.lax.stop_gradient(_eight_bits(high / devices))
  high_offset = high - devices * about
  # The sum of squares of the devices' means about `about`, large terms first.
  spread = (high_squares - about * high) - about * high_offset + (squares - 2.0 * about * low)
  offset = (high_offset + low) / devices
  var = var / devices + (spread / devices - jnp.square(offset))
  return about + offset, jnp.maximum(var, 0.0)


def _affine(x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array) -> jax.Array:
  """float32 (x - mean) factor + bias: [B V, ..., C] and [V, C] or [1, C] -> [B V, ..., C]."""
  return (x.astype(jnp.float32) - _to_rows(mean, x)) * _to_rows(factor, x) + _to_rows(bias, x)


def _inverse(var: jax.Array) -> jax.Array:
  return jax.lax.rsqrt(var + _EPSILON)


def _own_sums(x: jax.Array, views: int) -> jax.Array:
  """Sums over the images of each of N devices, and positions: [B V, ..., C] -> [N, V, C]."""
  # Positions first: a large array whose rows are split into images and views is a copy on a TPU.
  return _parts(x.sum(axis=range(1, x.ndim - 1)), views).sum(axis=1)


def _parts(rows: jax.Array, views: int) -> jax.Array:
  """[B V, C] -> [N, B / N, V, C], a part each device."""
  return placement.parts(rows.reshape(-1, views, rows.shape[-1]))


def _to_rows(statistic: jax.Array, x: jax.Array) -> jax.Array:
  """[V, C] or [B, V, C] -> [B V, 1, ..., C], one for each row of `x`."""
  views, channels = statistic.shape[-2:]
  rows = jnp.broadcast_to(statistic, (x.shape[0] // views, views, channels))
  return rows.reshape(x.shape[0], *(1,) * (x.ndim - 2), channels)


def _eight_bits(x: jax.Array) -> jax.Array:
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
