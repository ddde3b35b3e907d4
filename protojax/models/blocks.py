"""The blocks of a vision transformer, and how a pass goes through them."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from protojax import placement
from protojax.models import activations, attention, kernels

# Plain normal: `truncated_normal(.02)` of jax.nn would cut at two deviations, DINO's at 100.
normal = nn.initializers.normal(0.02)

# What a loop stores of each block beside its input; all else is computed again from these, which
# is cheaper than to store it: it needs no matrix product.
_STORED = ("qkv", "attended", "between", "hidden")


def rows(layer, x: jax.Array) -> jax.Array:
  """`layer` over the last axis of x, as one matrix product over all leading axes.

  XLA's CPU backend takes five times as long for the weight gradient of a product whose rows lie on
  two axes, measured at [256, 17, 96] x [96, 384].
  """
  y = layer(x.reshape(-1, x.shape[-1]))
  return y.reshape(*x.shape[:-1], y.shape[-1])


def layer_norm(name: str, epsilon: float, dtype: jnp.dtype) -> nn.LayerNorm:
  """Statistics in float32, the result in `dtype`."""
  return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def dense(width: int, name: str, dtype: jnp.dtype, fsdp: bool) -> nn.Dense:
  """A linear layer; with `fsdp` its kernel is stored split, see `kernels.whole`."""
  product = kernels.dot_general if fsdp else None
  return nn.Dense(width, dtype=dtype, kernel_init=normal, dot_general=product, name=name)


class Attention(nn.Module):
  """Self-attention; queries, keys and values come from one kernel [D, 3 D]."""

  num_heads: int
  implementation: str
  dtype: jnp.dtype
  fsdp: bool

  @nn.compact
  def __call__(self, x: jax.Array, tokens: int) -> jax.Array:
    """[N, T, D] -> [N, T, D]."""
    width = x.shape[-1]
    qkv = rows(dense(3 * width, "qkv", self.dtype, self.fsdp), x)
    qkv = checkpoint_name(qkv, "qkv")
    x = attention.attend(qkv, self.num_heads, self.implementation, tokens)
    x = checkpoint_name(x, "attended")
    return rows(dense(width, "proj", self.dtype, self.fsdp), x)


class Mlp(nn.Module):
  """Two linear layers around an exact (erf) GELU."""

  dtype: jnp.dtype
  fsdp: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[N, T, D] -> [N, T, D]."""
    width = x.shape[-1]
    x = rows(dense(4 * width, "fc1", self.dtype, self.fsdp), x)
    x = activations.gelu(checkpoint_name(x, "hidden"))
    return rows(dense(width, "fc2", self.dtype, self.fsdp), x)


class Block(nn.Module):
  """Pre-norm block: x += branch(norm(x)) for attention, then for the MLP.

  Attributes:
    num_heads: attention heads, which divide the width.
    layer_scale: start of LayerScale's factors; None builds none.
    norm_eps: what the layer norms add to the variance.
    attention: who computes it, see `attention.attend`.
    dtype: of the matrix products.
    fsdp: whether kernels are stored split, see `kernels.whole`.
  """

  num_heads: int
  layer_scale: float | None
  norm_eps: float
  attention: str
  dtype: jnp.dtype
  fsdp: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, kept: jax.Array | None, keep: float | jax.Array, tokens: int
  ) -> jax.Array:
    """The residual stream, one block on.

    Args:
      x: [N, T, D] float32.
      kept: bool [2, N], whose branches are not dropped, see `draw`; None drops none.
      keep: the share of the images for which that is so.
      tokens: how many of T there are, see `attention.attend`.

    Returns:
      [N, T, D] float32.
    """
    kept = (None, None) if kept is None else kept
    y = layer_norm("norm1", self.norm_eps, self.dtype)(x)
    of_attention = self.num_heads, self.attention, self.dtype, self.fsdp
    y = Attention(*of_attention, name="attn")(y, tokens)
    x += self._finish_branch(y, "ls1", kept[0], keep)
    x = checkpoint_name(x, "between")
    y = layer_norm("norm2", self.norm_eps, self.dtype)(x)
    y = Mlp(self.dtype, self.fsdp, name="mlp")(y)
    return x + self._finish_branch(y, "ls2", kept[1], keep)

  def _finish_branch(self, y: jax.Array, scale_name: str, kept, keep) -> jax.Array:
    """LayerScale and drop path: [N, T, D] -> [N, T, D] float32."""
    # The residual stream stays float32: twelve bfloat16 sums would lose what a branch adds.
    y = y.astype(jnp.float32)
    if self.layer_scale is not None:
      init = nn.initializers.constant(self.layer_scale)
      y *= self.param(scale_name, init, (y.shape[-1],))[None, None]
    if kept is not None:
      y = jnp.where(kept[:, None, None], y / keep, 0.0)
    return y


def draw(key: jax.Array, keeps: Sequence[float], n: int) -> jax.Array:
  """Which of n images keep a branch, of every block: bool [blocks, 2, n], in one draw.

  Args:
    key: of the draw.
    keeps: of each block, the probability.
    n: images.
  """
  share = jnp.asarray(keeps, jnp.float32)[:, None, None]
  return jax.random.bernoulli(key, share, (len(keeps), 2, n))


def loop(
  block: Block,
  params: Sequence[dict],
  xs: Sequence[jax.Array],
  kept: Sequence[jax.Array | None],
  keeps: Sequence[float],
  tokens: Sequence[int],
  *,
  remat: bool,
) -> tuple[jax.Array, ...]:
  """Images of several sizes through blocks of different parameters: one loop, compiled once.

  The parameters are copied one after the other for that, their matrices in the dtype of the
  products. Of each block its products are stored for the backward pass, the rest is computed again.
  All sizes go through a block together, so that its gradient is added up over the devices once.

  Args:
    block: unbound, `parent=None`.
    params: of each block.
    xs: of each size, [N, T, D] float32.
    kept: of each size, from `draw`; None drops nothing.
    keeps: of each block.
    tokens: of each size, how many of T there are.
    remat: store of each block nothing but its input.
  """

  def stacked(*leaves):
    cast = leaves[0].ndim == 2  # as nn.Dense does
    return jnp.stack([leaf.astype(block.dtype) if cast else leaf for leaf in leaves])

  def step(xs, inputs):
    own, kept, keep = inputs
    of_sizes = zip(xs, kept, tokens, strict=True)
    return tuple(block.apply({"params": own}, x, k, keep, t) for x, k, t in of_sizes), None

  policy = None if remat else jax.checkpoint_policies.save_only_these_names(*_STORED)
  step = jax.checkpoint(step, policy=policy, prevent_cse=False)

  def through(xs, own, kept):
    return jax.lax.scan(step, xs, (own, kept, jnp.asarray(keeps, jnp.float32)))[0]

  of_rows = placement.ENCODED, PartitionSpec(), PartitionSpec(None, None, placement.AXES)
  if not block.fsdp:  # then each kernel is gathered in its turn, and its gradient divided again
    through = placement.over_rows(through, of_rows, math.gcd(*(len(x) for x in xs)))
  return through(tuple(xs), jax.tree.map(stacked, *params), tuple(kept))
