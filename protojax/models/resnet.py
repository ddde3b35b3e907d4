"""Residual networks: ResNet-18 and -50 (arXiv 1512.03385) and a ResNet-8 without norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from protojax.models import batch_norm

# blocks a stage, bottleneck blocks or basic ones
VARIANTS = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}
STEMS = ("imagenet", "cifar", "cifar_pad2")

_kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Block(nn.Module):
  """Basic block (two 3x3) or bottleneck (1x1, 3x3 with the stride, 1x1 four times as wide)."""

  width: int
  stride: int
  bottleneck: bool
  zero_init_residual: bool
  joint_norm: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, views: int, train: bool) -> jax.Array:
    """[N, H, W, C] -> [N, H / stride, W / stride, width or 4 width]."""
    if self.bottleneck:
      layers = ((self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1))
    else:
      layers = ((self.width, 3, self.stride), (self.width, 3, 1))

    def conv_norm(y, width, kernel, stride, suffix, last=False):
      y = _conv(width, kernel, stride, (kernel - 1) // 2, self.dtype, f"conv{suffix}")(y)
      zero_scale = last and self.zero_init_residual
      normalise = batch_norm.BatchNorm(
        self.joint_norm, zero_scale, self.dtype, name=f"norm{suffix}"
      )
      return normalise(y, views=views, train=train)

    y = x
    for i, (width, kernel, stride) in enumerate(layers, start=1):
      y = conv_norm(y, width, kernel, stride, i, last=i == len(layers))
      if i < len(layers):
        y = jax.nn.relu(y)
    if x.shape != y.shape:
      x = conv_norm(x, layers[-1][0], 1, self.stride, "_shortcut")
    return jax.nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet with torchvision's paddings (stride on the 3x3), globally averaged.

  Attributes:
    stage_sizes: blocks in each of the four stages.
    bottleneck: bottleneck blocks instead of basic ones.
    stem: "imagenet" (7x7, stride 2, then 3x3 max pool of stride 2), "cifar" (3x3, stride 1, no
      pool), or "cifar_pad2", the same with solo-learn's padding of 2, so 32 px become 34.
    zero_init_residual: start every residual branch at zero.
    joint_norm: batch norm over all views together instead of view by view.
    remat: recompute each block in the backward pass instead of storing its activations.
    dtype: of convolutions and activations; parameters, statistics and output are float32.
  """

  stage_sizes: tuple[int, ...]
  bottleneck: bool
  stem: str = "imagenet"
  zero_init_residual: bool = False
  joint_norm: bool = False
  remat: bool = False
  dtype: jnp.dtype = jnp.float32

  @property
  def feature_dim(self) -> int:
    return 64 * 2 ** (len(self.stage_sizes) - 1) * (4 if self.bottleneck else 1)

  @nn.compact
  def __call__(self, images: jax.Array, *, views: int = 1, train: bool = False) -> jax.Array:
    """Embeds images.

    Args:
      images: [B * V, H, W, C] normalised, the V views of an image in consecutive rows.
      views: V, for the statistics of batch norm.
      train: mode of batch norm.

    Returns:
      [B * V, F] float32, F = 512 or 2048.
    """
    kernel, stride, padding = {
      "imagenet": (7, 2, 3), "cifar": (3, 1, 1), "cifar_pad2": (3, 1, 2),
    }[self.stem]  # fmt: skip
    x = _conv(64, kernel, stride, padding, self.dtype, "conv1")(images)
    normalise = batch_norm.BatchNorm(joint=self.joint_norm, dtype=self.dtype, name="norm1")
    x = jax.nn.relu(normalise(x, views=views, train=train))
    if self.stem == "imagenet":
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

    block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
    for stage, size in enumerate(self.stage_sizes, start=1):
      for i in range(size):
        stride = 2 if stage > 1 and i == 0 else 1
        x = block(
          64 * 2 ** (stage - 1),
          stride,
          self.bottleneck,
          self.zero_init_residual,
          self.joint_norm,
          self.dtype,
          name=f"stage{stage}_{i}",
        )(x, views, train)
    return x.astype(jnp.float32).mean(axis=(1, 2))


class ResNet8(nn.Module):
  """Four blocks of two 3x3 convolutions without any norm, LeakyReLU(.2), globally averaged.

  The backbone of FALCON's small experiments, reconstructed from the critic of arXiv 2010.04230:
  the first two blocks halve the resolution by average pooling, widths are all F.

  Attributes:
    width: F, 128 for SVHN and CIFAR-10, 256 for CIFAR-100.
    dtype: of the convolutions; parameters and output are float32.
  """

  width: int = 128
  dtype: jnp.dtype = jnp.float32

  @property
  def feature_dim(self) -> int:
    return self.width

  @nn.compact
  def __call__(self, images: jax.Array, *, views: int = 1, train: bool = False) -> jax.Array:
    """[N, H, W, C] normalised -> [N, F] float32. `views` and `train` change nothing here."""
    del views, train

    def conv(x, size, name, gain_squared=2.0):
      xavier = nn.initializers.variance_scaling(gain_squared, "fan_avg", "uniform")
      pad = size // 2
      return nn.Conv(
        self.width,
        (size, size),
        padding=((pad, pad), (pad, pad)),
        dtype=self.dtype,
        kernel_init=xavier,
        name=name,
      )(x)

    def pool(x):
      return nn.avg_pool(x, (2, 2), (2, 2))

    x = images.astype(self.dtype)
    y = conv(_leaky(conv(x, 3, "block1_conv1", gain_squared=1.0)), 3, "block1_conv2")
    x = conv(pool(x), 1, "block1_conv_shortcut") + pool(y)
    for i in range(2, 5):
      y = conv(_leaky(x), 3, f"block{i}_conv1")
      y = conv(_leaky(y), 3, f"block{i}_conv2")
      x = pool(x) + pool(y) if i == 2 else x + y
    return _leaky(x).astype(jnp.float32).mean(axis=(1, 2))


def _conv(width, kernel, stride, padding, dtype, name) -> nn.Conv:
  """Convolution without bias, padded alike on all sides."""
  return nn.Conv(
    width,
    (kernel, kernel),
    (stride, stride),
    padding=((padding, padding),) * 2,
    use_bias=False,
    dtype=dtype,
    kernel_init=_kaiming,
    name=name,
  )


def _leaky(x: jax.Array) -> jax.Array:
  return jax.nn.leaky_relu(x, 0.2)
