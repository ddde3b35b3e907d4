"""What a trained backbone computes on the way: features of several layers, attention maps.

Captured from the modules as they are; nothing here is used in training.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from protojax import errors
from protojax.models import encoder as encoders
from protojax.models import vit

PyTree = Any

# How many of the last blocks give their class token, and whether the mean patch joins them
# (arXiv 2104.14294, appendix F.2: "last4" for ViT-S, "last_avg" for ViT-B).
_OF_VIT = {"last": (1, False), "last4": (4, False), "last_avg": (1, True), "last4_avg": (4, True)}


def available(encoder: encoders.Encoder) -> tuple[str, ...]:
  """Names that `features` takes: ("last",) for a ResNet, four for a ViT of four blocks or more."""
  if not isinstance(encoder.backbone, vit.ViT):
    return ("last",)
  return tuple(name for name, (blocks, _) in _OF_VIT.items() if blocks <= encoder.backbone.depth)


def features(
  encoder: encoders.Encoder,
  params: PyTree,
  batch_stats: PyTree,
  images: jax.Array,
  names: tuple[str, ...] = ("last",),
) -> dict[str, jax.Array]:
  """Backbone features of several layers in evaluation mode, from one pass.

  Args:
    encoder, params, batch_stats: as in `encoder.features`.
    images: [B, H, W, C] normalised.
    names: of `available`. "last" is what `encoder.features` gives. "last4" joins the class tokens
      of the last four blocks, each through the final norm; "_avg" adds the mean of the last block's
      patch tokens, normed too, without the registers.

  Returns:
    {name: float32 [B, F], F of that layer}.

  Raises:
    UserError: for a name that this encoder does not have.
  """
  have = available(encoder)
  for name in names:
    if name not in have:
      raise errors.UserError(f"layer {name!r} is unknown: this encoder has {', '.join(have)}")
  if set(names) == {"last"}:
    return {"last": encoders.features(encoder, params, batch_stats, images)}
  backbone = encoder.backbone
  tokens = _captured(backbone, params, images, lambda module: isinstance(module, vit.Block))
  norm = nn.LayerNorm(epsilon=backbone.norm_eps, use_fast_variance=False)
  last = [
    norm.apply({"params": params["backbone"]["norm"]}, tokens[f"blocks_{i}"]["__call__"][0])
    for i in range(max(0, backbone.depth - 4), backbone.depth)
  ]
  patches = last[-1][:, 1 + backbone.registers :].mean(axis=1)
  out = {}
  for name in names:
    blocks, with_patches = _OF_VIT[name]
    parts = [x[:, 0] for x in last[-blocks:]] + [patches] * with_patches
    out[name] = jnp.concatenate(parts, axis=-1).astype(jnp.float32)
  return out


def attention(encoder: encoders.Encoder, params: PyTree, images: jax.Array) -> jax.Array:
  """What the class token looks at in the last block of a ViT.

  Args:
    encoder: from `encoder.build`.
    params: {"backbone": ...}.
    images: [B, H, W, C] normalised.

  Returns:
    float32 [B, heads, h, w], patches along each side: softmax weights of the patches; they sum to
    less than 1, the rest goes to the class token itself and to registers.

  Raises:
    UserError: for an encoder without attention.
  """
  backbone = encoder.backbone
  if not isinstance(backbone, vit.ViT):
    raise errors.UserError("attention maps need a vision transformer; this encoder is a ResNet")
  name = f"blocks_{backbone.depth - 1}"
  found = _captured(backbone, params, images, lambda module: module.name == "qkv")
  qkv = found[name]["attn"]["qkv"]["__call__"][0]
  batch, heads = images.shape[0], backbone.num_heads
  qkv = qkv.reshape(batch, -1, 3, heads, backbone.width // heads).astype(jnp.float32)
  logits = jnp.einsum("bhd,bthd->bht", qkv[:, 0, 0], qkv[:, :, 1], precision="highest")
  weights = jax.nn.softmax(logits * qkv.shape[-1] ** -0.5, axis=-1)[:, :, 1 + backbone.registers :]
  height, width = vit.grid_size(*images.shape[1:3], backbone.patch_size)
  return weights.reshape(batch, heads, height, width)


def _captured(backbone, params, images, wanted) -> PyTree:
  """Outputs of the submodules that `wanted` picks, by their path."""
  _, state = backbone.apply(
    {"params": params["backbone"]},
    images,
    capture_intermediates=lambda module, method: method == "__call__" and wanted(module),
    mutable=["intermediates"],
  )
  return state["intermediates"]
