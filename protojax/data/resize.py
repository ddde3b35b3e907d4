"""Crop and resize as two small matrix products an image; no gather.

Pixels lie as [..., H, C, W] from here to the end of the augmentation: both products then run
without a transpose and the innermost axis is a whole row of one channel, not three numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from protojax import sizes

_HIGHEST = jax.lax.Precision.HIGHEST  # bfloat16 or TF32 would cost up to a grey level


def _bicubic(x: jax.Array) -> jax.Array:
  """Keys' cubic kernel with a = -1/2, zero from |x| = 2 on."""
  x = jnp.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1.0
  far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
  return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


def _bilinear(x: jax.Array) -> jax.Array:
  """A triangle, zero from |x| = 1 on."""
  return jnp.maximum(1.0 - jnp.abs(x), 0.0)


INTERPOLATIONS = {"bicubic": _bicubic, "bilinear": _bilinear}


def resize_weights(
  box0: jax.Array,
  box1: jax.Array,
  in_size: int,
  out_size: int,
  interpolation: str = "bicubic",
  there: jax.Array | None = None,
) -> jax.Array:
  """The matrix that resizes one axis: antialiased, Pillow's rule.

  The kernel is stretched by the shrinking factor (never compressed). Taps outside the box but
  inside the image count; taps outside the image are dropped and the others renormalised. Pillow
  rounds the ends of the kernel's support to whole pixels, which only leaves out taps of weight
  zero.

  Args:
    box0: [...] float32, where the first output pixel begins, in pixels of the input; edges of
      pixel i are at i and i + 1.
    box1: [...] float32, where the last output pixel ends. `box1 < box0` gives the mirror image.
    in_size: pixels of the input along the axis.
    out_size: pixels of the output.
    interpolation: the kernel, of `INTERPOLATIONS`.
    there: [...], pixels of the input that belong to the image, the first ones; None: all.

  Returns:
    [..., out_size, in_size] float32, rows sum to one.
  """
  # A position of several hundred pixels in float32 would be wrong by 1e-5 pixel, in a way that
  # depends on which operations the compiler fuses. So the scale is split in two: the product with
  # the coarse part and the first difference are exact, and what is left is small.
  length = box1 - box0
  scale = length / out_size
  coarse = jnp.round(scale * 2048.0) / 2048.0
  fine = (length - coarse * out_size) / out_size
  whole = jnp.floor(box0)
  part = box0 - whole
  scale, coarse, fine, whole, part = (
    x[..., None, None] for x in (scale, coarse, fine, whole, part)
  )
  leading = (1,) * box0.ndim
  target = np.arange(out_size, dtype=np.float32).reshape(*leading, out_size, 1) + 0.5
  source = np.arange(in_size, dtype=np.float32).reshape(*leading, 1, in_size) + 0.5
  distance = ((source - whole) - target * coarse) - (part + target * fine)
  weights = INTERPOLATIONS[interpolation](distance / jnp.maximum(jnp.abs(scale), 1.0))
  if there is not None:
    weights = jnp.where(source < there[..., None, None], weights, 0.0)
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def crop_resize(
  images: jax.Array,
  boxes: jax.Array,
  size: sizes.Size,
  interpolation: str = "bicubic",
  stored: jax.Array | None = None,
) -> jax.Array:
  """Cuts several boxes out of every image and resizes them to `size`.

  Equal to Pillow's `resize(size, BICUBIC, box=box)` (or BILINEAR) in mode "F", up to float32, and
  then clipped, because a bicubic kernel overshoots at edges. In mode "RGB" Pillow rounds to whole
  grey levels after each of the two passes and may differ by 2/255. OpenCV's filters are others
  (bicubic: a = -.75; no antialiasing). torchvision cuts first, so that no tap lies outside the box;
  the border of a crop differs by that.

  Args:
    images: [B, H, W, C] uint8.
    boxes: [B, V, 4] float32, (top, left, bottom, right) in pixels of `images`; need not be whole.
      right < left mirrors the crop.
    size: side of the result in pixels, or (height, width).
    interpolation: "bicubic" or "bilinear".
    stored: [B, 2], height and width of the image at the top left of each of `images`; None: all.

  Returns:
    [B, V, height, C, width] float32 in [0, 1].
  """
  height, width = images.shape[1:3]
  new_height, new_width = sizes.pair(size)
  top, left, bottom, right = (boxes[..., i] for i in range(4))
  there = (None, None) if stored is None else (stored[:, :1], stored[:, 1:])
  there = [side if side is None else jnp.broadcast_to(side, top.shape) for side in there]
  rows = resize_weights(top, bottom, height, new_height, interpolation, there[0])
  columns = resize_weights(left, right, width, new_width, interpolation, there[1])
  lines = images.swapaxes(2, 3).astype(jnp.float32)
  tall = jnp.einsum("bvsh,bhcw->bvscw", rows, lines, precision=_HIGHEST)
  crops = jnp.einsum("bvscw,bvtw->bvsct", tall, columns, precision=_HIGHEST)
  return jnp.clip(crops * (1.0 / 255.0), 0.0, 1.0)
