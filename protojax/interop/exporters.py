"""An exported encoder -> weights under the names of timm, torchvision or Hugging Face."""

import re
from typing import Any

import numpy as np

from protojax import errors, sizes
from protojax.interop import names, settings
from protojax.models import resnet, vit

# The pooler of Hugging Face's ViT as the identity, so that its output is the class token.
_HF_OPTIONS = {
  "vit": {"pooler_act": "linear"},
  "dinov2": {"mlp_ratio": 4, "layerscale_value": 1.0, "use_swiglu_ffn": False},
}


def plain(tensors: dict[str, np.ndarray], info: dict) -> tuple[dict[str, np.ndarray], list[str]]:
  """The backbone under plain names (`interop.names`), in PyTorch's order of axes.

  Args:
    tensors, info: from `export.read`.

  Returns:
    ({name: float32}, names of the tensors that are left out: those of the projection head).

  Raises:
    UserError: for a ResNet-8, which nobody else has, and weights that are not of the model that
      `info` names.
  """
  kind = kind_of(info)
  *size, channels = settings.image_of(info)
  wanted = settings.template(settings.encoder_of(info), tuple(size), channels)
  mine = {name: leaf for name, leaf in tensors.items() if name.split(".")[1] == "backbone"}
  theirs = {name: leaf for name, leaf in wanted.items() if name.split(".")[1] == "backbone"}
  for name in sorted((mine.keys() ^ theirs.keys()) - {"params.backbone.mask_token"}):
    raise errors.UserError(
      f"{name} is {'missing' if name in theirs else 'left over'}: these weights are not of the "
      "model in the description beside them; export or convert them again"
    )
  out = {}
  for name, tensor in mine.items():
    turned = names.turn(name, np.asarray(tensor, np.float32), back=True)
    out[names.plain(name.split(".", 2)[2], kind)] = np.ascontiguousarray(turned)
  return out, sorted(tensors.keys() - mine.keys())


def at_size_of_views(
  tensors: dict[str, np.ndarray], info: dict
) -> tuple[dict[str, np.ndarray], dict, list[str]]:
  """A transformer with positions for the images that it was trained and judged on.

  Other libraries interpolate otherwise, or refuse; ours does so at every call.

  Args:
    tensors: from `plain`.
    info: from `export.read`.

  Returns:
    (tensors, info, notes), as they were where positions are for that size already.
  """
  views = info["image"]["global_size"]
  own, size = sizes.pair(info["model"].get("image_size") or views), sizes.pair(views)
  if "pos_embed" not in tensors or own == size:
    return tensors, info, []
  patch = tensors["patch_embed.proj.weight"].shape[-1]
  grids = [tuple(side // patch for side in sides) for sides in (own, size)]
  offset = info["model"].get("position_offset", 0.1)
  positions = np.asarray(vit.resized(tensors["pos_embed"], *grids, offset))
  before, now = sizes.text(info["model"]["image_size"]), sizes.text(views)
  note = f"position embedding resampled from {before} to {now} px, the size of the views"
  info = {**info, "model": {**info["model"], "image_size": views}}
  return {**tensors, "pos_embed": positions}, info, [note]


def kind_of(info: dict) -> str:
  """ "vit" or "resnet".

  Raises:
    UserError: for a ResNet-8, which nobody else has.
  """
  name = info["model"]["name"]
  if name not in (*vit.VARIANTS, *resnet.VARIANTS):
    raise errors.UserError(f"a {name} has no counterpart elsewhere: use format=jax or format=onnx")
  return "vit" if name in vit.VARIANTS else "resnet"


def _shape(tensors: dict[str, np.ndarray], info: dict) -> dict[str, Any]:
  """Settings of a transformer; those that a config leaves to the variant, from its weights."""
  width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
  height, wide = sizes.pair(info["model"].get("image_size") or info["image"]["global_size"])
  depth = sum(re.fullmatch(r"blocks\.\d+\.norm1\.bias", name) is not None for name in tensors)
  return {
    "width": width,
    "depth": depth,
    "patch": patch,
    "image": height if height == wide else [height, wide],
    "heads": info["model"].get("heads") or vit.VARIANTS[info["model"]["name"]][2],
    "registers": tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
    "scaled": "blocks.0.ls1.gamma" in tensors,
    "eps": info["model"].get("norm_eps", 1e-6),
  }


def timm(tensors: dict[str, np.ndarray], info: dict) -> tuple[dict, dict, list[str]]:
  """What `timm.create_model("local-dir:FOLDER")` loads.

  Args:
    tensors: from `plain`.
    info: from `export.read`.

  Returns:
    (tensors, content of config.json, notes).
  """
  out, notes = dict(tensors), []
  height, width, channels = settings.image_of(info)
  pretrained = {
    "input_size": [channels, height, width],
    "mean": list(info["image"]["mean"]),
    "std": list(info["image"]["std"]),
    "crop_pct": info["image"].get("crop", 1.0),
    "interpolation": "bicubic",
    "num_classes": 0,
  }
  if kind_of(info) == "resnet":
    name, stem = info["model"]["name"], info["model"].get("stem", "imagenet")
    if stem != "imagenet":
      padding = 2 if stem == "cifar_pad2" else 1
      notes.append(
        f"before loading, replace conv1 by a 3 x 3 of stride 1 and padding {padding} and the max "
        "pool by the identity: the models of timm and torchvision have a stem for large images"
      )
    pretrained |= {"first_conv": "conv1", "classifier": "fc"}
    features = out["layer4.0.bn2.bias"].size * (4 if "layer1.0.conv3.weight" in out else 1)
    return (
      out,
      {
        "architecture": name,
        "num_classes": 0,
        "num_features": features,
        "global_pool": "avg",
        "model_args": {"in_chans": channels},
        "pretrained_cfg": pretrained,
      },
      notes,
    )
  if out.pop("mask_token", None) is not None:
    notes.append("the mask token is left out: timm has none")
  shape = _shape(out, info)
  arguments = {
    "img_size": shape["image"],
    "in_chans": channels,
    "patch_size": shape["patch"],
    "embed_dim": shape["width"],
    "depth": shape["depth"],
    "num_heads": shape["heads"],
    "class_token": True,
    "init_values": 1e-5 if shape["scaled"] else None,
  }
  pretrained |= {
    "input_size": [channels, *sizes.pair(shape["image"])],
    "first_conv": "patch_embed.proj",
    "classifier": "head",
  }
  if shape["eps"] != 1e-6:
    notes.append(f"timm's layer norms add 1e-6, these were trained with {shape['eps']:g}")
  if shape["registers"]:
    # Where timm has registers, the class token's position is part of the token.
    position = out["pos_embed"]
    out["cls_token"] = out["cls_token"] + position[:, :1]
    out["pos_embed"] = np.ascontiguousarray(position[:, 1:])
    out["reg_token"] = out.pop("register_tokens")
    arguments |= {"reg_tokens": shape["registers"], "no_embed_class": True}
  return (
    out,
    {
      "architecture": "vit_base_patch16_224",  # a name that timm has; `model_args` says all sizes
      "num_classes": 0,
      "num_features": shape["width"],
      "global_pool": "token",
      "model_args": arguments,
      "pretrained_cfg": pretrained,
    },
    notes,
  )


def hugging_face(tensors: dict[str, np.ndarray], info: dict) -> tuple[dict, dict, dict, list[str]]:
  """What `transformers.AutoModel.from_pretrained(FOLDER)` loads, with no tensor missing.

  Without LayerScale and registers a "vit", else a "dinov2" or "dinov2_with_registers".

  Args:
    tensors: from `plain`.
    info: from `export.read`.

  Returns:
    (tensors, content of config.json, of preprocessor_config.json, notes).

  Raises:
    UserError: for a ResNet.
  """
  if kind_of(info) == "resnet":
    raise errors.UserError(
      "format=hf is for transformers: format=timm gives a ResNet the names of torchvision"
    )
  size, wide, channels = settings.image_of(info)
  if size != wide or channels != 3:
    raise errors.UserError(
      "format=hf is for square images of three channels, its processors know no others: use "
      "format=timm or format=jax"
    )
  out, notes, shape = dict(tensors), [], _shape(tensors, info)
  width, mask = shape["width"], out.pop("mask_token", None)
  kind = "dinov2" if shape["scaled"] or shape["registers"] else "vit"
  if kind == "dinov2" and not shape["scaled"]:
    ones = np.ones(width, np.float32)
    names_of = [f"blocks.{i}.ls{j}.gamma" for i in range(shape["depth"]) for j in (1, 2)]
    out |= dict.fromkeys(names_of, ones)
    notes.append("LayerScale of ones added: dinov2 has no model without")
  out = names.to_hugging_face(out, kind)
  model_type = kind + ("_with_registers" if shape["registers"] else "")
  architecture = {"vit": "ViT", "dinov2": "Dinov2"}.get(model_type, "Dinov2WithRegisters") + "Model"
  config = {
    "architectures": [architecture],
    "model_type": model_type,
    "hidden_size": width,
    "num_hidden_layers": shape["depth"],
    "num_attention_heads": shape["heads"],
    "intermediate_size": 4 * width,
    "image_size": shape["image"],
    "patch_size": shape["patch"],
    "num_channels": 3,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "layer_norm_eps": shape["eps"],
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "dtype": "float32",
    **_HF_OPTIONS[kind],
  }
  if kind == "vit":
    out |= {
      "pooler.dense.weight": np.eye(width, dtype=np.float32),
      "pooler.dense.bias": np.zeros(width, np.float32),
    }
    notes.append("the pooler is the identity: pooler_output is the class token")
    if mask is not None:
      notes.append("the mask token is left out: AutoModel's ViT has none")
  else:
    mask = np.zeros((1, width), np.float32) if mask is None else mask.reshape(1, width)
    out["embeddings.mask_token"] = mask
  if shape["registers"]:
    config["num_register_tokens"] = shape["registers"]
  processor = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": round(size / info["image"].get("crop", 1.0))},
    "do_center_crop": True,
    "crop_size": {"height": size, "width": size},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(info["image"]["mean"]),
    "image_std": list(info["image"]["std"]),
    "do_convert_rgb": True,
  }
  return out, config, processor, notes
