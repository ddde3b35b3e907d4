"""Which patches of a view are hidden (arXiv 2106.08254, 2111.07832) or left out (2204.07141).

As the views, a mask is a function of (key, row of the global batch, number of the view): it does
not depend on the number of devices, and drawing it moves nothing between them.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from protojax import errors

_FAILURES = 10  # attempts in a row without a block that fits end a mask
_LOG_ASPECT = math.log(1 / 0.3)
# Attempts in all. Of 15,000 masks of 14 x 14 patches (a third each of .1, .3 and .5) none took more
# than 41, of 3,000 of 37 x 37 none more than 57.
_ATTEMPTS = 64


def make(
  ratios: tuple[float, ...], spreads: tuple[float, ...], shape: str, grid: tuple[int, int]
) -> Callable[[jax.Array, int, int], jax.Array]:
  """A sampler of masks.

  For each view one of the ratios is drawn, all alike, then the share of its patches to hide,
  uniform within that ratio's spread.

  Args:
    ratios: shares of hidden patches; 0 hides none.
    spreads: half the width of the interval around each ratio.
    shape: "block", see `block_mask`; or "rand", exactly floor(share T) patches anywhere.
    grid: rows and columns of patches; T is their product.

  Returns:
    sample(key, B, V) -> bool [B, V, T], True where hidden. `key` is a typed key that the caller has
    folded with seed and step.

  Raises:
    UserError: for an unknown shape or shares that leave [0, 1].
  """
  if shape not in ("block", "rand"):
    raise errors.UserError(f"method.mask_shape={shape!r} is unknown: choose block or rand")
  pairs = tuple(zip(ratios, spreads, strict=False))
  inside = all(0.0 <= spread <= ratio <= 1.0 - spread for ratio, spread in pairs)
  if not pairs or len(ratios) != len(spreads) or not inside:
    raise errors.UserError(
      f"method.mask_ratios={tuple(ratios)} with method.mask_spreads={tuple(spreads)}: give as many "
      "of the one as of the other, and ratio - spread at least 0, ratio + spread at most 1"
    )
  num_patches = grid[0] * grid[1]

  def one(key):
    ratio_key, share_key, mask_key = jax.random.split(key, 3)
    ratio, spread = jnp.array(pairs)[jax.random.randint(ratio_key, (), 0, len(pairs))]
    target = _target(num_patches, ratio, spread, jax.random.uniform(share_key, (), minval=-1.0))
    if shape == "rand":
      return jax.random.permutation(mask_key, num_patches) < jnp.floor(target)
    return block_mask(jax.random.uniform(mask_key, (_ATTEMPTS, 4)), target, grid).reshape(-1)

  return lambda key, batch, views: _each(one, key, batch, views)


def _target(num_patches, ratio, spread, share):
  """Patches to hide, not a whole number, for a share within the spread, -1 to 1."""
  return num_patches * (ratio + spread * share)


def most_hidden(ratios: tuple[float, ...], spreads: tuple[float, ...], num_patches: int) -> int:
  """The most patches that a mask of `make` can hide, of either shape; at least 1.

  In float32, as they are drawn: .29 of 100 are 29, where float64 says 28.

  Args:
    ratios, spreads: as `make` takes them.
    num_patches: T.
  """
  pairs = zip(ratios, spreads, strict=True)
  targets = [_target(*map(np.float32, (num_patches, *pair, 1.0))) for pair in pairs]
  return max(1, math.floor(max(targets)))


def hidden(mask: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
  """Numbers of the hidden patches, as many for every view.

  Args:
    mask: bool [B, V, T], True where hidden.
    most: M, patches that a mask hides at most; see `most_hidden`.

  Returns:
    int32 [B, V, M], the hidden patches in their order, filled up with others; and bool [B, V, M],
    True where the patch is a hidden one.
  """
  index = jnp.argsort(~mask, axis=-1, stable=True)[..., :most].astype(jnp.int32)
  return index, jnp.arange(most)[None, None] < mask.sum(axis=-1, keepdims=True)


def keep(key: jax.Array, batch: int, views: int, *, dropped: float, num_patches: int) -> jax.Array:
  """Patches that stay when a share is left out at random (arXiv 2204.07141).

  Args:
    key: typed key that the caller has folded with seed and step.
    batch: B.
    views: V.
    dropped: share left out, in [0, 1); floor((1 - dropped) T) patches stay, at least one.
    num_patches: T.

  Returns:
    int32 [B, V, floor((1 - dropped) T)], in random order.
  """
  # A hair more: .3 of 10 left out leaves 7, not 6.
  count = max(1, math.floor((1.0 - dropped) * num_patches + 1e-6))

  def one(key):
    return jax.random.permutation(key, num_patches)[:count].astype(jnp.int32)

  return _each(one, key, batch, views)


def _each(one: Callable, key: jax.Array, batch: int, views: int) -> jax.Array:
  """one(key) -> [...] with a key of its own for every row and view: [B, V, ...]."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  keys = jax.vmap(fold, in_axes=(0, None))(fold(key, jnp.arange(batch)), jnp.arange(views))
  return jax.vmap(jax.vmap(one))(keys)


def block_mask(uniform: jax.Array, target: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Union of random rectangles, drawn one after the other until `target` patches are hidden.

  An attempt draws an area between (shorter side // 3)^2 and what is left to hide, a log-uniform
  aspect in .3..1/.3 and a corner. It counts if the rectangle is smaller than the grid along both
  axes, hides something new and no more than what is left. After ten attempts in a row that do not
  count the mask stays as it is, so it hides somewhat less than asked for.

  Args:
    uniform: [A, 4] in [0, 1): area, aspect, top, left of each attempt.
    target: [] float32, patches to hide.
    grid: rows and columns.

  Returns:
    [rows, columns] bool.
  """
  rows, columns = grid
  least = (min(grid) // 3) ** 2
  row, column = jnp.arange(rows)[:, None], jnp.arange(columns)[None, :]

  def attempt(state, u):
    mask, failures = state
    left = target - mask.sum()
    area = least + (left - least) * u[0]
    aspect = jnp.exp(_LOG_ASPECT * (2.0 * u[1] - 1.0))
    height, width = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    top = jnp.floor(u[2] * (rows - height + 1.0))
    start = jnp.floor(u[3] * (columns - width + 1.0))
    block = (row >= top) & (row < top + height) & (column >= start) & (column < start + width)
    new = (block & ~mask).sum()
    fits = (height < rows) & (width < columns) & (new > 0) & (new <= left)
    fits &= failures < _FAILURES
    return (mask | (block & fits), jnp.where(fits, 0, failures + 1)), None

  start = jnp.zeros(grid, bool), jnp.zeros((), jnp.int32)
  (mask, _), _ = jax.lax.scan(attempt, start, uniform)
  return mask
