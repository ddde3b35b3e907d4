"""A recipe with the settings that were typed, --config.KEY=VALUE; wrong keys get the right one."""

import difflib
from collections.abc import Sequence

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from protojax import config as configs
from protojax import errors, recipes, trees

# What Python and absl say of a value that is no such thing.
_WANTED = {
  "invalid literal for int()": "a whole number, such as 100,",
  "could not convert string to float": "a number, such as 0.1,",
  "('Non-boolean argument": "True or False",
}

_LENGTHS = {  # where both are set the first is taken
  "optim.warmup_steps": "optim.warmup_epochs",
  "optim.freeze_prototypes_steps": "optim.freeze_prototypes_epochs",
  "optim.freeze_backbone_steps": "optim.freeze_backbone_epochs",
  "mixture.horizon_steps": "mixture.horizon_epochs",
  "mixture.anneal_steps": "mixture.anneal_share",
}
_ELSEWHERE = {  # what other programs call it, and the likelier of two
  "lr": "optim.lr",
  "batch": "batch_size",
  "epochs": "num_epochs",
  "learning_rate": "optim.lr",
  "optim.learning_rate": "optim.lr",
  "method.out_dim": "method.num_prototypes",
  "steps": "num_steps",
  "optim.wd": "optim.weight_decay",
  "wd": "optim.weight_decay",
}


def key_named(name: str, config: ml_collections.ConfigDict) -> str | None:
  """The one key that was surely meant by another name, or None.

  >>> config = configs.default("dino")
  >>> [key_named(name, config) for name in ("epochs", "method.teacher_momentum", "patch_size", "k")]
  ['num_epochs', 'teacher.momentum', 'model.patch_size', 'probe.k']

  Args:
    name: "lr", "teacher_momentum", "num_steps": what another program calls it, the key without its
      section, or with another one, or with "_" for its dot.
    config: whose keys there are.
  """
  keys, leaf = list(trees.flat(config)), name.rpartition(".")[2]
  if name in keys or name in _ELSEWHERE:
    return name if name in keys else _ELSEWHERE[name]
  whole = [key for key in keys if key.replace(".", "_") in (name.replace(".", "_"), leaf)]
  found = whole or [key for key in keys if key.rpartition(".")[2] == leaf]
  return found[0] if len(found) == 1 else None


def check_keys(overrides: Sequence[str], config: ml_collections.ConfigDict) -> None:
  """Refuses an override of a key that does not exist, naming the nearest one.

  Args:
    overrides: dotted keys, "model.depth".

  Raises:
    UserError: one line.
  """
  known = trees.flat(config)
  for key in overrides:
    if key not in known and not any(k.startswith(key + ".") for k in known):
      near = [named] if (named := key_named(key, config)) else []
      near = near or difflib.get_close_matches(key, known, 1, 0.4)
      hint = f"did you mean config.{near[0]}?" if near else "see protojax/config.py for all keys"
      raise errors.UserError(f"unknown config key config.{key}: {hint}")


def split(argv: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
  """([(key, value)] of the --config.KEY=VALUE and --config.KEY VALUE, all other arguments)."""
  changes, others, rest = [], [], list(argv)
  while rest:
    argument = rest.pop(0)
    if not argument.startswith("--config."):
      others.append(argument)
      continue
    key, separator, value = argument.removeprefix("--config.").partition("=")
    if not separator:  # a switch that is turned on may stand alone
      value = rest.pop(0) if rest and not rest[0].startswith("--") else None
    changes.append((key, value))
  return changes, others


def config(recipe: str, changes: list[tuple[str, str | None]]) -> ml_collections.ConfigDict:
  """The recipe with these settings, not resolved.

  Args:
    recipe: as `recipes.load` takes it.
    changes: of `split`.

  Raises:
    UserError: for an unknown recipe, an unknown key (with the nearest one) or a value of the wrong
      type.
  """
  config = recipes.load(recipe)
  given = dict(changes)
  if (name := given.get("method.name") or config.method.name) != config.method.name:
    configs.switch_method(config, name)
  check_keys(list(given), config)
  _change(config, changes)
  _take_own_images(config, recipe, given)
  _say_what_nothing_reads(config, given)
  # A length that is typed takes the place of the recipe's; two typed ones contradict each other.
  for one, other in (("num_steps", "num_epochs"), ("num_epochs", "num_steps")):
    if one in given and other not in given and config[one]:
      config[other] = 0
  lengths = trees.flat(config)
  for steps, epochs in _LENGTHS.items():
    if steps in given and epochs in given and lengths[steps] and lengths[epochs]:
      logging.warning(
        "config.%s=%g counts, config.%s=%g does not", steps, lengths[steps], epochs, lengths[epochs]
      )
    if epochs in given and steps not in given:  # the recipe's steps would be taken before it
      config.update_from_flattened_dict({steps: type(lengths[steps])(0)})
    elif steps in given and epochs not in given and not lengths[steps] and "optim." in steps:
      config.update_from_flattened_dict({epochs: 0.0})  # none is none, not the recipe's epochs
  warmup = config.optim.warmup_steps
  if "num_steps" in given and "optim.warmup_steps" not in given and 2 * warmup > config.num_steps:
    # Of another length; in so short a run the learning rate would hardly do anything but rise.
    config.optim.warmup_steps = max(1, config.num_steps // 10)
    logging.info("optim.warmup_steps %d -> %d", warmup, config.optim.warmup_steps)
  return config


def _say_what_nothing_reads(
  config: ml_collections.ConfigDict, given: dict[str, str | None]
) -> None:
  """Of a sweep over such a setting all runs would be the same."""
  prototypes = config.method.prototypes
  for section, unread, why in (
    ("mixture.", prototypes != "mixture", f"method.prototypes={prototypes!r} is no mixture"),
    ("augment.local_", not config.augment.num_local, "augment.num_local=0: there are none"),
  ):
    for key in given if unread else ():
      if key.startswith(section):
        logging.warning("config.%s changes nothing here: %s", key, why)


def _take_own_images(
  config: ml_collections.ConfigDict, recipe: str, given: dict[str, str | None]
) -> None:
  """Of NAME:debug, which is on digits: back to what NAME is on where its folder was typed."""
  name, _, mode = recipe.partition(":")
  if mode != "debug" or config.data.name != "digits" or "data.name" in given:
    return
  try:
    own = recipes.load(name).data.name
  except errors.UserError:  # a recipe that is nothing without a mode
    return
  if own != "digits" and "data.data_dir" in given:
    config.data.name = own
  elif own != "digits":
    logging.info(
      "%s is on the digits of scikit-learn; config.data.data_dir=FOLDER takes images of your own, "
      "data.name=%s",
      recipe,
      own,
    )


def _change(config: ml_collections.ConfigDict, changes: list[tuple[str, str | None]]) -> None:
  """Sets what was typed, in place, as the type that is there; None where that is the default."""
  usual = trees.flat(configs.default(config.method.name))
  none = [k for k, value in changes if value == "None" and usual.get(k, "") is None]
  config.update_from_flattened_dict(dict.fromkeys(none))
  rest = [(k, value) for k, value in changes if k not in none]
  own = ["train", *(f"--config.{k}" + (f"={v}" if v is not None else "") for k, v in rest)]
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=own)
  try:
    values(own)
  except (flags.Error, TypeError, ValueError, AttributeError, KeyError) as error:
    said = " ".join(str(error).split())
    for words, wanted in _WANTED.items():
      flag, found, _ = said.removeprefix("flag ").partition(f": {words}")
      if found:
        said = f"{flag}: {wanted} is wanted"
    raise errors.UserError(said) from None
