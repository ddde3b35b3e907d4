"""Views of a batch, made on the device: multi-crop augmentation after DINO (arXiv 2104.14294).

Random resized crop, flip, colour jitter in random order, grayscale, blur, solarise, normalise. A
view is a function of (key, row of the global batch, number of the view): it depends neither on the
number of devices nor on the number of other views.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from protojax import errors, sizes
from protojax.data import color, resize

_TRIES = 10
_ASPECT = (3 / 4, 4 / 3)
# The uniform numbers of one view, drawn at once. New ones go last, so that the others keep theirs.
_DRAWS = {
  "area": _TRIES,
  "aspect": _TRIES,
  "top": 1,
  "left": 1,
  "flip": 1,
  "jitter": 1,
  "order": 1,
  "factors": 4,
  "gray": 1,
  "blur": 1,
  "sigma": 1,
  "solarize": 1,
}


def make(config) -> Callable[[jax.Array, dict[str, jax.Array]], dict[str, jax.Array]]:
  """The augmentation that `config.augment` describes; defaults are in `protojax.config`.

  Args:
    config: `global_size`, `local_size` in pixels, a side or (height, width); `num_local`;
      `global_scale`, `local_scale`, (low, high) fractions of the image's area; `interpolation` of
      the crops, "bicubic" or "bilinear"; `flip`, `jitter_prob`, `gray_prob`, probabilities;
      `brightness`, `contrast`, `saturation`, `hue`, strengths; `blur_prob` and `solarize_prob`,
      one probability each for the first global view, the second, the local ones; `blur_sigma`,
      (low, high) in pixels of the view; `mean`, `std` of the C channels. Where C is not 3,
      saturation, hue and grayscale must be off.

  Returns:
    augment(key, batch) -> {"global": [B, 2, S, S, C], "local": [B, L, s, s, C]}, float32,
    normalised; "local" is absent when `num_local` is 0. `key` is a typed key that the caller has
    folded with seed and step. `batch` has "image" [B, S, S, C] uint8 as `decoding.store` makes it
    of an original of "size" [B, 2] int32, height and width: area and aspect are those of that.
    Steps that no view of a group asks for are not compiled.

  Raises:
    UserError: if a value is out of range.
  """
  _check(config)
  kinds = (0, 1) + (2,) * config.num_local
  groups = {"global": (slice(0, 2), config.global_size, config.global_scale)}
  if config.num_local:
    groups["local"] = (slice(2, None), config.local_size, config.local_scale)

  def augment(key, batch):
    views = {}
    uniform = draw(key, batch["image"].shape[0], len(kinds))
    for name, (group, size, scale) in groups.items():
      u = {name: values[:, group] for name, values in uniform.items()}
      height, width = sizes.pair(size)
      boxes = sample_boxes(
        u["area"], u["aspect"], u["top"], u["left"], batch["size"], scale, width / height
      )
      stored = _stored(batch["size"], batch["image"].shape[1:3])
      boxes *= jnp.tile(stored / batch["size"], (1, 2))[:, None, :]
      mirrored = jnp.stack([boxes[..., i] for i in (0, 3, 2, 1)], axis=-1)
      boxes = jnp.where(u["flip"][..., None] < config.flip, mirrored, boxes)
      x = resize.crop_resize(batch["image"], boxes, size, config.interpolation, stored)
      x = _recolor(x, u, config, kinds[group])
      views[name] = _normalize(x, config.mean, config.std)
    return views

  return augment


def evaluate(
  images: jax.Array,
  size: sizes.Size,
  mean,
  std,
  *,
  crop: float = 1.0,
  original: jax.Array | None = None,
) -> jax.Array:
  """The evaluation transform: resize, crop the centre, normalise.

  Args:
    images: [B, H, W, C] uint8.
    size: side of the result in pixels, or (height, width).
    mean: C numbers.
    std: C numbers.
    crop: side of the centre crop over the side of the image; .875 is "resize 256, crop 224" at
      size 224.
    original: [B, 2] int32, height and width of what `decoding.store` made `images` of. If given,
      the crop is from the centre square of the original, as after a resize of its shorter side;
      where `size` is no square, from the largest centred box of its shape. Else all of `images`
      is image.

  Returns:
    [B, height, width, C] float32, normalised.

  Raises:
    UserError: if `crop` is not in (0, 1].
  """
  if not 0.0 < crop <= 1.0:
    raise errors.UserError(f"evaluation crop={crop} must be in (0, 1]")
  batch, height, width = images.shape[:3]
  stored, side = jnp.tile(jnp.array([[height, width]]), (batch, 1)), jnp.ones((batch, 2))
  if original is not None:
    stored, side = _stored(original, (height, width)), _largest(original, size) / original
  margin = (1.0 - crop * side) / 2.0
  corners = jnp.concatenate([margin, 1.0 - margin], axis=1)
  boxes = corners * jnp.tile(stored, (1, 2))
  x = resize.crop_resize(images, boxes[:, None, :], size, stored=stored)
  return _normalize(x, mean, std)[:, 0]


def _largest(original: jax.Array, size: sizes.Size) -> jax.Array:
  """Sides of the largest box of the shape of `size` in originals [B, 2]: [B, 1], or [B, 2]."""
  height, width = sizes.pair(size)
  if height == width:
    return jnp.min(original, axis=1, keepdims=True)
  tall = jnp.minimum(original[:, 0], original[:, 1] * (height / width))
  return jnp.stack([tall, tall * (width / height)], axis=1)


def sample_boxes(
  area, aspect, top, left, originals, scale: tuple[float, float], shape: float = 1.0
) -> jax.Array:
  """Boxes of a random resized crop in whole pixels of the originals, as torchvision draws them.

  Of ten candidates the first that fits is taken; if none does, the largest centre crop whose
  aspect is in 3/4..4/3 of `shape`.

  Args:
    area: [B, V, 10] uniform in [0, 1).
    aspect: [B, V, 10] likewise; width over height is log-uniform.
    top: [B, V] likewise.
    left: [B, V] likewise.
    originals: [B, 2] int32, height and width.
    scale: range of the box's area as a fraction of the image's.
    shape: width over height of the view. torchvision does not ask: it stretches boxes of 3/4..4/3
      to any view.

  Returns:
    [B, V, 4] float32 whole numbers: top, left, bottom, right.
  """
  height, width = (originals[:, i, None].astype(jnp.float32) for i in range(2))
  target = (height * width)[..., None] * (scale[0] + (scale[1] - scale[0]) * area)
  lowest, highest = (limit * shape for limit in _ASPECT)
  log_aspect = math.log(_ASPECT[0]) + (math.log(_ASPECT[1]) - math.log(_ASPECT[0])) * aspect
  if shape != 1.0:
    log_aspect += math.log(shape)
  tries_h = jnp.round(jnp.sqrt(target * jnp.exp(-log_aspect)))
  tries_w = jnp.round(jnp.sqrt(target * jnp.exp(log_aspect)))
  fits = (tries_h >= 1.0) & (tries_h <= height[..., None])
  fits &= (tries_w >= 1.0) & (tries_w <= width[..., None])
  chosen = fits & (jnp.cumsum(fits, axis=-1) == 1)
  any_fits = jnp.any(fits, axis=-1)
  largest_h = jnp.minimum(height, jnp.round(width / lowest))
  largest_w = jnp.minimum(width, jnp.round(height * highest))
  h = jnp.where(any_fits, jnp.sum(jnp.where(chosen, tries_h, 0.0), axis=-1), largest_h)
  w = jnp.where(any_fits, jnp.sum(jnp.where(chosen, tries_w, 0.0), axis=-1), largest_w)
  y = jnp.floor(jnp.where(any_fits, top * (height - h + 1.0), (height - h) / 2.0))
  x = jnp.floor(jnp.where(any_fits, left * (width - w + 1.0), (width - w) / 2.0))
  return jnp.stack([y, x, y + h, x + w], axis=-1)


def sample_slots(u: jax.Array) -> jax.Array:
  """A uniform order of the four jitter operations from one uniform number: [...] -> [..., 4]."""
  return jnp.asarray(color.ORDERS)[(u * len(color.ORDERS)).astype(jnp.int32)]


def draw(key: jax.Array, batch: int, views: int) -> dict[str, jax.Array]:
  """The uniform numbers behind every view: {name: [B, V] or [B, V, n]} float32 in [0, 1).

  Those of a view depend on (key, row, number of the view) alone. Views 0 and 1 are global.
  """
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  rows = fold(key, jnp.arange(batch))
  keys = jax.vmap(fold, in_axes=(0, None))(rows, jnp.arange(views))
  total = sum(_DRAWS.values())
  u = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (total,))))(keys)
  stops = np.cumsum(list(_DRAWS.values()))[:-1].tolist()
  parts = zip(_DRAWS.items(), jnp.split(u, stops, axis=-1), strict=True)
  return {name: part if n > 1 else part[..., 0] for (name, n), part in parts}


def _stored(originals: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """`decoding.stored_shape` of originals [B, 2]: int32 [B, 2]."""
  return jnp.minimum(originals, jnp.array(shape)[None, :])


def _recolor(x: jax.Array, u: dict[str, jax.Array], config, kinds: tuple[int, ...]) -> jax.Array:
  """Jitter, grayscale, blur, solarise; `kinds` indexes the probabilities of each view's kind."""
  strengths = (config.brightness, config.contrast, config.saturation, config.hue)
  if len(config.mean) != 3:
    if config.jitter_prob and any(strengths):
      low, high = (
        jnp.array([max(0.0, 1.0 + sign * s) for s in strengths[:2]], jnp.float32)[None, None, :]
        for sign in (-1.0, 1.0)
      )
      order = sample_slots(u["order"])[..., :2]
      slots = jnp.where(u["jitter"][..., None] < config.jitter_prob, order, -1)
      x = color.level_jitter(x, low + (high - low) * u["factors"][..., :2], slots)
  elif config.jitter_prob and any(strengths):
    low = [max(0.0, 1.0 - s) for s in strengths[:3]] + [-config.hue]
    high = [1.0 + s for s in strengths[:3]] + [config.hue]
    low, high = (jnp.array(bounds, jnp.float32)[None, None, :] for bounds in (low, high))
    slots = jnp.where(u["jitter"][..., None] < config.jitter_prob, sample_slots(u["order"]), -1)
    x = color.color_jitter(x, low + (high - low) * u["factors"], slots)
  if config.gray_prob:
    x = jnp.where(u["gray"][..., None, None, None] < config.gray_prob, color.grayscale(x), x)
  blur, solarize = (
    np.array([probs[k] for k in kinds], np.float32)[None, :]
    for probs in (config.blur_prob, config.solarize_prob)
  )
  if blur.any():
    low, high = config.blur_sigma
    sigma = jnp.where(u["blur"] < blur, low + (high - low) * u["sigma"], 0.0)
    x = color.gaussian_blur(x, sigma)
  if solarize.any():
    chosen = (u["solarize"] < solarize)[..., None, None, None]
    x = jnp.where(chosen, color.solarize(x), x)
  return x


def _normalize(x: jax.Array, mean, std) -> jax.Array:
  """[B, V, H, C, W] in [0, 1] -> [B, V, H, W, C]."""
  mean, std = (np.array(c, np.float32).reshape(1, 1, 1, len(c), 1) for c in (mean, std))
  return ((x - mean) / std).swapaxes(-1, -2)


def _check(config) -> None:
  """Refuses values out of range with the name of the key."""

  def refuse(name, rule):
    raise errors.UserError(f"augment.{name}={config[name]} {rule}")

  if config.interpolation not in resize.INTERPOLATIONS:
    refuse("interpolation", f"is unknown: choose {' or '.join(resize.INTERPOLATIONS)}")
  for name in ("global_scale", "local_scale", "blur_sigma"):
    if len(config[name]) != 2 or not 0.0 < config[name][0] <= config[name][1]:
      refuse(name, "must be two numbers (low, high) with 0 < low <= high")
  for name in ("global_scale", "local_scale"):
    if config[name][1] > 1.0:
      refuse(name, "must not exceed 1, the whole image")
  for name in ("blur_prob", "solarize_prob"):
    if len(config[name]) != 3:
      refuse(name, "must be three numbers")
  for name in ("mean", "std"):
    if config[name] is None:
      refuse(name, "is measured when a run starts: give one number for each channel")
  if len(config.mean) != len(config.std):
    refuse("mean", f"must be as many numbers as augment.std={config.std}")
  for name in ("saturation", "hue", "gray_prob"):
    if config[name] and len(config.mean) != 3:
      refuse(name, f"must be 0: images of {len(config.mean)} channels have no colour")
  for name in ("flip", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
    values = np.array(config[name])
    if (values < 0.0).any() or (values > 1.0).any():
      refuse(name, "must be a probability, 0 to 1")
  for name in ("brightness", "contrast", "saturation", "hue"):
    if config[name] < 0.0:
      refuse(name, "must not be negative (0 turns it off)")
  if config.hue > 0.5:
    refuse("hue", "must be at most .5, half a turn")
  if config.num_local < 0:
    refuse("num_local", "must not be negative (0: no local views)")
  for name in ("global_size", "local_size"):
    sizes.checked(f"augment.{name}", config[name])
  if min(config.std) <= 0.0:
    refuse("std", "must be positive")
