"""Encoder: a backbone and a projection head, built from a config and used by plain functions."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from protojax import errors, sizes
from protojax.models import attention, heads, resnet, vit

PyTree = Any
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Encoder(NamedTuple):
  """Two modules whose parameters are {"backbone": ..., "head": ...}.

  Attributes:
    backbone: (images [B * V, S, S, C], views, train) -> [B * V, F] float32; a ViT also takes masks,
      and images of several sizes at once, and gives its patch tokens.
    head: (features [B * V, F], views, train) -> [B * V, D] float32.
  """

  backbone: nn.Module
  head: heads.Projector


class Embedded(NamedTuple):
  """What becomes of the views of a batch, float32; V = G + L views, the G global ones first.

  Attributes:
    z: [B, V, D], the head's output.
    features: [B, V, F], the backbone's.
    patches: [B, G, T, D], the patch tokens of the global views through the head, or [B, G, M, D]
      of "hidden" ones; None unless asked for.
  """

  z: jax.Array
  features: jax.Array
  patches: jax.Array | None = None


def build(config: ml_collections.ConfigDict, *, mask_token: bool = False) -> Encoder:
  """The encoder that a config describes.

  Args:
    config: `model.name` is one of vit_tiny, vit_small, vit_base, vit (of the width, depth and heads
      that are given), resnet8, resnet18, resnet50.
      Optional, absent or None for the default: `precision`; of the transformers
      model.{patch_size, image_size, width, depth, heads, drop_path, registers, layer_scale,
      norm_eps, position_offset, attention, scan, remat}; of the ResNets
      model.{width (resnet8), stem, zero_init_residual, joint_norm, remat};
      head.{layers, hidden, bottleneck, norm, norm_output, activation, bias, init, l2}; of all but
      the ResNets mesh.fsdp. A field
      that the named model does not have is ignored, so that `model.name` can be switched alone.
    mask_token: for a method that hides patches from a transformer.

  Raises:
    UserError: a name or a number that no model has, or a mask token in one without patch tokens.
  """

  def given(section, **names):
    section = config.get(section) or {}
    values = {field: section.get(key) for field, key in names.items()}
    return {field: value for field, value in values.items() if value is not None}

  dtype = _DTYPES[_choice("precision", config.get("precision") or "float32", _DTYPES)]
  names = (*vit.VARIANTS, "resnet8", *resnet.VARIANTS)
  name = _choice("model.name", config.model.get("name"), names)
  if name in vit.VARIANTS:
    options = given(
      "model",
      width="width",
      depth="depth",
      num_heads="heads",
      patch_size="patch_size",
      image_size="image_size",
      drop_path="drop_path",
      registers="registers",
      layer_scale="layer_scale",
      norm_eps="norm_eps",
      position_offset="position_offset",
      attention="attention",
      scan="scan",
      remat="remat",
    )
    _check_attention(options.get("attention", "auto"), dtype)
    options |= given("mesh", fsdp="fsdp")
    # 0 switches LayerScale off: a factor that starts at 0 would kill the branch.
    options["layer_scale"] = options.get("layer_scale") or None
    backbone = vit.make(name, dtype=dtype, mask_token=mask_token, **options)
  elif name == "resnet8":
    backbone = resnet.ResNet8(dtype=dtype, **given("model", width="width"))
  else:
    options = given(
      "model",
      stem="stem",
      zero_init_residual="zero_init_residual",
      joint_norm="joint_norm",
      remat="remat",
    )
    _choice("model.stem", options.get("stem", "imagenet"), resnet.STEMS)
    backbone = resnet.ResNet(*resnet.VARIANTS[name], dtype=dtype, **options)

  options = given(
    "head",
    layers="layers",
    hidden="hidden",
    bottleneck="bottleneck",
    norm="norm",
    norm_output="norm_output",
    activation="activation",
    bias="bias",
    kernel_init="init",
    l2="l2",
  )
  options |= given("model", joint_norm="joint_norm") | given("mesh", fsdp="fsdp")
  if options.get("fsdp") and name not in vit.VARIANTS:
    raise errors.UserError(
      f"mesh.fsdp=True splits transformers, not model.name={name!r}: set mesh.fsdp=False"
    )
  _choice("head.norm", options.get("norm", "none"), ("none", "batch"))
  _choice("head.activation", options.get("activation", "gelu"), heads.ACTIVATIONS)
  _choice("head.init", options.get("kernel_init", "normal"), heads.INITS)
  if options.get("layers", 1) < 1:
    raise errors.UserError(f"head.layers={options['layers']} must be at least 1")
  encoder = Encoder(backbone, heads.Projector(dtype=dtype, **options))
  if mask_token and (name not in vit.VARIANTS or has_batch_norm(encoder)):
    raise errors.UserError(
      f"masked patches need a transformer and a head without batch norm, not model.name={name!r} "
      f"with head.norm={encoder.head.norm!r} and head.norm_output={encoder.head.norm_output}: "
      "set model.name=vit_small, head.norm=none, head.norm_output=False"
    )
  return encoder


def chosen(config: ml_collections.ConfigDict) -> str:
  """What "auto" came to for a transformer on the devices of the mesh in use; "" for a ResNet."""
  if config.model.name not in vit.VARIANTS:
    return ""
  who = attention.choose(config.model.attention, _DTYPES[config.precision])
  looped = attention.on_tpu() if config.model.scan is None else config.model.scan
  return f"attention: {who}, blocks: {'in a loop' if looped else 'one by one'}"


def without_drop_path(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy of the config whose encoder never drops a branch: that of a teacher."""
  config = config.copy_and_resolve_references()
  config.model.drop_path = 0.0
  return config


def for_evaluation(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy of the config for an encoder that is only evaluated, on any machine.

  Without drop path; without recomputed blocks, whose outputs `features` could not see; with
  attention by XLA, which every backend has.
  """
  config = without_drop_path(config)
  config.model.update({"remat": False, "attention": "xla"})
  return config


def init(
  encoder: Encoder, key: jax.Array, image_size: sizes.Size, channels: int = 3
) -> tuple[PyTree, PyTree]:
  """Fresh variables; traceable.

  Args:
    encoder: from `build`.
    key: random key.
    image_size: side, or (height, width), of the images that will be embedded, in pixels; only
      checked, since no parameter depends on it (the position embedding is laid out for
      `model.image_size`).
    channels: C of these images, which the first layer is made for.

  Returns:
    (params, batch_stats), each {"backbone": ..., "head": ...} float32; batch_stats lacks
    a part without batch norm, so it is {} for an encoder without any.
  """
  key_backbone, key_head = jax.random.split(key)
  variables = {
    "backbone": encoder.backbone.init(
      key_backbone, jnp.zeros((1, *sizes.pair(image_size), channels))
    ),
    "head": encoder.head.init(key_head, jnp.zeros((1, feature_dim(encoder)))),
  }
  params = {part: value["params"] for part, value in variables.items()}
  stats = {p: value["batch_stats"] for p, value in variables.items() if "batch_stats" in value}
  return params, stats


def embed(
  encoder: Encoder,
  params: PyTree,
  batch_stats: PyTree,
  views: dict[str, jax.Array],
  *,
  train: bool,
  key: jax.Array | None = None,
  accum_steps: int = 1,
  patches: bool = False,
) -> tuple[Embedded, PyTree]:
  """Embeds all views of a batch: a ResNet once a resolution, a transformer and the head once.

  Args:
    encoder: from `build`.
    params: {"backbone", "head"}.
    batch_stats: running statistics of batch norm, as `init` returns them.
    views: {"global": [B, G, S, S, C], optional "local": [B, L, s, s, C]}, normalised; optional
      "mask": bool [B, G, T], the patches of the global views that the mask token replaces, and
      "keep": int32 [B, G, T'], those that a transformer sees at all; with `patches` also
      "hidden": int32 [B, G, M], those whose tokens pass the head.
    train: whether drop path acts and batch norm uses (and moves) the batch's statistics.
    key: of drop path; may be None where the rate is 0 or `train` is False.
    accum_steps: microbatches the forward is cut into. Each holds every accum_steps-th image,
      so that it stays spread over the devices, and is recomputed in the backward pass.
    patches: embed the patch tokens of the global views too, through the same head.

  Returns:
    What the views became, and batch_stats, moved if `train`.

  Raises:
    UserError: accum_steps > 1 with batch norm, or accum_steps does not divide B.
  """
  if accum_steps == 1:
    return _forward(encoder, params, batch_stats, views, key, train, patches)
  if has_batch_norm(encoder):
    raise errors.UserError(
      f"accum_steps={accum_steps} would give batch norm the statistics of a microbatch; set "
      "accum_steps=1, or use a model without batch norm and head.norm='none'"
    )
  batch = views["global"].shape[0]
  if batch % accum_steps:
    raise errors.UserError(
      f"accum_steps={accum_steps} does not divide the batch of {batch} images; "
      "choose a divisor of batch_size"
    )

  def split(x):  # [B, ...] -> [accum_steps, B / accum_steps, ...]
    return x.reshape(batch // accum_steps, accum_steps, *x.shape[1:]).swapaxes(0, 1)

  @jax.checkpoint
  def forward(microbatch):
    index, micro_views = microbatch
    micro_key = None if key is None else jax.random.fold_in(key, index)
    return _forward(encoder, params, batch_stats, micro_views, micro_key, train, patches)[0]

  def merge(z):
    return z.swapaxes(0, 1).reshape(batch, *z.shape[2:])

  embedded = jax.lax.map(forward, (jnp.arange(accum_steps), jax.tree.map(split, views)))
  return jax.tree.map(merge, embedded), batch_stats


def features(encoder: Encoder, params: PyTree, batch_stats: PyTree, images: jax.Array) -> jax.Array:
  """Backbone features in evaluation mode: images [B, S, S, C] normalised -> [B, F] float32."""
  return _apply(encoder, "backbone", params, batch_stats, images)[0]


def feature_dim(encoder: Encoder) -> int:
  """F, the dimension of the backbone's features."""
  return encoder.backbone.feature_dim


def has_batch_norm(encoder: Encoder) -> bool:
  """Whether any part of the encoder normalises over the batch."""
  head = encoder.head
  head_has = head.norm_output or (head.norm == "batch" and head.layers > 1)
  return isinstance(encoder.backbone, resnet.ResNet) or head_has


def _forward(encoder, params, batch_stats, views, key, train, patches):
  """`embed` without microbatches."""
  of_global = {}
  for name in ("mask", "keep"):
    if name in views:
      of_global[name] = views[name].reshape(-1, views[name].shape[-1])
  if patches:
    of_global["patches"] = True
  names = [name for name in ("global", "local") if name in views]
  counts = [views[name].shape[:2] for name in names]  # B, views of this size
  flat = [views[name].reshape(-1, *views[name].shape[2:]) for name in names]
  backbone = encoder, "backbone", params
  if isinstance(encoder.backbone, vit.ViT):
    images = tuple(flat)
    found, batch_stats = _apply(*backbone, batch_stats, images, train=train, key=key, **of_global)
  else:  # batch norm is over the images of one size, one after the other
    found = []
    for x, (_, num_views) in zip(flat, counts, strict=True):
      y, batch_stats = _apply(*backbone, batch_stats, x, views=num_views, train=train)
      found.append(y)
  tokens = []
  if patches:
    (y, t), *others = found
    if "hidden" in views:
      t = jnp.take_along_axis(t, views["hidden"].reshape(len(t), -1, 1), axis=1)
    tokens = [t.reshape(counts[0][0], -1, t.shape[-1])]  # [B, G T, F]
    found = [y, *others]
  outputs = [y.reshape(*count, -1) for y, count in zip(found, counts, strict=True)]
  # Joined along the second axis, where the devices' shares need not move.
  y = jnp.concatenate(outputs, axis=1)
  x = jnp.concatenate([y, *tokens], axis=1)
  batch, num_rows, dim = x.shape
  z, batch_stats = _apply(
    encoder,
    "head",
    params,
    batch_stats,
    x.reshape(batch * num_rows, dim),
    views=num_rows,
    train=train,
  )
  z = z.reshape(batch, num_rows, -1)
  if not patches:
    return Embedded(z, y), batch_stats
  num_views, num_global = y.shape[1], views["global"].shape[1]
  of_patches = z[:, num_views:].reshape(batch, num_global, -1, z.shape[2])
  return Embedded(z[:, :num_views], y, of_patches), batch_stats


def _apply(encoder, part, params, batch_stats, x, views=1, train=False, key=None, **options):
  """Runs one part; its new running statistics replace the old ones in `batch_stats`."""
  variables = {"params": params[part], "batch_stats": batch_stats.get(part, {})}
  y, updated = getattr(encoder, part).apply(
    variables,
    x,
    views=views,
    train=train,
    rngs=None if key is None else {"drop_path": key},
    mutable=["batch_stats"] if train else [],
    **options,
  )
  if updated.get("batch_stats"):
    batch_stats = {**batch_stats, part: updated["batch_stats"]}
  return y, batch_stats


def _check_attention(name: str, dtype) -> None:
  _choice("model.attention", name, attention.IMPLEMENTATIONS)
  if name == "cudnn" and (dtype != jnp.bfloat16 or jax.default_backend() != "gpu"):
    raise errors.UserError(
      f"model.attention=cudnn needs an NVIDIA GPU and precision=bfloat16, not "
      f"{jax.default_backend()} and {jnp.dtype(dtype).name}: set model.attention=auto"
    )


def _choice(field: str, value: str, available) -> str:
  if value not in available:
    raise errors.UserError(f"{field}={value!r} is unknown; available: {', '.join(available)}")
  return value
