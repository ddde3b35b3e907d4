"""What a recipe comes to: epochs become steps, what follows from other settings is filled in."""

import math

import ml_collections
from absl import logging

from protojax import config as configs
from protojax import errors, methods, sizes, trees
from protojax.models import vit


def resolve(config: ml_collections.ConfigDict, num_records: int) -> ml_collections.ConfigDict:
  """Turns epochs into steps for a source of `num_records` images; the result is what a run is.

  >>> config = configs.default("dino")
  >>> config.update({"batch_size": 50, "num_epochs": 3.0})
  >>> resolve(config, 1_000).num_steps
  60

  Args:
    config: of a recipe or `config.default`; it stays as it is.
    num_records: images of the source to train on.

  Returns:
    A copy in which nothing depends on another setting any more; resolving it again changes nothing.

  Raises:
    UserError: if the length of the run is given twice or not at all, or a batch is larger than
      the source.
  """
  config = config.copy_and_resolve_references()
  check(config)
  with config.unlocked(), config.ignore_type():
    _resolve_channels(config)
    # What --config.method.name=... brought in after the recipe was made.
    for key, value in methods.load(config.method.name).OPTIONS.items():
      if key not in config.method:
        config.method[key] = value
    if config.data.num_records not in (0, num_records):
      raise errors.UserError(
        f"data.num_records={config.data.num_records} but data.name={config.data.name!r} has "
        f"{num_records} images: leave data.num_records at 0"
      )
    config.data.num_records = num_records
    if config.batch_size > num_records:
      raise errors.UserError(
        f"batch_size={config.batch_size} is more than the {num_records} images of "
        f"data.name={config.data.name!r}: lower config.batch_size"
      )
    if not config.steps_per_epoch:
      config.steps_per_epoch = num_records // config.batch_size
    if bool(config.num_steps) == bool(config.num_epochs):
      raise errors.UserError(
        f"num_steps={config.num_steps} and num_epochs={config.num_epochs}: set exactly one, the "
        "other to 0"
      )
    if not config.num_steps:
      config.num_steps = math.ceil(config.num_epochs * config.steps_per_epoch)
    optim = config.optim
    if not optim.warmup_steps:
      # At most a tenth of the run, so that a short one learns at all.
      steps = round(optim.warmup_epochs * config.steps_per_epoch)
      optim.warmup_steps = min(steps, config.num_steps // 10)
    elif 2 * optim.warmup_steps > config.num_steps:
      logging.warning(
        "config.optim.warmup_steps=%d of %d steps: the learning rate %s; a tenth is %d",
        optim.warmup_steps,
        config.num_steps,
        "is still rising at the end"
        if optim.warmup_steps >= config.num_steps
        else "rises for more than half of the run",
        config.num_steps // 10,
      )
    if not optim.freeze_prototypes_steps:
      steps = round(optim.freeze_prototypes_epochs * config.steps_per_epoch)
      optim.freeze_prototypes_steps = min(steps, config.num_steps // 10)
    elif optim.freeze_prototypes_steps >= config.num_steps:
      if config.method.prototypes == "learned":
        logging.warning(
          "config.optim.freeze_prototypes_steps=%d of %d steps: learned prototypes never move",
          optim.freeze_prototypes_steps,
          config.num_steps,
        )
    if not optim.freeze_backbone_steps:
      optim.freeze_backbone_steps = round(optim.freeze_backbone_epochs * config.steps_per_epoch)
    if optim.freeze_backbone_steps and not config.init_from:
      logging.warning(
        "the backbone that stands still for %d steps is a random one: give its weights by "
        "--config.init_from=WEIGHTS, or set --config.optim.freeze_backbone_steps=0",
        optim.freeze_backbone_steps,
      )
    mixture = config.mixture
    if not mixture.horizon_steps:
      epochs = mixture.horizon_epochs * config.steps_per_epoch
      mixture.horizon_steps = float(epochs or 2 * config.num_steps)
    if (
      config.method.prototypes == "mixture"
      and mixture.window is None
      and max(mixture.horizon_steps, mixture.horizon_final or 0.0) < config.num_steps
    ):
      logging.warning(
        "config.mixture.horizon_steps=%g is less than the run of %d steps: prototypes on digits "
        "drew together then (docs/collapse.md); 0 takes twice the run",
        mixture.horizon_steps,
        config.num_steps,
      )
    if mixture.anneal_share and not mixture.anneal_steps:
      mixture.anneal_steps = max(1, round(mixture.anneal_share * config.num_steps))
    for section, key, default in (
      (config.probe, "name", config.data.name),
      (config.probe, "data_dir", config.data.data_dir),
      (config.model, "image_size", config.augment.global_size),
      (config.mixture, "horizon_final", config.mixture.horizon_steps),
      (config.mixture, "beta_final", config.mixture.beta),
    ):
      if section[key] is None:
        section[key] = default
    _resolve_sizes(config)
  return config


def _resolve_channels(config: ml_collections.ConfigDict) -> None:
  """Turns off what only colour has, and checks or clears what there is one of for each channel."""
  channels, views = config.data.channels, config.augment
  if channels < 1:
    raise errors.UserError(f"data.channels={channels} must be at least 1 (3: colour)")
  if channels != 3:
    colour = [key for key in ("saturation", "hue", "gray_prob") if views[key]]
    if colour:
      logging.info(
        "config.augment.%s: off, images of data.channels=%d have no colour",
        " and config.augment.".join(colour),
        channels,
      )
      views.update(dict.fromkeys(colour, 0.0))
  for key in configs.IMAGENET:
    if to_be_measured(config, key):
      views[key] = None
    value = views[key]
    if value is not None and len(value) != channels:
      raise errors.UserError(
        f"augment.{key}={tuple(value)} has {len(value)} numbers and data.channels={channels}: give "
        f"one for each channel, or None to have it measured"
      )


def to_be_measured(config: ml_collections.ConfigDict, key: str) -> bool:
  """Whether `augment.mean` or `augment.std` is not given: None, or ImageNet's but no colour."""
  value, channels = config.augment[key], config.data.channels
  return value in (None, (None,)) or (channels != 3 and value == configs.IMAGENET[key])


def _resolve_sizes(config: ml_collections.ConfigDict) -> None:
  """Refuses sizes that contradict each other, each in one line."""
  views, model = config.augment, config.model
  used = [(views, "augment", "global_size")]
  used += [(views, "augment", "local_size")] * bool(views.num_local > 0)
  used += [(model, "model", "image_size")] * (model.name in vit.VARIANTS)
  for section, name, key in used:
    section[key] = size = sizes.checked(f"{name}.{key}", section[key])
    patch = model.patch_size
    if model.name in vit.VARIANTS and sizes.nearest(size, patch) != size:
      raise errors.UserError(
        f"{name}.{key}={size} is no multiple of model.patch_size={patch}: the nearest is "
        f"{sizes.text(sizes.nearest(size, patch))}"
      )
  large = sizes.pair(views.global_size)
  small = sizes.pair(views.local_size)
  if views.num_local > 0 and (small[0] > large[0] or small[1] > large[1]):
    raise errors.UserError(
      f"augment.local_size={views.local_size} is larger than augment.global_size="
      f"{views.global_size}: local views are the small ones; set augment.num_local=0 for none"
    )
  if config.data.image_size < max(large):
    logging.warning(
      "config.data.image_size=%d is less than config.augment.global_size=%s: every view is an "
      "enlarged one; unless the images themselves are that small, set it to %d or more",
      config.data.image_size,
      sizes.text(views.global_size),
      max(large),
    )


_RANGES = (  # what may lie from where to where
  ("seed", -(2**31), 2**31 - 1),  # an int32 where JAX makes a key of it
  ("teacher.momentum", 0, 1),
  ("mixture.horizon_steps", 0, math.inf),
  ("mixture.horizon_epochs", 0, math.inf),
  ("mixture.anneal_share", 0, 1),
  ("mixture.anneal_steps", 0, math.inf),
)


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses numbers that no run can have, before its images are looked for.

  Args:
    config: of a recipe, resolved or not.

  Raises:
    UserError: for a number that is not finite or out of its range, a count below one, a negative
      setting of `optim`, rules that are no pairs, or a run without a length.
  """
  known = trees.flat(config)
  for key, value in known.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise errors.UserError(f"{key}={value} must be a finite number: set config.{key}")
    if key.startswith("optim.") and isinstance(value, int | float) and value < 0:
      raise errors.UserError(f"{key}={value} must not be negative: set config.{key}")
    if key.startswith("augment.") and isinstance(value, tuple):
      measured = key in ("augment.mean", "augment.std") and value == (None,)  # as it is typed
      if not measured and not all(isinstance(item, int | float) for item in value):
        raise errors.UserError(f"{key}={value} must be numbers: set config.{key}")
  for key, low, high in _RANGES:
    if known[key] is not None and not low <= known[key] <= high:
      range_ = f"{low} to {high}" if math.isfinite(high) else f"at least {low}"
      raise errors.UserError(f"{key}={known[key]} must be {range_}: set config.{key}")
  for key in ("mixture.horizon_final", "mixture.beta_final"):
    if known[key] is not None and not known[key] > 0:
      raise errors.UserError(f"{key}={known[key]} must be above 0: set config.{key}")
  for rule in config.mesh.rules:
    if not isinstance(rule, tuple) or len(rule) != 2 or not all(isinstance(r, str) for r in rule):
      raise errors.UserError(
        f"mesh.rules={config.mesh.rules} must be pairs such as (('encoder/', 'fsdp'), ('.*', "
        "'replicate')): set config.mesh.rules"
      )
  for key in (
    "batch_size",
    "accum_steps",
    "log_every",
    "save_every",
    "eval_every",
    "monitor.every",
    "data.image_size",
    "model.patch_size",
    "head.bottleneck",
    "probe.k",
  ):
    if known[key] < 1:
      raise errors.UserError(f"{key}={known[key]} must be at least 1: set config.{key}")
  if (config.data.num_workers or 0) < 0:
    raise errors.UserError(
      f"data.num_workers={config.data.num_workers} must not be negative (0: threads; None: chosen)"
    )
  if config.method.num_prototypes < 0:
    raise errors.UserError(
      f"method.num_prototypes={config.method.num_prototypes} must not be negative: set "
      "config.method.num_prototypes"
    )
  if config.monitor.images < 2:
    raise errors.UserError(
      f"monitor.images={config.monitor.images}: the collapse measures need at least 2 images"
    )
  if (config.monitor.prototypes or 0) < 0:
    raise errors.UserError(
      f"monitor.prototypes={config.monitor.prototypes} must not be negative (0: all)"
    )
  if min(config.num_steps, config.num_epochs, config.steps_per_epoch) < 0:
    raise errors.UserError("num_steps, num_epochs and steps_per_epoch must not be negative")
  if not config.num_steps and not config.num_epochs:
    raise errors.UserError("num_steps=0 and num_epochs=0: set exactly one, the other to 0")
