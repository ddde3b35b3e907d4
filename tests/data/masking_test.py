"""Masks: a literal loop in Python, the shares measured on the published code, exact counts."""

import math

import jax
import numpy as np
import pytest

from protojax import errors
from protojax.data import masking


def reference_block_mask(uniform, target, rows, columns):
  """The published loop: rectangles until the target is met or ten attempts in a row fail."""
  mask, attempts = np.zeros((rows, columns), bool), iter(uniform)
  while mask.sum() < target:
    left, before = target - mask.sum(), mask.sum()
    for _ in range(10):
      area, aspect, top, start = next(attempts)
      least = (min(rows, columns) // 3) ** 2
      area = least + area * (left - least)
      aspect = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
      height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if width >= columns or height >= rows:
        continue
      top, start = int(top * (rows - height + 1)), int(start * (columns - width + 1))
      window = mask[top : top + height, start : start + width]
      if 0 < window.size - window.sum() <= left:
        window[:] = True
        break
    if mask.sum() == before:
      break
  return mask


def sample(ratios, spreads, shape="block", batch=64, views=2, grid=(14, 14), seed=0):
  draw = jax.jit(masking.make(ratios, spreads, shape, grid), static_argnums=(1, 2))
  mask = draw(jax.random.key(seed), batch, views)
  assert mask.shape == (batch, views, grid[0] * grid[1]) and mask.dtype == bool
  return np.asarray(mask)


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (6, 9), (2, 2)])
def test_block_masks_are_those_of_the_published_loop(grid):
  rng = np.random.default_rng(0)
  uniform = rng.uniform(size=(100, 64, 4)).astype(np.float32)
  target = (grid[0] * grid[1] * rng.uniform(0.0, 0.6, 100)).astype(np.float32)
  masks = jax.jit(jax.vmap(lambda u, t: masking.block_mask(u, t, grid)))(uniform, target)
  expected = [reference_block_mask(u, t, *grid) for u, t in zip(uniform, target, strict=True)]
  np.testing.assert_array_equal(masks, expected)
  assert 0.05 < np.mean(expected) < 0.35


@pytest.mark.parametrize(("ratio", "share"), [(0.1, 0.090), (0.3, 0.292), (0.5, 0.498)])
def test_blocks_hide_the_shares_measured_on_the_published_code(ratio, share):
  mask = sample((ratio,), (0.0,), batch=1024)
  np.testing.assert_allclose(mask.mean(), share, atol=0.003)


def test_half_of_the_views_are_masked_and_the_rest_by_a_random_share():
  share = sample((0.0, 0.3), (0.0, 0.2), batch=1024).mean(axis=-1)
  masked = share > 0
  np.testing.assert_allclose(masked.mean(), 0.5, atol=4 * 0.5 / 2048**0.5)
  np.testing.assert_allclose(share.mean(), 0.146, atol=0.01)
  assert share.max() <= 0.5
  assert masked[:, 0].tolist() != masked[:, 1].tolist()  # views of an image draw for themselves


def test_rand_hides_the_exact_number_of_patches_everywhere_alike():
  mask = sample((0.3,), (0.0,), "rand", batch=1024)
  np.testing.assert_array_equal(mask.sum(axis=-1), int(0.3 * 196))
  np.testing.assert_allclose(mask.mean(axis=(0, 1)), 58 / 196, atol=5 * 0.46 / 2048**0.5)
  assert len({m.tobytes() for m in mask.reshape(2048, -1)}) == 2048


@pytest.mark.parametrize(
  ("ratios", "spreads", "shape", "grid", "most"),
  [
    ((0.0, 0.3), (0.0, 0.2), "block", (14, 14), 98),
    ((0.2, 0.4), (0.0, 0.2), "rand", (4, 4), 9),
    ((0.29,), (0.0,), "rand", (10, 10), 29),  # of a float64 the floor would be 28
    ((0.0,), (0.0,), "rand", (4, 4), 1),  # never nothing at all
  ],
)
def test_masks_hide_no_more_than_the_most_and_come_near(ratios, spreads, shape, grid, most):
  assert masking.most_hidden(ratios, spreads, grid[0] * grid[1]) == most
  largest = sample(ratios, spreads, shape, batch=256, grid=grid).sum(axis=-1).max()
  assert most - 1 <= largest <= most and (largest == most or ratios != (0.29,))


def test_hidden_patches_are_numbered_in_order_and_filled_up():
  mask = np.array([[[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], [[0, 0, 1, 0, 0], [1, 1, 0, 0, 1]]], bool)
  index, hidden = masking.hidden(mask, 3)
  assert index.shape == hidden.shape == (2, 2, 3) and index.dtype == np.int32
  for view in np.ndindex(2, 2):
    assert index[view][hidden[view]].tolist() == np.flatnonzero(mask[view]).tolist()
    assert not mask[view][index[view][~hidden[view]]].any()


@pytest.mark.parametrize("shape", ["block", "rand"])
def test_a_mask_depends_on_key_row_and_view_alone(shape):
  few = sample((0.4,), (0.1,), shape, batch=4)
  many = sample((0.4,), (0.1,), shape, batch=8, views=3)
  np.testing.assert_array_equal(few, many[:4, :2])
  assert (few != sample((0.4,), (0.1,), shape, batch=4, seed=1)).any()


def test_everything_can_be_hidden_at_random_and_nothing_by_ratio_0():
  assert sample((1.0,), (0.0,), "rand").all()
  assert not sample((0.0,), (0.0,)).any() and not sample((0.0,), (0.0,), "rand").any()


@pytest.mark.parametrize(
  ("ratios", "spreads", "shape", "words"),
  [
    ((0.3,), (0.2,), "blocks", "method.mask_shape='blocks' is unknown: choose block or rand"),
    ((0.0, 0.3), (0.2,), "block", "method.mask_ratios.*as many"),
    ((), (), "block", "method.mask_ratios"),
    ((0.1,), (0.2,), "block", "ratio - spread at least 0"),
    ((0.9,), (0.2,), "rand", r"ratio \+ spread at most 1"),
    ((0.1,), (-0.1,), "rand", "method.mask_spreads"),
  ],
)
def test_impossible_masks_are_refused_in_one_line(ratios, spreads, shape, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    masking.make(ratios, spreads, shape, (4, 4))
  assert "\n" not in str(caught.value)


def test_masks_are_the_same_on_eight_devices_and_nothing_is_exchanged():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  draw = masking.make((0.4,), (0.1,), "block", (4, 4))
  compiled = jax.jit(lambda key: draw(key, 16, 2), out_shardings=rows)
  key = jax.random.key(0)
  np.testing.assert_array_equal(compiled(key), jax.jit(draw, static_argnums=(1, 2))(key, 16, 2))
  text = compiled.lower(key).compile().as_text()
  assert not any(op in text for op in ("all-reduce", "all-gather", "all-to-all", "permute"))
