"""Augmentation against Pillow, SciPy and plain NumPy; its statistics; its keys; its sharding."""

import colorsys
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from matplotlib import colors
from PIL import Image, ImageEnhance, ImageOps
from sklearn import datasets

from protojax import config as config_lib
from protojax import errors, recipes
from protojax.data import augment, color, decoding, resize
from protojax.training import sharding

LUMA = np.array([0.299, 0.587, 0.114])
COLLECTIVE = re.compile(
  r"\b(all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)(-start)?\("
)
SMALL = {"global_size": 16, "local_size": 8, "num_local": 2}
RAW = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
BARE = (
  SMALL
  | RAW
  | {
    "jitter_prob": 0.0,
    "gray_prob": 0.0,
    "blur_prob": (0.0,) * 3,
    "solarize_prob": (0.0,) * 3,
    "flip": 0.0,
  }
)


@functools.cache
def views_of(overrides=()):
  config = config_lib.default().augment
  config.update(dict(overrides))
  return jax.jit(augment.make(config)), config


def make_views(overrides, key, batch):
  return views_of(tuple(sorted(overrides.items())))[0](key, batch)


def noise_batch(rows=8, side=24, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (rows, side, side, 3), np.uint8),
    "size": np.tile(np.array([[30, 41], [24, 24]], np.int32), (rows // 2, 1)),
  }


def lines(x):
  """[..., H, W, 3] -> [..., H, 3, W], float32."""
  return jnp.asarray(np.swapaxes(x, -1, -2), jnp.float32)


def unlines(x):
  return np.swapaxes(np.asarray(x), -1, -2)


def natural_image(side=256):
  photo = Image.fromarray(datasets.load_sample_images().images[0])
  return np.asarray(photo.resize((side, side), Image.BICUBIC))


def pillow_crop(image, box, size):
  """[H, W, 3] in 0..255 -> [size, size, 3] float; box = top, left, bottom, right."""
  top, left, bottom, right = (float(b) for b in box)
  planes = [
    Image.fromarray(image[..., c].astype(np.float32)).resize(
      (size, size), Image.BICUBIC, box=(left, top, right, bottom)
    )
    for c in range(3)
  ]
  return np.stack([np.asarray(p) for p in planes], axis=-1)


# Resize.


@pytest.mark.parametrize(
  "box, size",
  [
    ((0, 0, 48, 37), 16),
    ((0, 0, 48, 37), 96),
    ((3.25, 1.5, 20.75, 30.1), 16),
    ((10, 10, 18, 17), 32),
    ((0.3, 0.7, 47.1, 36.9), 224),
    ((40.5, 30.5, 48, 37), 8),
    ((5, 6, 21, 22), 16),
  ],
)
def test_resize_weights_equal_pillow_in_float_mode(box, size):
  image = np.random.default_rng(1).integers(0, 256, (48, 37, 3)).astype(np.float32)
  top, left, bottom, right = (jnp.float32(b) for b in box)
  rows = np.asarray(resize.resize_weights(top, bottom, 48, size), np.float64)
  columns = np.asarray(resize.resize_weights(left, right, 37, size), np.float64)
  ours = np.einsum("sh,hwc,tw->stc", rows, image, columns)
  np.testing.assert_allclose(ours, pillow_crop(image, box, size), atol=1e-3)


@pytest.mark.parametrize(("interpolation", "filter"), [("bicubic", 3), ("bilinear", 2)])
def test_interpolation_of_views_is_the_config_s(interpolation, filter):
  """Both are Pillow's filters of these numbers, enlarging and shrinking."""
  batch = noise_batch(rows=2)
  key = jax.random.key(3)
  views = make_views(BARE | {"interpolation": interpolation, "global_size": 32}, key, batch)
  uniform = augment.draw(key, 2, 4)
  for name, group, size in (("global", slice(0, 2), 32), ("local", slice(2, 4), 8)):
    u = {k: x[:, group] for k, x in uniform.items()}
    scale = config_lib.default().augment[f"{name}_scale"]
    args = (u["area"], u["aspect"], u["top"], u["left"])
    boxes = np.asarray(augment.sample_boxes(*args, jnp.asarray(batch["size"]), scale))
    ratio = np.tile(np.array([24, 24]) / batch["size"], 2)[:, None]
    for row, view in itertools.product(range(2), range(2)):
      top, left, bottom, right = boxes[row, view] * ratio[row, 0]
      plane = Image.fromarray(batch["image"][row, ..., 0].astype(np.float32))
      expected = plane.resize((size, size), filter, box=(left, top, right, bottom))
      expected = np.clip(np.asarray(expected), 0, 255) / 255
      np.testing.assert_allclose(views[name][row, view, ..., 0], expected, atol=1e-4)


def test_views_of_an_image_that_fits_are_cut_from_the_file_itself():
  """Whatever the store: what lies beside the image in its square has no influence."""
  photo = natural_image()[:40, :60]
  batch = {"size": np.array([photo.shape[:2]], np.int32)}
  views = []
  for side, beside in ((60, 0), (96, 255)):
    square = np.full((1, side, side, 3), beside, np.uint8)
    square[0, :40, :60] = photo
    views.append(make_views(BARE, jax.random.key(5), batch | {"image": square}))
  for name in views[0]:
    np.testing.assert_allclose(views[0][name], views[1][name], atol=1e-5)
  u = {k: x[:, :1] for k, x in augment.draw(jax.random.key(5), 1, 4).items()}
  args = (u["area"], u["aspect"], u["top"], u["left"], jnp.asarray(batch["size"]))
  box = augment.sample_boxes(*args, config_lib.default().augment.global_scale)[0, 0]
  expected = np.clip(pillow_crop(photo, box, 16), 0, 255) / 255
  np.testing.assert_allclose(views[1]["global"][0, 0], expected, atol=1e-4)
  whole = evaluate(square, 16, original=jnp.asarray(batch["size"]))[0]
  expected = np.clip(pillow_crop(photo, (0, 10, 40, 50), 16), 0, 255) / 255
  np.testing.assert_allclose(whole, expected, atol=1e-5)


@pytest.mark.parametrize("side", ["global", "local"])
def test_views_of_imagenet_recipes_are_as_sharp_as_crops_of_the_file(side):
  """Of a photo of 500 x 334; squashed to 256 x 256 it kept .52 and .66 of the gradient's energy."""
  config = recipes.load("dino_vit_s")
  photo = Image.fromarray(datasets.load_sample_images().images[0]).resize((500, 334), Image.LANCZOS)
  photo = np.asarray(photo)
  views, size = config.augment, jnp.array([photo.shape[:2]])
  u = augment.draw(jax.random.key(0), 1, 8)
  args = (u["area"], u["aspect"], u["top"], u["left"], size)
  boxes = augment.sample_boxes(*args, views[f"{side}_scale"])

  def energy(image, stored):
    ratio = jnp.tile(stored / size, 2)[:, None, :]
    cut = resize.crop_resize(
      jnp.asarray(image)[None], boxes * ratio, views[f"{side}_size"], stored=stored
    )
    return sum((np.diff(np.asarray(cut), axis=axis) ** 2).sum() for axis in (2, 4))

  image = decoding.store(photo, photo.shape[:2], config.data.image_size)
  stored = jnp.array([decoding.stored_shape(photo.shape[:2], config.data.image_size)])
  assert energy(image, stored) > 0.999 * energy(photo, size)


def test_swapped_ends_mirror_the_crop():
  a, b = jnp.array([3.3]), jnp.array([17.9])
  forward = resize.resize_weights(a, b, 24, 10)
  np.testing.assert_allclose(resize.resize_weights(b, a, 24, 10), forward[:, ::-1], atol=1e-6)


def test_crop_of_natural_image_is_within_two_levels_of_pillow_rgb():
  image = natural_image()
  boxes = np.array([[0, 0, 256, 256], [20, 31, 180, 170], [100, 90, 131, 140]], np.float32)
  for size in (224, 96, 32):
    ours = unlines(resize.crop_resize(image[None], jnp.asarray(boxes)[None], size))[0]
    for crop, (top, left, bottom, right) in zip(ours, boxes, strict=True):
      theirs = Image.fromarray(image).resize(
        (size, size), Image.BICUBIC, box=(left, top, right, bottom)
      )
      np.testing.assert_allclose(crop * 255.0, np.asarray(theirs, np.float64), atol=2.0)
      exact = np.clip(pillow_crop(image, (top, left, bottom, right), size), 0.0, 255.0)
      np.testing.assert_allclose(crop * 255.0, exact, atol=1e-3)


def test_crop_clips_the_overshoot_of_the_kernel():
  image = np.zeros((1, 16, 16, 3), np.uint8)
  image[:, :, 8:] = 255
  box = np.array([0.0, 4.0, 16.0, 12.0], np.float32)
  exact = pillow_crop(image[0], box, 32)
  ours = unlines(resize.crop_resize(image, jnp.asarray(box)[None, None], 32))[0, 0]
  assert exact.max() > 256.0 and exact.min() < -1.0
  np.testing.assert_allclose(ours, np.clip(exact / 255.0, 0.0, 1.0), atol=1e-6)


# Colour.


def reference_gray(x):
  return (x @ LUMA)[..., None]


def reference_adjust(x, op, value):
  """One adjustment of [H, W, 3] float64 in [0, 1]."""
  if op == 3:
    hsv = colors.rgb_to_hsv(x)
    hsv[..., 0] = (hsv[..., 0] + value) % 1.0
    return colors.hsv_to_rgb(hsv)
  base = (0.0, reference_gray(x).mean(), reference_gray(x))[op]
  return np.clip(value * x + (1 - value) * base, 0.0, 1.0)


@pytest.mark.parametrize(
  "adjust, enhance, atol",
  [
    (color.adjust_brightness, ImageEnhance.Brightness, 1.0),
    (color.adjust_contrast, ImageEnhance.Contrast, 1.6),  # Pillow rounds the mean and the result
    (color.adjust_saturation, ImageEnhance.Color, 1.6),  # Pillow rounds the grey and the result
  ],
)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4])
def test_adjustments_agree_with_pillow(adjust, enhance, atol, factor):
  image = natural_image(64) // np.array([1, 3, 9], np.uint8)  # red: its mean is not its mean grey
  ours = unlines(adjust(lines(image / 255.0), jnp.float32(factor))) * 255.0
  theirs = np.asarray(enhance(Image.fromarray(image)).enhance(factor), np.float64)
  np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.07, 0.4])
def test_hue_agrees_with_colorsys(shift):
  grid = np.array(list(itertools.product([0.0, 0.2, 0.5, 0.9, 1.0], repeat=3)))
  turned = [colorsys.rgb_to_hsv(*rgb) for rgb in grid]
  turned = np.array([colorsys.hsv_to_rgb((h + shift) % 1.0, s, v) for h, s, v in turned])
  ours = color.adjust_hue(lines(grid[None]), jnp.float32(shift))
  np.testing.assert_allclose(unlines(ours)[0], turned, atol=2e-6)


def test_grayscale_agrees_with_pillow():
  image = natural_image(64)
  theirs = np.asarray(Image.fromarray(image).convert("L"), np.float64)
  ours = np.asarray(color.grayscale(lines(image / 255.0)))[:, 0] * 255.0
  np.testing.assert_allclose(ours, theirs, atol=0.51)


def test_solarize_agrees_with_pillow_on_every_level():
  ramp = np.arange(256, dtype=np.uint8)
  theirs = np.asarray(ImageOps.solarize(Image.fromarray(ramp[None]), 128), np.float64)
  ours = color.solarize(jnp.asarray(ramp, jnp.float32) / 255.0)
  np.testing.assert_allclose(np.asarray(ours)[None] * 255.0, theirs, atol=1e-3)


def test_blur_agrees_with_scipy():
  image = np.random.default_rng(2).random((3, 20, 20, 3))
  sigmas = np.array([0.1, 0.8, 2.0])
  ours = unlines(color.gaussian_blur(lines(image), jnp.asarray(sigmas, jnp.float32)))
  for x, y, sigma in zip(image, ours, sigmas, strict=True):
    # SciPy's window is cut at 8 sigma; at .1 its samples are those of the infinite Gaussian too.
    blurred = scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="reflect", truncate=9.0)
    np.testing.assert_allclose(y, blurred, atol=2e-6)


def test_blur_of_sigma_zero_is_the_identity_to_the_bit():
  x = jnp.asarray(np.random.default_rng(3).random((2, 16, 3, 16), np.float32))
  out = color.gaussian_blur(x, jnp.array([0.0, 1.0]))
  np.testing.assert_array_equal(out[0], x[0])
  assert float(jnp.abs(out[1] - x[1]).max()) > 0.1


def test_jitter_applies_every_order():
  rng = np.random.default_rng(4)
  image = rng.random((24, 9, 9, 3))
  factors = np.stack([*rng.uniform(0.5, 1.5, (3, 24)), rng.uniform(-0.5, 0.5, 24)], axis=1)
  slots = np.array(list(itertools.permutations(range(4))))
  ours = unlines(color.color_jitter(lines(image), jnp.asarray(factors, jnp.float32), slots))
  for x, y, values, when in zip(image, ours, factors, slots, strict=True):
    for op in np.argsort(when):
      x = reference_adjust(x, op, values[op])
    np.testing.assert_allclose(y, x, atol=1e-5)


def test_jitter_left_out_is_the_identity_to_the_bit():
  x = jnp.asarray(np.random.default_rng(5).random((1, 8, 3, 8), np.float32))
  factors = jnp.array([[0.5, 0.5, 0.5, 0.3]])
  np.testing.assert_array_equal(color.color_jitter(x, factors, jnp.full((1, 4), -1)), x)


# Sampling.


@functools.cache
def draws(rows=4096, views=2):
  return jax.tree.map(
    np.asarray, jax.jit(augment.draw, static_argnums=(1, 2))(jax.random.key(7), rows, views)
  )


def reference_box(area, aspect, top, left, size, scale):
  """torchvision's RandomResizedCrop, word for word what its documentation says, in float64."""
  height, width = (int(s) for s in size)
  for a, r in zip(area, aspect, strict=True):
    target = height * width * (scale[0] + (scale[1] - scale[0]) * a)
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * r)
    w, h = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
    if 0 < w <= width and 0 < h <= height:
      y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
      return y, x, y + h, x + w
  h, w = height, width
  if width / height < 3 / 4:
    h = round(width / (3 / 4))
  elif width / height > 4 / 3:
    w = round(height * (4 / 3))
  y, x = (height - h) // 2, (width - w) // 2
  return y, x, y + h, x + w


def sample(sizes, scale):
  u = draws()
  sizes = np.tile(np.asarray(sizes, np.int32), (4096 // len(sizes), 1))
  boxes = augment.sample_boxes(u["area"], u["aspect"], u["top"], u["left"], sizes, scale)
  return np.asarray(boxes, np.float64), sizes


def test_boxes_are_those_of_random_resized_crop():
  shapes = [[500, 375], [32, 32], [20, 200], [333, 90], [8, 8], [1, 5], [640, 427], [64, 400]]
  boxes, sizes = sample(shapes, (0.4, 1.0))
  u = draws()
  expected = np.array(
    [
      reference_box(*(u[k][i, 0] for k in ("area", "aspect", "top", "left")), sizes[i], (0.4, 1.0))
      for i in range(1024)
    ]
  )
  # float32 may round a side that is half a pixel off the other way.
  wrong = np.any(boxes[:1024, 0] != expected, axis=-1)
  assert wrong.mean() < 2e-3
  centre = np.array([0, 86, 20, 113])  # 20 x 200: no candidate above .4 of the area fits
  np.testing.assert_array_equal(boxes[2::8, 0], np.tile(centre, (512, 1)))


def test_area_and_aspect_have_their_distributions():
  boxes, _ = sample([[800, 1000]], (0.05, 0.4))
  h, w = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
  area, log_aspect = (h * w / 8e5)[:, 0], np.log(w / h)[:, 0]
  assert area.min() > 0.049 and area.max() < 0.402
  assert abs(log_aspect).max() < np.log(4 / 3) + 0.01
  assert scipy.stats.kstest(area, "uniform", (0.05, 0.35)).pvalue > 1e-3
  span = np.log(4 / 3)
  assert scipy.stats.kstest(log_aspect, "uniform", (-span, 2 * span)).pvalue > 1e-3
  top = boxes[:, 0, 0] / (800 - h[:, 0] + 1)
  left = boxes[:, 0, 1] / (1000 - w[:, 0] + 1)
  for offset in (top, left):
    assert scipy.stats.kstest(offset + 0.5 / 800, "uniform").pvalue > 1e-3
  assert (boxes >= 0).all() and (boxes[..., 2] <= 800).all() and (boxes[..., 3] <= 1000).all()


def test_every_order_of_the_jitter_is_equally_likely():
  slots = np.asarray(augment.sample_slots(jnp.asarray(draws()["order"]))).reshape(-1, 4)
  seen, counts = np.unique(slots, axis=0, return_counts=True)
  assert len(seen) == 24
  np.testing.assert_array_equal(np.sort(seen, axis=1), np.tile(np.arange(4), (24, 1)))
  assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_uniform_numbers_are_independent_of_each_other():
  flat = np.concatenate([d.reshape(4096, 2, -1) for d in draws().values()], axis=-1)
  flat = flat.reshape(4096, -1)
  correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
  assert np.abs(correlation).max() < 5.5 / np.sqrt(4096)
  assert flat.min() >= 0.0 and flat.max() < 1.0


# The whole.


def reference_view(image, size, u, view, config):
  """One view in NumPy, SciPy and Pillow from the uniform numbers of that view."""
  kind = "global" if view < 2 else "local"
  out, scale = config[f"{kind}_size"], config[f"{kind}_scale"]
  box = reference_box(*(u[k] for k in ("area", "aspect", "top", "left")), size, scale)
  ratio = np.tile(np.array(image.shape[:2]) / size, 2)
  x = np.clip(pillow_crop(image, box * ratio, out).astype(np.float64) / 255.0, 0.0, 1.0)
  if u["flip"] < config.flip:
    x = x[:, ::-1]
  if u["jitter"] < config.jitter_prob:
    bounds = [(1 - s, 1 + s) for s in (config.brightness, config.contrast, config.saturation)]
    bounds.append((-config.hue, config.hue))
    values = [low + (high - low) * f for (low, high), f in zip(bounds, u["factors"], strict=True)]
    for op in np.argsort(list(itertools.permutations(range(4)))[int(u["order"] * 24)]):
      x = reference_adjust(x, op, values[op])
  if u["gray"] < config.gray_prob:
    x = np.repeat(reference_gray(x), 3, axis=-1)
  index = min(view, 2)
  if u["blur"] < config.blur_prob[index]:
    sigma = config.blur_sigma[0] + (config.blur_sigma[1] - config.blur_sigma[0]) * u["sigma"]
    x = scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="reflect", truncate=9.0)
  if u["solarize"] < config.solarize_prob[index]:
    x = np.where(x < 0.5, x, 1.0 - x)
  return (x - np.array(config.mean)) / np.array(config.std)


def test_views_equal_an_independent_reference():
  overrides = SMALL | {"blur_prob": (1.0, 0.3, 0.5), "solarize_prob": (0.0, 0.5, 0.3)}
  batch, key = noise_batch(rows=16), jax.random.key(3)
  views = make_views(overrides, key, batch)
  config = views_of(tuple(sorted(overrides.items())))[1]
  u = jax.tree.map(lambda a: np.asarray(a, np.float64), augment.draw(key, 16, 4))
  for row, view in itertools.product(range(16), range(4)):
    mine = {name: values[row, view] for name, values in u.items()}
    expected = reference_view(batch["image"][row], batch["size"][row], mine, view, config)
    ours = views["global"][row, view] if view < 2 else views["local"][row, view - 2]
    np.testing.assert_allclose(ours, expected, atol=2e-4, err_msg=f"row {row}, view {view}")


def test_default_config_gives_dino_shapes():
  views, _ = views_of()
  batch = {
    "image": jax.ShapeDtypeStruct((4, 256, 256, 3), jnp.uint8),
    "size": jax.ShapeDtypeStruct((4, 2), jnp.int32),
  }
  out = jax.eval_shape(views, jax.random.key(0), batch)
  assert out["global"].shape == (4, 2, 224, 224, 3) and out["global"].dtype == jnp.float32
  assert out["local"].shape == (4, 8, 96, 96, 3) and out["local"].dtype == jnp.float32


def test_same_key_same_views_other_key_other_views():
  batch = noise_batch()
  one, again, other = (make_views(BARE, jax.random.key(s), batch) for s in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, again)
  for name in one:
    differs = np.any(one[name] != other[name], axis=(2, 3, 4))
    assert differs.mean() > 0.9


def test_rows_and_views_of_equal_images_differ():
  batch = noise_batch()
  batch = {k: np.repeat(v[:1], 8, axis=0) for k, v in batch.items()}
  for crops in make_views(BARE, jax.random.key(0), batch).values():
    flat = np.asarray(crops).reshape(16, -1)
    assert len(np.unique(flat, axis=0)) == 16


def test_a_row_depends_on_its_index_and_not_on_the_other_rows():
  batch, key = noise_batch(), jax.random.key(0)
  whole = make_views(BARE, key, batch)
  half = make_views(BARE, key, {k: v[:4] for k, v in batch.items()})
  for name in whole:
    np.testing.assert_allclose(half[name], whole[name][:4], atol=1e-6)


def test_views_do_not_depend_on_the_number_of_local_views():
  batch, key = noise_batch(), jax.random.key(0)
  many = make_views(BARE, key, batch)
  none = make_views(BARE | {"num_local": 0}, key, batch)
  one = make_views(BARE | {"num_local": 1}, key, batch)
  assert set(none) == {"global"}
  np.testing.assert_allclose(none["global"], many["global"], atol=1e-6)
  np.testing.assert_allclose(one["local"], many["local"][:, :1], atol=1e-6)


def test_flip_mirrors_at_its_rate():
  batch, key = noise_batch(rows=256, side=8), jax.random.key(0)
  never, always, half = (
    np.asarray(make_views(BARE | {"flip": p, "num_local": 0}, key, batch)["global"])
    for p in (0.0, 1.0, 0.5)
  )
  np.testing.assert_allclose(always, never[:, :, :, ::-1], atol=1e-4)
  kept = np.abs(half - never).max(axis=(2, 3, 4)) < 1e-4
  assert np.abs(half - np.where(kept[..., None, None, None], never, always)).max() < 1e-4
  assert abs(kept.mean() - 0.5) < 4 * 0.5 / np.sqrt(512)


def test_steps_that_no_view_asks_for_are_not_compiled():
  batch, key = noise_batch(), jax.random.key(0)

  def count(op, overrides):
    views, _ = views_of(tuple(sorted((BARE | overrides).items())))
    return views.lower(key, batch).as_text().count(op)

  assert count("stablehlo.dot_general", {}) == 4  # two a group
  assert count("stablehlo.dot_general", {"blur_prob": (0.0, 0.1, 0.0)}) == 6
  assert count("stablehlo.while", {}) < count("stablehlo.while", {"jitter_prob": 0.1})


def test_views_are_the_same_on_eight_devices_without_any_collective():
  overrides = SMALL | RAW
  key, batch = jax.random.key(0), noise_batch(rows=16)
  single = make_views(overrides, key, batch)
  mesh = sharding.make_mesh()
  assert mesh.shape["data"] == 8
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  fn = jax.jit(
    augment.make(views_of(tuple(sorted(overrides.items())))[1]), in_shardings=(whole, rows)
  )
  split = jax.device_put(batch, rows)
  compiled = fn.lower(key, split).compile()
  found = COLLECTIVE.search(compiled.as_text())
  assert found is None, found
  many = compiled(jax.device_put(key, whole), split)
  for name in single:
    assert many[name].sharding.is_equivalent_to(rows, 5)
    np.testing.assert_allclose(many[name], single[name], atol=1e-6)


# Evaluation.


def evaluate(images, size, **kwargs):
  return np.asarray(augment.evaluate(images, size, (0.0,) * 3, (1.0,) * 3, **kwargs))


def test_evaluation_resizes_the_whole_image():
  image = natural_image(64)
  expected = np.clip(pillow_crop(image, (0, 0, 64, 64), 32), 0.0, 255.0) / 255.0
  np.testing.assert_allclose(evaluate(image[None], 32)[0], expected, atol=1e-5)
  same = augment.evaluate(image[None], 64, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
  plain = (image / 255.0 - np.array([0.5, 0.4, 0.3])) / np.array([0.1, 0.2, 0.3])
  np.testing.assert_allclose(same[0], plain, atol=1e-4)


def test_evaluation_crop_is_resize_then_centre_crop():
  image = natural_image(200)
  resized = np.clip(pillow_crop(image, (0, 0, 200, 200), 256), 0.0, 255.0) / 255.0
  ours = evaluate(image[None], 224, crop=0.875)[0]
  np.testing.assert_allclose(ours, resized[16:240, 16:240], atol=2e-5)


def test_evaluation_of_a_squashed_image_keeps_its_aspect():
  y, x = np.mgrid[0:80, 0:160]
  original = np.stack([y * 3.0, x * 1.5, 128 + 100 * np.sin(x / 25)], axis=-1)
  squashed = np.stack(
    [
      np.asarray(Image.fromarray(original[..., c].astype(np.float32)).resize((64, 64)))
      for c in range(3)
    ],
    axis=-1,
  )
  squashed = np.round(squashed).clip(0, 255).astype(np.uint8)
  ours = evaluate(squashed[None], 32, original=jnp.array([[80, 160]]))[0]
  expected = pillow_crop(original, (0, 40, 80, 120), 32) / 255.0
  np.testing.assert_allclose(ours, expected, atol=0.01)


def test_evaluation_of_another_shape_takes_the_largest_box_of_it():
  image = natural_image(64)
  for original in ((64, 64), (80, 20)):
    ours = evaluate(image[None], (32, 16), original=jnp.array([original]))[0]
    height, width = original
    used = min(height, width * 2)  # of the shape 32 x 16
    top, left = (1 - used / height) / 2, (1 - used / 2 / width) / 2
    high, wide = decoding.stored_shape(original, 64)
    box = (wide * left, high * top, wide * (1 - left), high * (1 - top))
    stored = image[:high, :wide].astype(np.float32)
    planes = [Image.fromarray(stored[..., c]) for c in range(3)]
    planes = [np.asarray(p.resize((16, 32), Image.Resampling.BICUBIC, box=box)) for p in planes]
    expected = np.stack(planes, axis=-1).clip(0, 255) / 255
    assert ours.shape == (32, 16, 3)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_boxes_of_another_shape_have_their_aspect_around_it():
  u = draws()
  sizes = np.tile(np.array([[1000, 800]], np.int32), (4096, 1))
  arguments = (u["area"], u["aspect"], u["top"], u["left"], sizes, (0.05, 0.1))
  boxes = np.asarray(augment.sample_boxes(*arguments, 2.0), np.float64)
  log_aspect = np.log((boxes[..., 3] - boxes[..., 1]) / (boxes[..., 2] - boxes[..., 0]))[:, 0]
  span = np.log(4 / 3)
  assert abs(log_aspect - np.log(2)).max() < span + 0.02
  assert scipy.stats.kstest(log_aspect - np.log(2), "uniform", (-span, 2 * span)).pvalue > 1e-3


# Other channels.


def test_jitter_without_colour_is_brightness_and_contrast_in_either_order():
  rng = np.random.default_rng(0)
  x = rng.uniform(0, 1, (4, 6, 5, 7)).astype(np.float32)  # [B, H, C, W]
  factors = np.array([[1.3, 0.6]] * 4, np.float32)
  slots = np.array([[0, 3], [2, 1], [-1, -1], [0, 1]], np.int32)
  ours = np.asarray(color.level_jitter(x, factors, slots))

  def bright(image):
    return (1.3 * image).clip(0, 1)

  def flat(image):
    mean = image.mean(axis=(0, 2), keepdims=True)  # of each channel
    return (0.6 * image + 0.4 * mean).clip(0, 1)

  for i, want in enumerate((flat(bright(x[0])), bright(flat(x[1])), x[2], flat(bright(x[3])))):
    np.testing.assert_allclose(ours[i], want, atol=1e-6)
  np.testing.assert_array_equal(ours[2], x[2])  # left out, to the bit


@pytest.mark.parametrize("channels", [1, 5])
def test_views_of_other_channels_and_shapes_are_crops_of_each_channel(channels):
  """Bare views of n channels are those of three, channel by channel."""
  batch = noise_batch(rows=2)
  overrides = BARE | {"global_size": (16, 8), "local_size": (8, 4), "saturation": 0.0, "hue": 0.0}
  colour = make_views(overrides, jax.random.key(1), batch)
  many = {**batch, "image": batch["image"][..., [c % 3 for c in range(channels)]]}
  overrides |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
  views = make_views(overrides, jax.random.key(1), many)
  assert views["global"].shape == (2, 2, 16, 8, channels)
  assert views["local"].shape == (2, 2, 8, 4, channels)
  for name in views:
    for c in range(channels):
      np.testing.assert_allclose(views[name][..., c], colour[name][..., c % 3], atol=1e-6)


def test_colour_operations_are_refused_where_there_is_no_colour():
  config = config_lib.default().augment
  config.update({"mean": (0.5,), "std": (0.5,)})
  with pytest.raises(errors.UserError, match="augment.saturation=0.2 must be 0: images of 1 chan"):
    augment.make(config)


# Mistakes.


@pytest.mark.parametrize(
  "name, value",
  [
    ("global_scale", (0.4, 1.2)),
    ("local_scale", (0.5, 0.2)),
    ("local_scale", (0.0, 0.2)),
    ("blur_sigma", (2.0, 0.1)),
    ("blur_prob", (0.5, 0.5)),
    ("solarize_prob", (0.0, 2.0, 0.0)),
    ("flip", -0.5),
    ("hue", 0.6),
    ("contrast", -0.1),
    ("num_local", -1),
    ("local_size", 0),
    ("std", (1.0, 0.0, 1.0)),
    ("mean", (0.5, 0.5)),
  ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
  config = config_lib.default().augment
  with config.ignore_type():
    config.update({name: value})
  with pytest.raises(errors.UserError, match=rf"^augment\.{name}="):
    augment.make(config)


def test_an_impossible_evaluation_crop_is_refused():
  with pytest.raises(errors.UserError, match="crop=1.5"):
    augment.evaluate(natural_image(16)[None], 8, (0.0,) * 3, (1.0,) * 3, crop=1.5)
