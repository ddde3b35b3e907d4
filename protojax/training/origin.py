"""The encoder that a run starts from, `config.init_from`: the settings that belong to its weights.

Weights of other widths do not fit, and those of other attention heads, say, fit and mean nothing.
A command line that names an encoder takes its settings over; where a config contradicts them it is
refused with all the settings that it needs.
"""

import pathlib
import shlex
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections
from absl import logging

from protojax import config as configs
from protojax import errors, sizes
from protojax.models import vit
from protojax.training import export

_SHAPE = ("width", "depth", "heads")  # of a transformer, which its name may leave to be said
_TRANSFORMER = ("patch_size", "registers", "norm_eps", "position_offset")
_HEAD = ("layers", "hidden", "bottleneck", "norm", "norm_output", "activation", "bias")


def path_of(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Where the weights lie: `config.init_from`, or exported/ in it where that is a run's workdir."""
  path = pathlib.Path(config.init_from).expanduser()
  return path / "exported" if (path / "exported").is_dir() else path


def describe(config: ml_collections.ConfigDict) -> dict:
  """The info of the weights at `path_of`, see `export.read`.

  Raises:
    UserError: if there are none.
  """
  path, given = path_of(config), f"config.init_from={config.init_from}"
  to_do = "give the workdir of a run, its exported/, or a folder that protojax convert wrote"
  if not path.exists():
    raise errors.UserError(f"{given}: there is no {path.absolute()}: {to_do}")
  if path.is_dir() and not (path / "encoder.safetensors").is_file():
    if other := export.of_other_library(path):
      raise errors.UserError(f"{given}: {other}")
    if (path / "env.json").is_file():
      to_do = "this run has saved nothing yet: wait for its first checkpoint, or give another"
    raise errors.UserError(
      f"{given}: neither encoder.safetensors nor exported/ is in {path.absolute()}: {to_do}"
    )
  return export.describe(path)


def _described(info: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """What exported weights say of themselves, as a config; defaults where they say nothing."""
  sections = {name: info[name] for name in ("model", "head") if name in info}
  image = info.get("image", {})
  sections["augment"] = {k: image[k] for k in ("global_size", "mean", "std") if k in image}
  sections["data"] = {"channels": image.get("channels", 3)}
  return configs.restored(sections)


def _settings(config: ml_collections.ConfigDict, *, head: bool) -> dict[str, Any]:
  """{"model.depth": 12, ...} that make an encoder the one it is, numbers instead of None."""
  model = config.model
  out = {"name": model.name}
  if model.name in vit.VARIANTS:
    usual = dict(zip(_SHAPE, vit.VARIANTS[model.name], strict=True))
    out |= {key: model[key] or usual[key] for key in _SHAPE}
    out |= {key: model[key] for key in _TRANSFORMER}
    size = sizes.pair(model.image_size or config.augment.global_size)
    out["image_size"] = sizes.checked("model.image_size", size)
    out["layer_scale"] = model.layer_scale or None
  else:
    out |= {"width": model.width} if model.name == "resnet8" else {"stem": model.stem}
  found = {f"model.{key}": value for key, value in out.items()}
  return found | {f"head.{key}": config.head[key] for key in _HEAD if head}


def differences(config: ml_collections.ConfigDict, info: Mapping[str, Any]) -> dict[str, Any]:
  """The settings in which a config has another encoder than exported weights, with theirs.

  Args:
    config: of a run, resolved or not.
    info: of the weights, from `export.read`.

  Returns:
    {"model.depth": 12, ...}, those of the head only where the weights hold one.
  """
  head = "head" not in info.get("lacks", ())
  here, there = _settings(config, head=head), _settings(_described(info), head=head)
  wrong = {key: value for key, value in there.items() if here.get(key) != value}
  if here.get("model.layer_scale") and there.get("model.layer_scale"):
    wrong.pop("model.layer_scale", None)  # what the factors start at: they come with the weights
  transformers = {config.model.name, there["model.name"]} <= vit.VARIANTS.keys()
  if transformers and not wrong.keys() & {f"model.{key}" for key in _SHAPE}:
    wrong.pop("model.name", None)
  return wrong


def take_over(config: ml_collections.ConfigDict, typed: Collection[str]) -> None:
  """Gives a config, in place, the settings of the encoder it starts from; the log says which.

  Those of the encoder, mean and standard deviation of its images, and view sizes that its patches
  divide.

  Args:
    config: of a recipe, with `init_from`, not resolved.
    typed: settings that the user gave, which stay.

  Raises:
    UserError: if there are no such weights.
  """
  info = describe(config)
  there = _described(info)
  changes = differences(config, info)
  if there.data.channels == config.data.channels:
    for key in configs.IMAGENET:
      if key in info.get("image", {}) and there.augment[key] != config.augment[key]:
        changes[f"augment.{key}"] = there.augment[key]
  if there.model.name in vit.VARIANTS:
    for key in ("global_size", "local_size"):
      size = sizes.checked(f"augment.{key}", config.augment[key])
      if (nearest := sizes.nearest(size, there.model.patch_size)) != size:
        changes[f"augment.{key}"] = nearest
  changes = {key: value for key, value in changes.items() if key not in typed}
  with config.ignore_type():
    for key, value in changes.items():
      section, name = key.split(".")
      config[section][name] = value
  if changes:
    said = ", ".join(f"{key}={value}" for key, value in changes.items())
    logging.info("config.init_from=%s brings its encoder along: %s", config.init_from, said)


def require_same(config: ml_collections.ConfigDict) -> None:
  """Refuses a config with another encoder than that of the weights it starts from.

  Args:
    config: resolved, with `init_from`.

  Raises:
    UserError: one line with every setting it needs, or if there are no such weights.
  """
  info = describe(config)
  if wrong := differences(config, info):
    needed = " ".join(f"config.{key}={shlex.quote(str(value))}" for key, value in wrong.items())
    without = " (protojax convert --no_head leaves the head out, so that a run has its own)"
    raise errors.UserError(
      f"config.init_from={config.init_from} is another encoder than this run's"
      + without * ("source" in info and any(key.startswith("head.") for key in wrong))
      + f"; give {needed}"
    )
