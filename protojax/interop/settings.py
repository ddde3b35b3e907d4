"""Settings of a model, read off the shapes of its tensors; what ours cannot be is refused."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from protojax import config as configs
from protojax import errors, sizes, trees
from protojax.models import encoder as encoders
from protojax.models import resnet, vit

_ADVICE = "protojax has no such model, so these weights cannot be converted"


def of_vit(
  tensors: Mapping[str, np.ndarray], *, heads: int | None = None, norm_eps: float = 1e-6
) -> dict[str, Any]:
  """`config.model` of a transformer.

  Args:
    tensors: plain names (`interop.names`), dialects resolved.
    heads: attention heads, which no shape tells; None takes width / 64.
    norm_eps: of the layer norms, which no shape tells either.

  Raises:
    UserError: for parts that `models.vit.ViT` lacks, and a number of heads that is none.
  """
  for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
    if name not in tensors:
      gated = any(re.search(r"\.mlp\.(w12|w1|weights_in|fc1_g)\.", k) for k in tensors)
      names = ", ".join(sorted(tensors)[:3])
      why = f"there is no {name} among its {len(tensors)} tensors ({names}, ...)"
      why = "its MLP is gated (SwiGLU)" if gated and ".mlp." in name else why
      raise errors.UserError(f"{why}: {_ADVICE}")
  kernel, position = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
  hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
  width, channels, patch, other = kernel.shape if kernel.ndim == 4 else (0, 0, 0, 0)
  side = round(max(position.shape[-2] - 1, 0) ** 0.5) if position.ndim == 3 else 0
  for wrong, what in (
    (
      channels != 3 or patch != other,
      f"patch_embed.proj.weight has shape {kernel.shape}, not [width, 3, patch, patch]",
    ),
    (
      side == 0 or position.shape != (1, 1 + side * side, width),
      f"pos_embed has shape {position.shape}, not [1, 1 + side * side, {width}]",
    ),
    (hidden != 4 * width, f"its MLP is {hidden} wide, not four times {width}"),
    ("blocks.0.attn.qkv.bias" not in tensors, "queries, keys and values have no bias"),
  ):
    if wrong:
      raise errors.UserError(f"{what}: {_ADVICE}")
  if heads is None and width % 64:
    raise errors.UserError(
      f"the number of attention heads cannot be seen in weights of width {width}: give heads=NUMBER"
    )
  heads = heads or width // 64
  if heads < 1 or width % heads:
    raise errors.UserError(f"heads={heads} does not divide the width {width}")
  depth = 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if m)
  shape = (width, depth, heads)
  scaled = "blocks.0.ls1.gamma" in tensors
  return {
    **configs.default().model.to_dict(),
    "name": next((name for name, v in vit.VARIANTS.items() if v == shape), "vit"),
    "width": width,
    "depth": depth,
    "heads": heads,
    "patch_size": patch,
    "image_size": patch * side,
    "norm_eps": norm_eps,
    "registers": tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
    "layer_scale": 1e-5 if scaled else None,  # DINOv2's start; the factors come from the file
  }


def of_resnet(tensors: Mapping[str, np.ndarray], *, stem: str | None = None) -> dict[str, Any]:
  """`config.model` of a ResNet.

  Args:
    tensors: plain names (`interop.names`).
    stem: key of `resnet.STEMS`, needed for a 3 x 3 one, whose padding no shape tells.

  Raises:
    UserError: for a ResNet that `models.resnet` lacks, and a stem that is not given or does not
      fit.
  """
  blocks = [re.match(r"layer(\d)\.(\d+)\.", name) for name in tensors]
  found = {(int(m[1]), int(m[2])) for m in blocks if m}
  sizes = tuple(sum(stage == s for stage, _ in found) for s in range(1, 5))
  variant = (sizes, "layer1.0.conv3.weight" in tensors)
  names = [name for name, v in resnet.VARIANTS.items() if v == variant]
  if not names:
    raise errors.UserError(f"it has {sizes} blocks in its stages: {_ADVICE}")
  side = tensors["conv1.weight"].shape[-1] if "conv1.weight" in tensors else 0
  fitting = {7: ("imagenet",), 3: ("cifar", "cifar_pad2")}.get(side)
  if fitting is None:
    raise errors.UserError(f"its first convolution is {side} pixels wide, not 7 or 3: {_ADVICE}")
  if (stem or fitting[0]) not in fitting or (stem is None and len(fitting) > 1):
    raise errors.UserError(
      f"its first convolution is {side} x {side}: give stem={' or stem='.join(fitting)}"
      + (" (its padding is 1 or 2; solo-learn's is 2)" if side == 3 else "")
    )
  return {**configs.default().model.to_dict(), "name": names[0], "stem": stem or fitting[0]}


def of_head(
  tensors: Mapping[int | None, dict[str, np.ndarray]], activation: str
) -> tuple[dict[str, Any], dict[str, tuple[int | None, str]]]:
  """`config.head` of a projection head, and where each of its tensors comes from.

  Args:
    tensors: {place in the sequence: {"weight", "bias", batch norm's}}; place None for a head that
      is one linear layer.
    activation: key of `models.heads.ACTIVATIONS`.

  Returns:
    (settings, {our name with its collection, "params.head.fc1.kernel": (place, leaf)}).

  Raises:
    UserError: if it is not linear layers of one hidden width with or without batch norm between.
  """
  weights = {place: leaves["weight"] for place, leaves in tensors.items() if "weight" in leaves}
  places = sorted(weights, key=lambda place: -1 if place is None else place)
  linear = [p for p in places if weights[p].ndim == 2]
  norms = [p for p in places if p not in linear]
  widths = {weights[p].shape[0] for p in linear[:-1]}
  step = 3 if norms else 2
  regular = linear and linear in ([None], [step * i for i in range(len(linear))])
  between = [p + 1 for p in linear[:-1]] if norms else []
  if not regular or len(widths) > 1 or norms != between or weights.keys() != tensors.keys():
    raise errors.UserError(
      "its projection head is not that of DINO or SwAV: leave it out (with_head=False, --no_head)"
    )
  sources = {}
  for i, place in enumerate(linear, start=1):
    sources[f"params.head.fc{i}.kernel"] = place, "weight"
    if "bias" in tensors[place]:
      sources[f"params.head.fc{i}.bias"] = place, "bias"
  for i, place in enumerate(norms, start=1):
    sources[f"params.head.norm{i}.scale"] = place, "weight"
    sources[f"params.head.norm{i}.bias"] = place, "bias"
    sources[f"batch_stats.head.norm{i}.mean"] = place, "running_mean"
    sources[f"batch_stats.head.norm{i}.var"] = place, "running_var"
  bottleneck = weights[linear[-1]].shape[0]
  settings = {
    **configs.default().head.to_dict(),
    "layers": len(linear),
    "hidden": widths.pop() if widths else bottleneck,
    "bottleneck": bottleneck,
    "norm": "batch" if norms else "none",
    "activation": activation,
    "bias": "bias" in tensors[linear[0]],
  }
  return settings, sources


def image_of(info: Mapping[str, Any]) -> tuple[int, int, int]:
  """(height, width, channels) of the images that a description is for."""
  return *sizes.pair(info["image"]["global_size"]), info["image"].get("channels", 3)


def encoder_of(info: Mapping[str, Any]) -> encoders.Encoder:
  """The encoder, in float32 and without drop path, of a description that `export.read` gives."""
  model = {**info["model"], "drop_path": 0.0, "attention": "xla"}
  model["image_size"] = model.get("image_size") or info["image"]["global_size"]
  if isinstance(model["image_size"], list):  # JSON has no tuples
    model["image_size"] = tuple(model["image_size"])
  return encoders.build(ml_collections.ConfigDict({"model": model, "head": info.get("head") or {}}))


def template(
  encoder: encoders.Encoder, image_size: sizes.Size, channels: int = 3
) -> dict[str, jax.ShapeDtypeStruct]:
  """{"params.backbone.norm.scale": shape and dtype, ...} of an encoder from `models.encoder`."""
  params, stats = jax.eval_shape(
    lambda key: encoders.init(encoder, key, image_size, channels), jax.random.key(0)
  )
  return trees.flat({"params": params, "batch_stats": stats})
