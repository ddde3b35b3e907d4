"""python -m protojax.main --config=configs/NAME.py --workdir=FOLDER [--config.KEY=VALUE ...]"""

import importlib.util
import pathlib
import sys

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from protojax import cli, errors
from protojax import config as configs

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, NAME.py or NAME.py:debug.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; resumed if it holds one.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "host:port of process 0, where no cluster is detected."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator_address.")


def load(path: str) -> ml_collections.ConfigDict:
  """The config of "file.py" or "file.py:argument".

  Raises:
    UserError: if there is no such file or no `get_config` in it.
  """
  name, _, argument = path.partition(":")
  if not pathlib.Path(name).is_file():
    near = ", ".join(sorted(str(p) for p in pathlib.Path("configs").glob("*.py")))
    raise errors.UserError(
      f"--config={path}: no file {name!r} here" + (f"; there are {near}" if near else "")
    )
  # Recipes share code as `from configs import common`, from wherever the program is started.
  clone = str(pathlib.Path(name).resolve().parent.parent)
  if clone not in sys.path:
    sys.path.append(clone)
  spec = importlib.util.spec_from_file_location("protojax_recipe", name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"--config={path}: {name} defines no get_config(mode)")
  return module.get_config(argument) if argument else module.get_config()


def parse(argv: list[str]) -> list[str]:
  """absl's parser, with one line for a mistake instead of its traceback.

  Raises:
    UserError: for a missing or unknown flag, an unknown config key (with the nearest one) or a
      value of the wrong type.
  """
  if any(a in ("--help", "--helpfull", "-h", "--helpshort") for a in argv):
    return flags.FLAGS(argv)
  given = _given(argv)
  for name in ("config", "workdir"):
    if not given.get(name):
      unknown = (key for key in given if key not in flags.FLAGS and not key.startswith("config."))
      near = cli.nearest(name, unknown)
      if near:
        raise errors.UserError(f"there is no flag --{near}: did you mean --{name}?")
      raise errors.UserError(
        f"--{name} is missing: python -m protojax.main --config=configs/quickstart.py "
        "--workdir=runs/quickstart"
      )
  config = load(given["config"])
  overrides = [k.removeprefix("config.") for k in given if k.startswith("config.")]
  before, name = config.method.name, given.get("config.method.name", config.method.name)
  chosen = [k.removeprefix("method.") for k in overrides if k.startswith("method.")]
  if name != before:
    configs.switch_method(config, name)
  configs.check_keys(overrides, config)
  try:
    if name == before:
      return flags.FLAGS(argv)
    return _parse_switched(argv, given, before, chosen)
  except errors.UserError:
    raise
  except flags.UnrecognizedFlagError as error:
    near = cli.nearest(error.flagname, flags.FLAGS)
    hint = f"did you mean --{near}?" if near else "--help shows what there is"
    raise errors.UserError(f"there is no flag --{error.flagname}: {hint}") from None
  except (flags.Error, TypeError, ValueError, AttributeError, KeyError) as error:
    raise errors.UserError(" ".join(str(error).split())) from None


def _parse_switched(
  argv: list[str], given: dict[str, str], before: str, chosen: list[str]
) -> list[str]:
  """Parses a command line that names another method than the recipe's, `before`.

  The recipe's config has no flags for settings that only the new method has: they are set on their
  own, after the switch.
  """
  of_recipe = load(given["config"]).method
  new = [k for k in chosen if k not in of_recipe]
  command, sys.argv = sys.argv, _without(argv, [f"config.method.{k}" for k in new])
  try:  # config_flags looks there for the flags of a config
    rest = flags.FLAGS(sys.argv)
  finally:
    sys.argv = command
  config = _CONFIG.value
  name, config.method.name = config.method.name, before
  configs.switch_method(config, name, chosen=[k for k in chosen if k not in (*new, "name")])
  own = ["main", *(f"--method.{k}={given[f'config.method.{k}']}" for k in new)]
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict("method", config.method, flag_values=values, sys_argv=own)
  values(own)
  return rest


def _given(argv: list[str]) -> dict[str, str]:
  """{name: value} of the flags --name=value and --name value."""
  given = {}
  for i, argument in enumerate(argv[1:], 1):
    if argument.startswith("-"):
      key, separator, value = argument.lstrip("-").partition("=")
      given[key] = value if separator else (argv[i + 1] if i + 1 < len(argv) else "")
  return given


def _without(argv: list[str], names: list[str]) -> list[str]:
  """The command line without some flags and their values."""
  kept, skip = argv[:1], False
  for argument in argv[1:]:
    name, separator, _ = argument.lstrip("-").partition("=")
    if skip:
      skip = False
    elif argument.startswith("-") and name in names:
      skip = not separator
    else:
      kept.append(argument)
  return kept


def _connect() -> None:
  """Joins the cluster that the flags or the environment name; one process is fine too."""
  import jax

  if _COORDINATOR.value:
    if _NUM_PROCESSES.value is None or _PROCESS_ID.value is None:
      raise errors.UserError("--coordinator_address needs --num_processes and --process_id too")
    jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  else:
    try:
      jax.distributed.initialize()
    except ValueError:  # no cluster: a single process
      pass
  if jax.process_count() > 1:
    logging.info(
      "process %d of %d, %d local of %d devices (%s)",
      jax.process_index(),
      jax.process_count(),
      jax.local_device_count(),
      jax.device_count(),
      jax.devices()[0].device_kind,
    )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise errors.UserError(f"unexpected argument {argv[1]!r}: flags start with --")
  _connect()
  from protojax import api

  api.train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  app.run(lambda argv: cli.guarded(main, argv), flags_parser=lambda argv: cli.guarded(parse, argv))
