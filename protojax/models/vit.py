"""Vision transformer with a class token and a learned position embedding.

Architecture: arXiv 2010.11929 in the pre-norm form that DINO trains (arXiv 2104.14294, table 1);
registers: arXiv 2309.16588; LayerScale: arXiv 2103.17239; drop path: arXiv 1603.09382; mask token:
arXiv 2111.07832.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from protojax import errors, sizes
from protojax.models import attention as attentions
from protojax.models import blocks, kernels

# width, blocks, attention heads; the hidden layer of the MLP is four times as wide. A "vit" has
# none of its own.
VARIANTS = {
  "vit": (0, 0, 0),
  "vit_tiny": (192, 12, 3),
  "vit_small": (384, 12, 6),
  "vit_base": (768, 12, 12),
}

_CUBIC_A = -0.75


def make(
  name: str,
  *,
  width: int | None = None,
  depth: int | None = None,
  num_heads: int | None = None,
  **options,
) -> "ViT":
  """A variant by name ("vit_tiny", "vit_small", "vit_base"), with parts of it overridden.

  "vit" is one of any size, which then has to be given.

  Args:
    name: key of `VARIANTS`.
    width, depth, num_heads: instead of the variant's; the heads must divide the width.
    **options: the other fields of `ViT`.

  Raises:
    UserError: heads that cannot share the width, no size, or a drop path rate that is none.
  """
  given = zip((width, depth, num_heads), VARIANTS[name], strict=True)
  width, depth, num_heads = (value or default for value, default in given)
  if not (width and depth and num_heads):
    raise errors.UserError(
      f"model.name={name} has no size of its own: set model.width, model.depth and model.heads, or "
      "choose vit_tiny, vit_small or vit_base"
    )
  if width % num_heads:
    raise errors.UserError(
      f"model.width={width} cannot be shared among model.heads={num_heads}; "
      "choose a number of heads that divides the width"
    )
  if not 0.0 <= options.get("drop_path", 0.0) < 1.0:
    raise errors.UserError(
      f"model.drop_path={options['drop_path']} is not in [0, 1); 0.1 is usual, 0 switches it off"
    )
  return ViT(width=width, depth=depth, num_heads=num_heads, **options)


def position_weights(new: int, old: int, offset: float = 0.1) -> np.ndarray:
  """Bicubic weights that resample `old` grid positions to `new`, [new, old] float64.

  As DINO's checkpoints expect it: a = -.75, no antialiasing (`jax.image.resize` differs in both),
  half-pixel centres, border clamped, and the scale (new + offset) / old, not new / old.
  """
  scale = (new + offset) / old
  source = (np.arange(new) + 0.5) / scale - 0.5
  first = np.floor(source).astype(int)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    distance = np.abs(source - (first + tap))
    near = (_CUBIC_A + 2) * distance**3 - (_CUBIC_A + 3) * distance**2 + 1
    far = _CUBIC_A * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    column = np.clip(first + tap, 0, old - 1)
    # Several taps land on the border, hence the unbuffered sum.
    np.add.at(weights, (np.arange(new), column), np.where(distance <= 1, near, far))
  return weights


def grid_size(height: int, width: int, patch_size: int) -> tuple[int, int]:
  """Patches along each axis.

  Raises:
    UserError: the patches do not tile the image.
  """
  if height % patch_size or width % patch_size:
    nearest = [max(patch_size, round(s / patch_size) * patch_size) for s in (height, width)]
    raise errors.UserError(
      f"an image of {height} x {width} pixels cannot be cut into patches of {patch_size} x "
      f"{patch_size}; the nearest size that can is {nearest[0]} x {nearest[1]} (see "
      "model.patch_size, model.image_size, augment.global_size, augment.local_size)"
    )
  return height // patch_size, width // patch_size


class PatchEmbed(nn.Module):
  """Linear map of non-overlapping patches: a strided convolution written as a matrix product."""

  patch_size: int
  width: int
  dtype: jnp.dtype
  fsdp: bool = False

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, H W / p^2, D]."""
    n, height, width, channels = images.shape
    p = self.patch_size
    rows, columns = grid_size(height, width, p)
    fan_in = channels * p * p

    def uniform(key, shape):
      return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)

    kernel = self.param("kernel", uniform, (p, p, channels, self.width)).astype(self.dtype)
    bias = self.param("bias", uniform, (self.width,)).astype(self.dtype)
    kernel = kernels.whole(kernel) if self.fsdp else kernel
    patches = images.astype(self.dtype).reshape(n, rows, p, columns, p, channels)
    if attentions.on_tpu():
      # Says the same without an order of the pixels; in the other one XLA copies every image twice.
      x = jnp.einsum("nrpqsc,pscd->nrqd", patches, kernel).reshape(n, rows * columns, self.width)
    else:
      patches = patches.swapaxes(2, 3).reshape(n, rows * columns, fan_in)
      x = blocks.rows(lambda x: x @ kernel.reshape(fan_in, self.width), patches)
    return x + bias[None, None]


class ViT(nn.Module):
  """Vision transformer; the representation is the normed class token.

  Attributes:
    width: embedding dimension D.
    depth: number of blocks.
    num_heads: attention heads, a divisor of `width`.
    patch_size: side of a patch in pixels.
    image_size: side, or (height, width), of the images the position embedding is for; other sizes
      interpolate it.
    drop_path: rate of the last block; it grows linearly from 0 at the first.
    registers: tokens without position that only take part in attention.
    layer_scale: start of LayerScale's factors; None builds none.
    norm_eps: what every layer norm adds to the variance.
    position_offset: of `position_weights`, where other sizes interpolate the position embedding.
    attention: who computes it, see `models.attention`: "auto", "xla", "cudnn" (a fused kernel of
      NVIDIA's; bfloat16 on their GPUs only) or "pallas" (one of our own for TPUs).
    mask_token: whether there is a learned token, 0 at the start, to put in the place of patches.
    remat: recompute each block in the backward pass instead of storing its activations.
    scan: whether the blocks are one loop, see `blocks.loop`; None: on TPUs. The parameters are the
      same.
    fsdp: whether kernels are stored split over devices, see `kernels.whole`.
    dtype: of the matrix products. Parameters, norms, softmax and the residual stream are float32.
  """

  width: int
  depth: int
  num_heads: int
  patch_size: int = 16
  image_size: sizes.Size = 224
  drop_path: float = 0.0
  registers: int = 0
  layer_scale: float | None = None
  norm_eps: float = 1e-6
  position_offset: float = 0.1
  attention: str = "auto"
  mask_token: bool = False
  remat: bool = False
  scan: bool | None = None
  fsdp: bool = False
  dtype: jnp.dtype = jnp.float32

  @property
  def feature_dim(self) -> int:
    return self.width

  @nn.compact
  def __call__(
    self,
    images: jax.Array | tuple[jax.Array, ...],
    *,
    mask: jax.Array | None = None,
    keep: jax.Array | None = None,
    patches: bool = False,
    views: int = 1,
    train: bool = False,
  ) -> Any:
    """Embeds images of one size, or of several at once.

    Args:
      images: [N, H, W, C] normalised; H and W are multiples of the patch size. Or a tuple of
        such arrays, whose N and sizes differ; the next three are of the first of them.
      mask: bool [N, T], T = H W / p^2, patches that the mask token replaces; needs `mask_token`.
      keep: int32 [N, T'], the patches that are not left out (arXiv 2204.07141); None keeps all.
      patches: whether the normed patch tokens are wanted too.
      views: part of the signature of every backbone; nothing here mixes rows.
      train: whether drop path acts; it then draws from the rng collection "drop_path".

    Returns:
      [N, D] float32; with `patches` the pair of it and the patch tokens [N, T or T', D] float32. Of
      several sizes a tuple of these.

    Raises:
      UserError: the patches do not tile the images.
    """
    del views
    several = isinstance(images, tuple)
    embed = PatchEmbed(self.patch_size, self.width, self.dtype, self.fsdp, name="patch_embed")
    mask_token = None
    if self.mask_token:
      mask_token = self.param("mask_token", nn.initializers.zeros, (1, 1, self.width))
    cls_token = self.param("cls_token", blocks.normal, (1, 1, self.width))
    own = grid_size(*sizes.pair(self.image_size), self.patch_size)
    positions = self.param("pos_embed", blocks.normal, (1, 1 + own[0] * own[1], self.width))
    positions = kernels.whole(positions) if self.fsdp else positions
    registers = None
    if self.registers:
      registers = self.param("registers", blocks.normal, (1, self.registers, self.width))

    def tokens(images, mask=None, keep=None):
      n, height, width, _ = images.shape
      x = embed(images)
      if mask is not None:
        x = jnp.where(mask[:, :, None], mask_token, x)
      x = jnp.concatenate([jnp.broadcast_to(cls_token, (n, 1, self.width)), x], axis=1)
      grid = grid_size(height, width, self.patch_size)
      x += resized(positions, own, grid, self.position_offset)
      if keep is not None:
        kept = jnp.take_along_axis(x[:, 1:], keep[:, :, None], axis=1)
        x = jnp.concatenate([x[:, :1], kept], axis=1)
      if registers is not None:
        every = jnp.broadcast_to(registers, (n, self.registers, self.width))
        x = jnp.concatenate([x[:, :1], every, x[:, 1:]], axis=1)
      return x

    first, *others = images if several else (images,)
    xs = [tokens(first, mask, keep), *map(tokens, others)]
    lengths = [x.shape[1] for x in xs]
    xs = self._through_blocks(xs, train)
    norm = blocks.layer_norm("norm", self.norm_eps, jnp.float32)
    if patches:
      x = norm(xs[0][:, : lengths[0]])
      found = (x[:, 0], x[:, 1 + self.registers :]), *(norm(x[:, 0]) for x in xs[1:])
    else:
      found = tuple(norm(x[:, 0]) for x in xs)
    return found if several else found[0]

  def _through_blocks(self, xs: list[jax.Array], train: bool) -> Sequence[jax.Array]:
    """Of each size [N, T, D] float32 -> [N, T or more, D] float32; the first T are the tokens'."""
    tokens = [x.shape[1] for x in xs]
    attention = attentions.choose(self.attention, self.dtype)
    if attention == "pallas":
      # Whole tiles: else most of what follows is copied from one layout to another.
      xs = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % attentions.TILE), (0, 0))) for x in xs]
    options = {
      "num_heads": self.num_heads,
      "layer_scale": self.layer_scale,
      "norm_eps": self.norm_eps,
      "attention": attention,
      "dtype": self.dtype,
      "fsdp": self.fsdp,
    }
    looped = attentions.on_tpu() if self.scan is None else self.scan
    # Parameters are made, and outputs of single blocks seen, one by one.
    looped &= not (self.is_initializing() or self.is_mutable_collection("intermediates"))
    block = blocks.Block
    if self.remat and not looped:
      block = nn.remat(blocks.Block, static_argnums=(4,))  # how many tokens there are
    each = [block(**options, name=f"blocks_{i}") for i in range(self.depth)]
    keeps = [1.0 - float(rate) for rate in np.linspace(0.0, self.drop_path, self.depth)]
    kept = [None] * len(xs)
    if train and self.drop_path:
      kept = [blocks.draw(self.make_rng("drop_path"), keeps, len(x)) for x in xs]
    if looped:
      params = [self.get_variable("params", block.name) for block in each]
      whole = blocks.Block(**options, parent=None)
      return blocks.loop(whole, params, xs, kept, keeps, tokens, remat=self.remat)
    for i, (block, keep) in enumerate(zip(each, keeps, strict=True)):
      dropped = [of_size[i] if of_size is not None and keep < 1.0 else None for of_size in kept]
      xs = [block(*x, keep, t) for *x, t in zip(xs, dropped, tokens, strict=True)]
    return xs


def resized(
  positions: jax.Array, own: tuple[int, int], grid: tuple[int, int], offset: float
) -> jax.Array:
  """The position embedding of another grid of patches.

  Args:
    positions: [1, 1 + rows * columns, D] float32, of the class token and of patches row by row.
    own: rows and columns that it is for.
    grid: rows and columns that are wanted.
    offset: of `position_weights`.

  Returns:
    [1, 1 + rows * columns, D] float32.
  """
  if grid == own:
    return positions
  rows, columns = (
    jnp.asarray(position_weights(new, old, offset), jnp.float32)
    for new, old in zip(grid, own, strict=True)
  )
  patches = positions[:, 1:].reshape(1, *own, -1)
  patches = jnp.einsum("hi,nijd->nhjd", rows, patches, precision="highest")
  patches = jnp.einsum("wj,nhjd->nhwd", columns, patches, precision="highest")
  patches = patches.reshape(1, grid[0] * grid[1], -1)
  return jnp.concatenate([positions[:, :1], patches], axis=1)
