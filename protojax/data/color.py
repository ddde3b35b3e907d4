"""Colour operations on crops; pure functions of pixels in [0, 1], laid out [..., H, 3, W].

A parameter has one value an image, shape [...]. The adjustments mean what torchvision's mean on
float images (Pillow's on 8 bits round at every step). `level_jitter`, `solarize` and
`gaussian_blur` are for any number of channels.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

_HIGHEST = jax.lax.Precision.HIGHEST
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)


def _per_image(x: jax.Array) -> jax.Array:
  """[...] -> [..., 1, 1, 1]."""
  return x[..., None, None, None]


def grayscale(x: jax.Array) -> jax.Array:
  """Luma .299 R + .587 G + .114 B. [..., H, 3, W] -> [..., H, 1, W]."""
  r, g, b = (x[..., i : i + 1, :] for i in range(3))
  return 0.299 * r + 0.587 * g + 0.114 * b


def _mean(x: jax.Array) -> jax.Array:
  """[..., H, C, W] -> [..., 1, 1, 1]."""
  return jnp.mean(x, axis=(-3, -2, -1), keepdims=True)


def _blend(x: jax.Array, base: jax.Array, factor: jax.Array) -> jax.Array:
  """`factor` of x and the rest of `base`, clipped; factor 1 returns x to the bit."""
  return jnp.clip(factor * x + (1.0 - factor) * base, 0.0, 1.0)


def adjust_brightness(x: jax.Array, factor: jax.Array) -> jax.Array:
  """x times factor [...], clipped."""
  return jnp.clip(_per_image(factor) * x, 0.0, 1.0)


def adjust_contrast(x: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends with the mean of the grey image: factor [...] 0 is flat, 1 leaves x alone."""
  return _blend(x, _mean(grayscale(x)), _per_image(factor))


def adjust_saturation(x: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends with the grey image: factor [...] 0 is grey, 1 leaves x alone."""
  return _blend(x, grayscale(x), _per_image(factor))


def adjust_hue(x: jax.Array, shift: jax.Array) -> jax.Array:
  """Turns the hue of HSV by shift [...] turns; value and saturation stay.

  With m = min, c = max - min and the hue h in sixths of a turn, the channels of HSV are m + c f(h)
  for three trapezoids f, so that there is no branch over the six sectors.
  """
  r, g, b = (x[..., i, :] for i in range(3))
  high = jnp.maximum(jnp.maximum(r, g), b)
  low = jnp.minimum(jnp.minimum(r, g), b)
  chroma = high - low
  is_red, is_green = high == r, high == g
  slope = jnp.where(is_red, g - b, jnp.where(is_green, b - r, r - g))
  sector = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0))
  hue = sector + slope / jnp.where(chroma > 0.0, chroma, 1.0) + 6.0 * shift[..., None, None]
  hue -= 6.0 * jnp.floor(hue * (1.0 / 6.0))
  red = jnp.abs(hue - 3.0) - 1.0
  green = 2.0 - jnp.abs(hue - 2.0)
  blue = 2.0 - jnp.abs(hue - 4.0)
  trapezoids = jnp.clip(jnp.stack([red, green, blue], axis=-2), 0.0, 1.0)
  return low[..., None, :] + chroma[..., None, :] * trapezoids


def color_jitter(x: jax.Array, factors: jax.Array, slots: jax.Array) -> jax.Array:
  """Brightness, contrast, saturation and hue, each image in its own order.

  Args:
    x: [..., H, 3, W].
    factors: [..., 4], of brightness, contrast, saturation (1 leaves x alone) and the hue's shift
      in turns (0 leaves x alone up to rounding).
    slots: [..., 4] int32, a permutation: operation i comes as number slots[..., i]. An entry
      outside 0..3 leaves the operation out, to the bit.
  """
  b, c, s = (_per_image(factors[..., i]) for i in range(3))

  # A loop, not four copies: unrolled, XLA fuses a slot into each of its readers and computes it
  # again (on a CPU two to three times slower, and three times slower to compile).
  def apply(slot, x):
    bright, contrast, saturation, hue = (_per_image(slots[..., i] == slot) for i in range(4))
    factor = jnp.where(bright, b, jnp.where(contrast, c, jnp.where(saturation, s, 1.0)))
    gray = grayscale(x)
    base = jnp.where(contrast, _mean(gray), jnp.where(saturation, gray, 0.0))
    return jnp.where(hue, adjust_hue(x, factors[..., 3]), _blend(x, base, factor))

  return jax.lax.fori_loop(0, 4, apply, x)


def level_jitter(x: jax.Array, factors: jax.Array, slots: jax.Array) -> jax.Array:
  """Brightness and contrast of images without colour, each image in its own order.

  Contrast blends each channel with its own mean: a dim stain stays one.

  Args:
    x: [..., H, C, W].
    factors: [..., 2], of brightness and contrast (1 leaves x alone).
    slots: [..., 2] int32; the operation with the smaller number comes first, one with a negative
      number is left out, to the bit.
  """
  kept = slots >= 0
  bright, contrast = (_per_image(jnp.where(kept[..., i], factors[..., i], 1.0)) for i in range(2))

  def brighter(x):
    return jnp.clip(bright * x, 0.0, 1.0)

  def flatter(x):
    return _blend(x, jnp.mean(x, axis=(-3, -1), keepdims=True), contrast)

  bright_first = _per_image(slots[..., 0] < slots[..., 1])
  return jnp.where(bright_first, flatter(brighter(x)), brighter(flatter(x)))


def solarize(x: jax.Array) -> jax.Array:
  """Inverts pixels from .5 on: the same ones as Pillow's threshold of 128 on every 8-bit level."""
  return jnp.where(x < 0.5, x, 1.0 - x)


def blur_weights(sigma: jax.Array, size: int) -> jax.Array:
  """The matrix of a Gaussian filter along one axis, mirrored about the outer edge of the image.

  Args:
    sigma: [...] float32, standard deviation in pixels; 0 gives the identity to the bit.
    size: pixels along the axis; more than about 3 sigma, as only one reflection is folded in.

  Returns:
    [..., size, size] float32, rows sum to one.
  """
  # exp(-1e4) is 0 in float32: a sigma of zero keeps the diagonal only.
  decay = jnp.where(sigma > 0.0, 0.5 / jnp.square(jnp.maximum(sigma, 7.1e-3)), 1e4)
  position = np.arange(size)
  distance = position[:, None] - position[None, :]
  before = position[:, None] + position[None, :] + 1
  squares = np.stack([distance, before, 2 * size - before]).astype(np.float32) ** 2
  squares = squares.reshape((1,) * sigma.ndim + squares.shape)
  weights = jnp.sum(jnp.exp(-squares * _per_image(decay)), axis=-3)
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def gaussian_blur(x: jax.Array, sigma: jax.Array) -> jax.Array:
  """A true Gaussian, separable; outside the image its mirror image (edge pixels repeated).

  Pillow's GaussianBlur, which DINO used, approximates it by boxes and repeats the edge pixel only.

  Args:
    x: [..., H, C, W] float32.
    sigma: [...] float32 in pixels; 0 leaves the image alone to the bit.
  """
  columns = blur_weights(sigma, x.shape[-1])
  rows = columns if x.shape[-3] == x.shape[-1] else blur_weights(sigma, x.shape[-3])
  x = jnp.einsum("...sh,...hcw->...scw", rows, x, precision=_HIGHEST)
  return jnp.einsum("...scw,...tw->...sct", x, columns, precision=_HIGHEST)
