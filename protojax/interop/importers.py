"""Weights of another library -> the encoder as a run of protojax exports it."""

import pathlib
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from protojax import __version__, errors, trees
from protojax import config as configs
from protojax.interop import names, network, settings
from protojax.models import encoder as encoders
from protojax.models import vit
from protojax.prototypes import scoring


class Converted(NamedTuple):
  """What `convert` made.

  Attributes:
    tensors: {"params.backbone.norm.scale": float32, ...} that came out of the file.
    info: its description, for `export.write`.
    prototypes: {set: what scores with it}, for `export.write`; {} without.
    layers: {set: the file's name of its layer}.
    missing: {ours that the file lacks: what the file would call it}.
    unexpected: the file's that ours lack.
    aside: {why: the file's that are no part of an encoder}.
    without: why there are no prototypes behind a head, in words; else "".
    not_finite: which of the file's that are part of it hold NaN or infinity, in words; "" if none.
    notes: sentences about what could not be read off the file.
  """

  tensors: dict[str, np.ndarray]
  info: dict
  prototypes: dict[str, scoring.Scoring]
  layers: dict[str, str]
  missing: dict[str, str]
  unexpected: list[str]
  aside: dict[str, list[str]]
  without: str
  not_finite: str
  notes: list[str]


def _resampled(position: np.ndarray, new: int, rule: str) -> np.ndarray:
  """[1, 1 + old * old, D] -> [1, 1 + new * new, D], as the library of origin does it.

  Args:
    position: first row is the class token's and stays.
    new: patches along a side.
    rule: "dino" (`vit.position_weights`), "plain" (the same without its offset: Hugging Face) or
      "antialias" (models with registers, everywhere).
  """
  old = round((position.shape[1] - 1) ** 0.5)
  if rule == "antialias":
    weights = np.asarray(jax.image.resize(np.eye(old, dtype=np.float32), (new, old), "cubic"))
  else:
    weights = vit.position_weights(new, old, offset=0.1 if rule == "dino" else 0.0)
  grid = position[0, 1:].reshape(old, old, -1).astype(np.float64)
  grid = np.einsum("hi,wj,ijd->hwd", weights, weights, grid, optimize=True)
  grid = grid.reshape(1, new * new, -1).astype(np.float32)
  return np.concatenate([position[:, :1].astype(np.float32), grid], axis=1)


def _model(net: network.Network, heads, stem, image_size) -> tuple[dict, dict, int, list[str]]:
  """(config.model, tensors, image size, notes) of a network."""
  if net.kind == "resnet":
    if heads is not None:
      raise errors.UserError(f"heads={heads} is for transformers; {net.path} holds a ResNet")
    model = settings.of_resnet(net.tensors, stem=stem)
    return model, net.tensors, image_size or (224 if model["stem"] == "imagenet" else 32), []
  if stem is not None:
    raise errors.UserError(f"stem={stem} is for ResNets; {net.path} holds a transformer")
  notes = []
  model = settings.of_vit(net.tensors, heads=heads or net.heads, norm_eps=net.norm_eps or 1e-6)
  if heads is None and net.heads is None:
    beside = net.path.with_name("config.json").is_file()
    other = "nor does config.json beside it" if beside else "and no config.json lies beside it"
    notes.append(
      f"{model['heads']} attention heads: width / 64, since no tensor tells {other}: "
      "heads=NUMBER says another"
    )
  rule = "plain" if net.hugging_face else "dino"
  rule = "antialias" if model["registers"] else rule
  patch, own = model["patch_size"], model["image_size"]
  if image_size and image_size % patch:
    raise errors.UserError(f"image_size={image_size} is no multiple of the patch size {patch}")
  if image_size and image_size != own:
    position = _resampled(net.tensors["pos_embed"], image_size // patch, rule)
    model["image_size"] = image_size
    notes.append(f"position embedding resampled from {own} to {image_size} px, rule {rule!r}")
    return model, {**net.tensors, "pos_embed": position}, image_size, notes
  if rule != "dino":
    notes.append(
      f"equal to its library at {own} px; other sizes are interpolated as DINO does, not as "
      "there: convert with image_size=PIXELS for one of them"
    )
  return model, net.tensors, own, notes


def convert(
  path: pathlib.Path,
  *,
  which: str | None = None,
  heads: int | None = None,
  stem: str | None = None,
  image_size: int | None = None,
  crop: float | None = None,
  with_head: bool = True,
  transpose: bool = False,
) -> Converted:
  """Converts one network of a file.

  Args:
    path: a file, or a folder of Hugging Face or timm.
    which: of several networks in the file "teacher", "student" or a prefix; None takes the only
      one or the teacher.
    heads: attention heads; None takes what config.json says, else width / 64.
    stem: key of `resnet.STEMS`, for a first convolution of 3 x 3.
    image_size: pixels that the position embedding is resampled to; None keeps the file's.
    crop: side of the centre crop of evaluation over the image's shorter side, at most 1; None takes
      what lies beside the file, else 1.
    with_head: whether the projection head is converted too.
    transpose: of prototypes that the file stores [D, K].

  Raises:
    UserError: for a network that no model here is, a tensor of a wrong shape, or a mistake in the
      arguments.
  """
  if crop is not None and not 0 < crop <= 1:
    raise errors.UserError(f"crop={crop:g} must be above 0 and at most 1, .875 for 256 -> 224")
  net = network.read(network.file_of(path), which=which, with_head=with_head, transpose=transpose)
  model, tensors, size, notes = _model(net, heads, stem, image_size)
  head, sources = settings.of_head(net.head, net.activation) if net.head else (None, {})
  encoder = encoders.build(ml_collections.ConfigDict({"model": model, "head": head or {}}))
  out, missing, used = {}, {}, set()
  for name, leaf in settings.template(encoder, size).items():
    collection, part, below = name.split(".", 2)
    if part == "head" and head is None:
      continue
    if part == "head":
      place, leaf_name = sources.get(name) or (_layer_place(sources, name), "bias")
      theirs = net.head_prefix + ("" if place is None else f"{place}.") + leaf_name
      tensor = net.head.get(place, {}).get(leaf_name)
    else:
      plain = names.plain(below, net.kind)
      theirs = network.name_in_file(net, plain)
      tensor = tensors.get(plain)
      used.add(plain)
    if tensor is None:
      missing[name] = theirs
      continue
    tensor = names.turn(name, np.asarray(tensor))
    if tensor.shape != leaf.shape:
      raise errors.UserError(
        f"{net.path}: {_both_names(name, theirs)} has shape {tensor.shape} there and {leaf.shape} "
        f"in a {model['name']} of its settings: these weights cannot be converted"
      )
    out[name] = np.asarray(tensor, np.float32)
  lacking = [name for name in ("mean", "std") if getattr(net, name) is None]
  if lacking:
    notes.append(
      f"{' and '.join(lacking)} of the images: ImageNet's, since neither preprocessor_config.json "
      "nor config.json beside the file says another"
    )
  crop = crop or net.crop
  if crop is None:
    notes.append(
      "evaluated is the whole centre square of an image: nothing beside the file names a crop, "
      "crop=0.875 is the usual 256 -> 224"
    )
  if net.without:
    notes.append(f"no prototypes: {net.without}")
  info = {
    "weights": net.weights,
    "step": None,
    "version": __version__,
    "model": model,
    "image": {
      "global_size": size,
      "mean": net.mean or configs.IMAGENET["mean"],
      "std": net.std or configs.IMAGENET["std"],
      "crop": crop or 1.0,
    },
    "source": {"file": net.path.name, "prefix": net.prefix, "layout": _layout(net)},
    # What a run that starts from these weights initialises itself.
    "lacks": ["backbone.mask_token", *([] if head else ["head"])],
  }
  if head:
    info["head"] = head
  sets = {"prototypes" if not i else f"prototypes_{i}": s for i, s in enumerate(net.prototypes)}
  taken = tuple(f"{n}." for one in sets.values() for n in (one.name, *one.aliases))
  aside = {
    why: [name for name in left if not f"{name}.".startswith(taken)]
    for why, left in net.aside.items()
  }
  return Converted(
    tensors=out,
    info=info,
    prototypes={name: scoring.Scoring(one.weights()) for name, one in sets.items()},
    layers={name: one.name for name, one in sets.items()},
    missing=missing,
    unexpected=sorted(network.name_in_file(net, name) for name in set(tensors) - used),
    aside={why: left for why, left in aside.items() if left},
    without=net.without,
    not_finite=net.not_finite or _without_direction(net),
    notes=notes,
  )


def _without_direction(net: network.Network) -> str:
  """Which rows of weight-normalised prototypes are zeros, 0 / 0 in use, in words; "" if none."""
  for one in net.prototypes:
    zeros = np.flatnonzero(~np.any(one.matrix, axis=1)) if one.gain is not None else ()
    if len(zeros):
      more = f" and {len(zeros) - 1} more" * (len(zeros) > 1)
      return (
        f"row {zeros[0]}{more} of {one.key} is zeros, of which weight normalisation makes 0 / 0"
      )
  return ""


def missing(done: Converted) -> list[str]:
  """What `done` is missing, by the names of its file and of protojax."""
  return [_both_names(ours, theirs) for ours, theirs in done.missing.items()]


def _both_names(ours: str, theirs: str) -> str:
  """A tensor by the name in its file, and by that in protojax where it is another."""
  ours = ours.partition(".")[2]
  return theirs if theirs == ours else f"{theirs} ({ours} in protojax)"


def _layer_place(sources, name: str):
  """The place of the linear layer of a head to which a tensor without a source belongs."""
  return sources[f"{name.rpartition('.')[0]}.kernel"][0]


def fresh(done: Converted) -> dict[str, np.ndarray]:
  """What `done` is missing, as a new encoder starts with it: {name: float32}."""
  encoder, size = settings.encoder_of(done.info), done.info["image"]["global_size"]
  params, stats = jax.jit(lambda key: encoders.init(encoder, key, size))(jax.random.key(0))
  start = trees.flat({"params": params, "batch_stats": stats})
  return {name: np.asarray(start[name]) for name in done.missing}


def _layout(net: network.Network) -> str:
  if net.kind == "resnet":
    return "torchvision ResNet"
  return "Hugging Face transformer" if net.hugging_face else "DINO or timm transformer"
