"""Files of other libraries, written from their published key lists; random numbers, small."""

import numpy as np


def _draw(rng, *shape):
  return (0.2 * rng.normal(size=shape)).astype(np.float32)


def _pair(rng, name, *shape):
  return {f"{name}.weight": _draw(rng, *shape), f"{name}.bias": _draw(rng, shape[0])}


def vit(*, width=64, depth=2, patch=8, side=2, registers=0, scaled=False, seed=0):
  """The backbone files of DINO and, with `registers` and `scaled`, of DINOv2."""
  rng = np.random.default_rng(seed)
  out = {
    "cls_token": _draw(rng, 1, 1, width),
    "pos_embed": _draw(rng, 1, 1 + side * side, width),
    **_pair(rng, "patch_embed.proj", width, 3, patch, patch),
    **_pair(rng, "norm", width),
  }
  if registers:
    out["register_tokens"] = _draw(rng, 1, registers, width)
  for i in range(depth):
    block = {
      **_pair(rng, "norm1", width),
      **_pair(rng, "attn.qkv", 3 * width, width),
      **_pair(rng, "attn.proj", width, width),
      **_pair(rng, "norm2", width),
      **_pair(rng, "mlp.fc1", 4 * width, width),
      **_pair(rng, "mlp.fc2", width, 4 * width),
    }
    if scaled:
      block |= {"ls1.gamma": _draw(rng, width), "ls2.gamma": _draw(rng, width)}
    out |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
  return out


def head(*, width=64, hidden=32, bottleneck=16, prototypes=8, norm=False, seed=1):
  """DINO's head with its weight-normalised prototypes; `norm`: with batch norm."""
  rng = np.random.default_rng(seed)
  out, step = {}, 3 if norm else 2
  for i, (rows, columns) in enumerate(((hidden, width), (hidden, hidden), (bottleneck, hidden))):
    out |= _pair(rng, f"mlp.{step * i}", rows, columns)
    if norm and i < 2:
      out |= batch_norm(rng, f"mlp.{step * i + 1}", hidden)
  out["last_layer.weight_g"] = np.ones((prototypes, 1), np.float32)
  out["last_layer.weight_v"] = _draw(rng, prototypes, bottleneck)
  return out


def batch_norm(rng, name, width):
  return {
    **_pair(rng, name, width),
    f"{name}.running_mean": _draw(rng, width),
    f"{name}.running_var": 1.0 + np.abs(_draw(rng, width)),
    f"{name}.num_batches_tracked": np.array(7),
  }


def resnet(*, bottleneck=False, stem=7, classes=0, seed=0):
  """torchvision's ResNet-18, or -50."""
  rng = np.random.default_rng(seed)

  def conv(rows, columns, side):
    return _draw(rng, rows, columns, side, side) * (8 / (columns * side * side)) ** 0.5

  out = {"conv1.weight": conv(64, 3, stem), **batch_norm(rng, "bn1", 64)}
  entering = 64
  for stage, blocks in enumerate((3, 4, 6, 3) if bottleneck else (2, 2, 2, 2), start=1):
    inner = 64 * 2 ** (stage - 1)
    layers = [(inner, 1), (inner, 3), (4 * inner, 1)] if bottleneck else [(inner, 3), (inner, 3)]
    for i in range(blocks):
      width, start = entering, f"layer{stage}.{i}"
      for j, (rows, side) in enumerate(layers, start=1):
        out[f"{start}.conv{j}.weight"] = conv(rows, width, side)
        out |= batch_norm(rng, f"{start}.bn{j}", rows)
        width = rows
      if width != entering or (stage > 1 and i == 0):
        out[f"{start}.downsample.0.weight"] = conv(width, entering, 1)
        out |= batch_norm(rng, f"{start}.downsample.1", width)
      entering = width
  if classes:
    out |= _pair(rng, "fc", classes, entering)
  return out


def prefixed(prefix, tensors):
  return {prefix + name: tensor for name, tensor in tensors.items()}
