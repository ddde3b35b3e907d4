"""One network out of a file of another library: which part, which layout, what is set aside."""

import pathlib
import re
from typing import NamedTuple

import numpy as np

from protojax import errors, files, trees
from protojax.interop import names, prototype_layouts, tensor_files

# A tensor that every network of a layout has, below whatever prefix.
_ANCHORS = {
  "patch_embed.proj.weight": "vit",
  "embeddings.patch_embeddings.projection.weight": "hugging_face",
  "layer1.0.conv1.weight": "resnet",
}
# Of several networks in a file: words of their prefix.
_WHICH = {"teacher": ("teacher", "target_encoder"), "student": ("student", "encoder")}
_HEAD = re.compile(
  r"(head|dino_head|projection_head)\.(?:mlp\.)?(?:(\d+)\.)?"
  r"(weight|bias|running_mean|running_var)"
)
# What a file holds beside the network, in the order of trial.
_ASIDE = (
  (r"(.+\.)?num_batches_tracked", "counters of batch norm"),
  (r"(embeddings\.)?mask_token|masked_embed", "mask token; training with masks starts a fresh one"),
  (r"(.+_?head\.|head\.)?last_layer2\..*", "prototypes of patches, not taken over: see the file"),
  (r"(.+_?head\.|head\.)?(last_layer|prototypes)\..*", "prototypes, no part of an encoder"),
  (r"ibot_head\..*|head\.mlp2\..*", "head of patch tokens"),
  (r"(head|fc|classifier)\.(weight|bias)", "classifier"),
  (r"pooler\..*", "Hugging Face's pooler"),
  (r"fc\.(fc|bn)\d\..*", "MSN's head, another than ours"),
)
_OF_PATCHES = re.compile(r"last_layer2$|ibot_head\.")  # prototypes with a head of their own
_CONFIGS = ("vit", "dinov2", "dinov2_with_registers")


class Network(NamedTuple):
  """What `read` found.

  Attributes:
    path: of the file.
    kind: "vit" or "resnet".
    hugging_face: whether its names were Hugging Face's.
    prefix: of its names in the file.
    weights: "teacher", or "encoder" where the file does not say so.
    tensors: backbone, plain names (`interop.names`).
    head: {place in the sequence: {"weight": ...}}, or {}.
    head_prefix: of the head's names in the file, up to the place in the sequence.
    activation: of that head.
    prototypes: sets that the head's output is compared with, [] without.
    without: why there are none behind a head, in words; else "".
    aside: {why: names of tensors of the file that are set aside}.
    not_finite: which of the others hold NaN or infinity, in words; "" if none does.
    heads, norm_eps: of a transformer; None where nothing says.
    mean, std: of the images' channels; None where nothing says.
    crop: side of the centre crop of evaluation over the image's shorter side; None likewise.
  """

  path: pathlib.Path
  kind: str
  hugging_face: bool
  prefix: str
  weights: str
  tensors: dict[str, np.ndarray]
  head: dict[int | None, dict[str, np.ndarray]]
  head_prefix: str
  activation: str
  prototypes: list[prototype_layouts.Prototypes]
  without: str
  aside: dict[str, list[str]]
  not_finite: str
  heads: int | None
  norm_eps: float | None
  mean: tuple[float, ...] | None
  std: tuple[float, ...] | None
  crop: float | None


def name_in_file(net: Network, plain: str) -> str:
  """What the file calls, or would call, a tensor of the backbone, without chunks of blocks."""
  if net.hugging_face:
    kind = "dinov2" if "blocks.0.ls1.gamma" in net.tensors else "vit"
    theirs = names.in_hugging_face(plain, kind).split(", ")
    return ", ".join(net.prefix + name for name in theirs)
  return net.prefix + plain


def file_of(path: pathlib.Path) -> pathlib.Path:
  """The weights of a folder of Hugging Face or timm, or the file itself.

  Raises:
    UserError: if there is no such file or the folder holds none.
  """
  if not path.exists():
    raise errors.UserError(f"there is no {path}")
  if not path.is_dir():
    return path
  for name in ("model.safetensors", "pytorch_model.bin"):
    if (path / name).is_file():
      return path / name
  raise errors.UserError(
    f"{path} holds neither a run of protojax, nor encoder.safetensors, nor model.safetensors: "
    "give a file of weights"
  )


def _json(path: pathlib.Path) -> dict:
  try:
    content = files.parse_json(path.read_text())
  except OSError:
    return {}
  except ValueError:
    raise errors.UserError(f"{path} is not readable JSON: copy it again, or move it away") from None
  return content if isinstance(content, dict) else {}


def _choose(prefixes: dict[str, str], which: str | None, path) -> str:
  """The prefix of the network that is wanted."""
  if not prefixes:
    raise errors.UserError(
      f"{path} holds no network of a known layout (DINO, iBOT, DINOv2, timm or Hugging Face "
      "transformers, torchvision ResNets)"
    )
  if which is None and len(prefixes) == 1:
    return next(iter(prefixes))
  words = set(_WHICH.get(which or "teacher", ()))
  fitting = [p for p in prefixes if p.rstrip(".") == which or words & set(p.split("."))]
  if len(fitting) != 1:
    there = ", ".join(p.rstrip(".") or "(no prefix)" for p in prefixes)
    raise errors.UserError(
      f"{path} holds {len(prefixes)} networks: {there}; "
      + ("give one as which=NAME" if which is None else f"which={which} is not one of them")
    )
  return fitting[0]


def read(
  path: pathlib.Path,
  *,
  which: str | None = None,
  with_head: bool = True,
  transpose: bool = False,
) -> Network:
  """Reads a network and sorts everything else that is in the file.

  Args:
    path: from `file_of`; config.json and preprocessor_config.json beside it are read too.
    which: of several networks in the file "teacher", "student" or a prefix; None takes the only
      one or the teacher.
    with_head: whether a projection head is wanted.
    transpose: of prototypes stored [D, K].

  Raises:
    UserError: if the file is damaged, or holds no such network, or no prototypes to transpose.
  """
  arrays = tensor_files.read(path)
  prefixes = {
    name[: -len(anchor)]: layout
    for name in arrays
    for anchor, layout in _ANCHORS.items()
    if name == anchor or name.endswith("." + anchor)
  }
  prefix = _choose(prefixes, which, path)
  layout = prefixes[prefix]
  root = re.sub(r"(^|\.)backbone\.$", r"\1", prefix)
  backbone, head, aside, activation, head_prefix = {}, {}, {}, "gelu", ""
  used = {}
  for name, tensor in arrays.items():
    inside = name.startswith(prefix)
    short = name.removeprefix(prefix if inside else root)
    why = next((why for pattern, why in _ASIDE if re.fullmatch(pattern, short)), None)
    found = _HEAD.fullmatch(short)
    if not name.startswith(root):
      why = f"other parts of the file ({name.partition('.')[0]})"
    elif why is None and found:
      why = None if with_head else "projection head, not asked for"
    elif why is None and not inside:
      why = f"other parts of the file ({short.partition('.')[0]})"
    if why is not None:
      aside.setdefault(why, []).append(name)
      continue
    used[name] = tensor
    if found:
      head.setdefault(found[2] and int(found[2]), {})[found[3]] = tensor
      activation = "relu" if found[1] == "projection_head" else "gelu"
      head_prefix = name.removesuffix(f"{found[2]}." * bool(found[2]) + found[3])
    else:
      backbone[short] = tensor
  hugging_face = layout == "hugging_face"
  if hugging_face:
    backbone = names.from_hugging_face(backbone)
  elif layout == "vit":
    backbone = names.from_variants(backbone)
  below = {k: v for k, v in arrays.items() if k.startswith(root)}
  prototypes, turned = _prototypes(below, head, transpose)
  if transpose and not prototypes:
    raise errors.UserError(
      f"transpose=True: {path} has no projection head that ends where prototypes [D, K] begin: "
      "leave it out"
    )
  for one, why in turned:
    layer = prototype_layouts.layer(one)
    moved = [name for left in aside.values() for name in left if f"{name}.".startswith(f"{layer}.")]
    aside = {w: [n for n in left if n not in moved] for w, left in aside.items()}
    aside[why] = [*aside.get(why, []), *moved]
  used |= {one.key: one.matrix for one in prototypes}
  used |= {f"{one.name}, its gains": one.gain for one in prototypes if one.gain is not None}
  return Network(
    path=path,
    kind="resnet" if layout == "resnet" else "vit",
    hugging_face=hugging_face,
    prefix=prefix,
    tensors=backbone,
    head=head,
    head_prefix=head_prefix,
    activation=activation,
    prototypes=prototypes,
    without=_without(below, head) if head and not prototypes and not turned else "",
    aside={why: left for why, left in aside.items() if left},
    not_finite=trees.not_finite(used),
    weights="teacher" if set(prefix.split(".")) & set(_WHICH["teacher"]) else "encoder",
    **_described(path, hugging_face, "blocks.0.ls1.gamma" in backbone),
  )


def _prototypes(arrays, head, transpose: bool):
  """(the sets for images among a network's arrays, those that lie turned with why one thinks so).

  Sets for patches have a head of their own.
  """
  layers = [head[place] for place in sorted(head, key=lambda p: p or 0)] if head else []
  linear = [layer["weight"] for layer in layers if "weight" in layer and layer["weight"].ndim == 2]
  sets = [
    one
    for one in prototype_layouts.find(arrays, transpose=transpose)
    if linear and not _OF_PATCHES.search(one.name)
  ]
  fitting = [one for one in sets if one.matrix.shape[1] == linear[-1].shape[0]]
  to_do = "leave transpose=True out" if transpose else "transpose=True takes them"
  so = "[K, D]" if transpose else "[D, K]"
  turned = [
    (one, f"prototypes stored {so}, for {why}: {to_do}")
    for one in sets
    if one.matrix.shape[1] != linear[-1].shape[0] and (why := prototype_layouts.turned(arrays, one))
  ]
  return fitting, turned


def _without(arrays, head) -> str:
  """Why a network with a head has no prototypes, in words."""
  sets = [one for one in prototype_layouts.find(arrays) if not _OF_PATCHES.search(one.name)]
  if not sets:
    return prototype_layouts.without(arrays)
  last = head[max(head, key=lambda place: place or 0)]["weight"]
  return f"{sets[0].key} has {sets[0].matrix.shape[1]} columns and the head ends in {len(last)}"


def _described(path, hugging_face: bool, scaled: bool) -> dict:
  """What config.json and preprocessor_config.json beside the file say."""
  said, images = (_json(path.with_name(f)) for f in ("config.json", "preprocessor_config.json"))
  timm, arguments = (_section(said, name) for name in ("pretrained_cfg", "model_args"))
  heads, eps = arguments.get("num_heads", said.get("num_heads")), None
  if hugging_face:
    # Without a config.json: the defaults of the two kinds.
    eps = said.get("layer_norm_eps", 1e-6 if scaled else 1e-12)
    heads = said.get("num_attention_heads")
    kind, activation = said.get("model_type", "vit"), said.get("hidden_act", "gelu")
    if kind not in _CONFIGS or activation != "gelu":
      raise errors.UserError(
        f"{path.with_name('config.json')}: model_type={kind!r} with hidden_act={activation!r} is "
        f"none of {', '.join(_CONFIGS)} with gelu, which is what protojax can be"
      )
  return {
    "heads": heads if isinstance(heads, int) else None,
    "norm_eps": eps if isinstance(eps, float) else None,
    "mean": _channels(images.get("image_mean", timm.get("mean"))),
    "std": _channels(images.get("image_std", timm.get("std"))),
    "crop": _crop(images, timm.get("crop_pct")),
  }


def _crop(images: dict, timm: object) -> float | None:
  """Of preprocessor_config.json, which resizes first, or of timm's crop_pct."""
  resized, cropped = (_side(images.get(name)) for name in ("size", "crop_size"))
  if not images.get("do_center_crop"):
    cropped = resized
  crop = cropped / resized if cropped and resized else timm
  return float(crop) if isinstance(crop, int | float) and 0 < crop <= 1 else None


def _side(value: object) -> int | None:
  """Pixels: 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
  if isinstance(value, dict):
    value = value.get("shortest_edge", value.get("height"))
  return value if isinstance(value, int) and value > 0 else None


def _section(content: dict, name: str) -> dict:
  return content[name] if isinstance(content.get(name), dict) else {}


def _channels(value) -> tuple[float, ...] | None:
  """Three numbers, or one for all three; None for anything else."""
  if isinstance(value, int | float) and not isinstance(value, bool):
    return (float(value),) * 3
  numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
  return tuple(map(float, value)) if numbers and len(value) == 3 else None
