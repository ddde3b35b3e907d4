"""What a trained backbone computes on the way: features and patches of any layer, attention maps.

Captured from the modules as they are; nothing here is used in training.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from protojax import errors
from protojax.models import encoder as encoders
from protojax.models import resnet, vit

PyTree = Any

# How many of the last blocks give their class token, and whether the mean patch joins them
# (arXiv 2104.14294, appendix F.2: "last4" for ViT-S, "last_avg" for ViT-B).
_OF_VIT = {"last": (1, False), "last4": (4, False), "last_avg": (1, True), "last4_avg": (4, True)}


def available(encoder: encoders.Encoder) -> tuple[str, ...]:
  """Names that `features` takes: ("last",) for a ResNet, four for a ViT of four blocks or more."""
  if not isinstance(encoder.backbone, vit.ViT):
    return ("last",)
  return tuple(name for name, (blocks, _) in _OF_VIT.items() if blocks <= encoder.backbone.depth)


def single(encoder: encoders.Encoder) -> tuple[str, ...]:
  """Names of the layers one by one, which `features` and `patches` take beside "last".

  "block1", "block2", ... of a ViT, "stage1" to "stage4" of a ResNet; none of a ResNet-8.
  """
  return tuple(_modules(encoder))


def _modules(encoder: encoders.Encoder) -> dict[str, str]:
  """{layer: name of the module whose output it is}."""
  backbone = encoder.backbone
  if isinstance(backbone, vit.ViT):
    return {f"block{i + 1}": f"blocks_{i}" for i in range(backbone.depth)}
  if isinstance(backbone, resnet.ResNet):
    sizes = enumerate(backbone.stage_sizes, start=1)
    return {f"stage{stage}": f"stage{stage}_{size - 1}" for stage, size in sizes}
  return {}


def _require_known(names: tuple[str, ...], have: tuple[str, ...], what: str = "layer") -> None:
  for name in names:
    if name not in have:
      raise errors.UserError(
        f"{what} {name!r} is unknown: this encoder has {', '.join(have[:6])}"
        + f", ... to {have[-1]}" * (len(have) > 6)
      )


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
    names: of `available` or `single`. "last" is what `encoder.features` gives. "last4" joins the
      class tokens of the last four blocks, each through the final norm; "_avg" adds the mean of the
      last block's patch tokens, normed too, without the registers. "block3" is the class token
      after that block, through the final norm, as DINO's `get_intermediate_layers` has it; "stage3"
      the output of that stage, averaged over the image.

  Returns:
    {name: float32 [B, F], F of that layer}.

  Raises:
    UserError: for a name that this encoder does not have.
  """
  _require_known(names, (*available(encoder), *single(encoder)))
  if set(names) == {"last"}:
    return {"last": encoders.features(encoder, params, batch_stats, images)}
  backbone, ones = encoder.backbone, tuple(_modules(encoder))
  if not isinstance(backbone, vit.ViT):
    maps = patches(encoder, params, batch_stats, images, names)
    return {name: x.mean(axis=(1, 2)) for name, x in maps.items()}
  wanted = tuple(name for name in names if name in ones)
  joined = tuple(name for name in names if name not in ones)
  if joined:
    wanted = tuple(dict.fromkeys((*wanted, *ones[-max(_OF_VIT[n][0] for n in joined) :])))
  tokens = _tokens(encoder, params, images, wanted)
  out = {}
  for name in names:
    if name in ones:
      out[name] = tokens[name][:, 0]
      continue
    blocks, with_patches = _OF_VIT[name]
    parts = [tokens[block][:, 0] for block in ones[-blocks:]]
    if with_patches:
      parts.append(tokens[ones[-1]][:, 1 + backbone.registers :].mean(axis=1))
    out[name] = jnp.concatenate(parts, axis=-1)
  return out


def patches(
  encoder: encoders.Encoder,
  params: PyTree,
  batch_stats: PyTree,
  images: jax.Array,
  names: tuple[str, ...] = ("last",),
) -> dict[str, jax.Array]:
  """Patch tokens of a ViT, or the maps of a ResNet, in evaluation mode, from one pass.

  Args:
    encoder, params, batch_stats: as in `encoder.features`.
    images: [B, H, W, C] normalised.
    names: "last" or any of `single`. The tokens of a ViT's block go through the final norm, as in
      DINO's `get_intermediate_layers`; class token and registers are left out. The maps of a ResNet
      are as its stages give them.

  Returns:
    {name: float32 [B, h, w, F]}, row by row from the top left; of a ViT h = w = S / patch size.

  Raises:
    UserError: for a layer that this encoder does not have, and a ResNet-8, which has no maps here.
  """
  modules = _modules(encoder)
  if not modules:
    raise errors.UserError("a resnet8 gives features of its last layer only, no maps or stages")
  ones = tuple(modules)
  _require_known(names, ("last", *ones), "layer of patches")
  wanted = tuple(dict.fromkeys(ones[-1] if name == "last" else name for name in names))
  backbone = encoder.backbone
  if isinstance(backbone, vit.ViT):
    height, width = vit.grid_size(*images.shape[1:3], backbone.patch_size)
    tokens = _tokens(encoder, params, images, wanted)
    maps = {
      name: x[:, 1 + backbone.registers :].reshape(x.shape[0], height, width, x.shape[-1])
      for name, x in tokens.items()
    }
  else:
    found = _captured(
      backbone, params, images, lambda m: m.name in modules.values(), batch_stats.get("backbone")
    )
    maps = {name: found[modules[name]]["__call__"][0].astype(jnp.float32) for name in wanted}
  return {name: maps[ones[-1] if name == "last" else name] for name in names}


def _tokens(encoder, params, images, names) -> dict[str, jax.Array]:
  """All tokens [B, 1 + registers + T, D] after blocks of a ViT, through the final norm, float32."""
  backbone, modules = encoder.backbone, _modules(encoder)
  wanted = {modules[name] for name in names}
  found = _captured(backbone, params, images, lambda module: module.name in wanted)
  norm = nn.LayerNorm(epsilon=backbone.norm_eps, use_fast_variance=False)
  of_norm = {"params": params["backbone"]["norm"]}
  return {
    name: norm.apply(of_norm, found[modules[name]]["__call__"][0]).astype(jnp.float32)
    for name in names
  }


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


def _captured(backbone, params, images, wanted, batch_stats=None) -> PyTree:
  """Outputs of the submodules that `wanted` picks, by their path."""
  _, state = backbone.apply(
    {"params": params["backbone"], "batch_stats": batch_stats or {}},
    images,
    capture_intermediates=lambda module, method: method == "__call__" and wanted(module),
    mutable=["intermediates"],
  )
  return state["intermediates"]
