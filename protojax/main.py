"""Trains: protojax train --config=RECIPE --workdir=FOLDER [--config.KEY=VALUE ...]"""

import argparse
import faulthandler
import os
import pathlib
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from protojax import cli, errors, methods, recipes, trees
from protojax import config as configs

_DESCRIPTION = """\
Trains a run, or goes on with the one that the workdir holds.

  protojax train --config=quickstart --workdir=runs/quickstart
  protojax train --config=gmm_photos --workdir=runs/own --config.data.data_dir=IMAGES \\
    --config.num_steps=20000 --config.augment.mean='(.5, .5, .5)'

Every setting of a recipe can be changed by --config.KEY=VALUE. All of them, with the values that a
run would have:

  protojax train --config=gmm_vit_s --help

gmm_photos is for a folder of some hundred or thousand images, gmm_vit_s for as many as ImageNet's.
NAME:debug is the recipe NAME as a minute's run on a CPU, on the digits of scikit-learn or what
--config.data.name and --config.data.data_dir say. A recipe of your own is a file:
--config=path/to/file.py. `python -m protojax.main` is the same program."""
_EXAMPLE = "protojax train --config=quickstart --workdir=runs/quickstart"


def _parser(list_recipes: bool) -> argparse.ArgumentParser:
  listed = [
    textwrap.fill(f"  {name:<25}{recipes.title(name)}", 100, subsequent_indent=" " * 27)
    for name in (recipes.names() if list_recipes else ())
  ]
  parser = cli.parser("train", _DESCRIPTION, epilog="\n".join(["recipes:", *listed]))
  parser.usage = "protojax train --config=RECIPE --workdir=FOLDER [--config.KEY=VALUE ...]"
  parser.add_argument("--config", metavar="RECIPE", help="NAME, FILE.py, NAME:debug")
  parser.add_argument("--workdir", help="folder of this run; resumed if it holds one")
  parser.add_argument("--config.KEY", metavar="VALUE", help="changes a setting of the recipe")
  parser.add_argument(
    "--coordinator_address", help="host:port of process 0, where no cluster is detected"
  )
  parser.add_argument("--num_processes", type=int, help="with --coordinator_address")
  parser.add_argument("--process_id", type=int, help="with --coordinator_address")
  return parser


def parse(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict, argparse.Namespace]:
  """(the recipe with the settings that were typed, the other flags).

  Args:
    argv: the command line after the name of the program.

  Raises:
    UserError: for a missing or unknown flag, an unknown config key (with the nearest one) or a
      value of the wrong type.
    SystemExit: after --help.
  """
  typed, others = _split(argv)
  help_wanted = any(a in ("--help", "-h") for a in others)
  of_recipe = help_wanted and any(a.startswith("--config") for a in others)
  if of_recipe:
    others = [a for a in others if a not in ("--help", "-h")]
  args = _parser(list_recipes=help_wanted).parse_args(others)
  for name in ("config", *["workdir"] * (not of_recipe)):
    if not getattr(args, name):
      raise errors.UserError(
        f"--{name} is missing: {_EXAMPLE}; protojax train --help lists recipes and settings"
      )
  config = recipes.load(args.config)
  given = dict(typed)
  if (name := given.get("method.name") or config.method.name) != config.method.name:
    configs.switch_method(config, name)
  configs.check_keys(list(given), config)
  _change(config, typed)
  # A length that is typed takes the place of the recipe's; two typed ones contradict each other.
  for one, other in (("num_steps", "num_epochs"), ("num_epochs", "num_steps")):
    if one in given and other not in given and config[one]:
      config[other] = 0
  warmup = config.optim.warmup_steps
  if "num_steps" in given and "optim.warmup_steps" not in given and 2 * warmup > config.num_steps:
    # Of another length; in so short a run the learning rate would hardly do anything but rise.
    config.optim.warmup_steps = max(1, config.num_steps // 10)
    logging.info("optim.warmup_steps %d -> %d", warmup, config.optim.warmup_steps)
  if config.data.name == "digits" and "data.data_dir" in given and "data.name" not in given:
    logging.warning(
      "config.data.data_dir=%s is not looked at: %s is on the digits of scikit-learn; add "
      "--config.data.name=folder, or what else is there",
      config.data.data_dir,
      args.config,
    )
  if of_recipe:
    print(settings(config))
    raise SystemExit(0)
  return config, args


def _split(argv: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
  """([(key, value)] of the --config.KEY=VALUE and --config.KEY VALUE, all other arguments)."""
  typed, others, rest = [], [], list(argv)
  while rest:
    argument = rest.pop(0)
    if not argument.startswith("--config."):
      others.append(argument)
      continue
    key, separator, value = argument.removeprefix("--config.").partition("=")
    if not separator:  # a switch that is turned on may stand alone
      value = rest.pop(0) if rest and not rest[0].startswith("--") else None
    typed.append((key, value))
  return typed, others


def _change(config: ml_collections.ConfigDict, typed: list[tuple[str, str | None]]) -> None:
  """Sets what was typed, in place, as the type that is there; None where that is the default."""
  usual = trees.flat(configs.default(config.method.name))
  none = [k for k, value in typed if value == "None" and usual.get(k, "") is None]
  config.update_from_flattened_dict(dict.fromkeys(none))
  rest = [(k, value) for k, value in typed if k not in none]
  own = ["train", *(f"--config.{k}" + (f"={v}" if v is not None else "") for k, v in rest)]
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=own)
  try:
    values(own)
  except (flags.Error, TypeError, ValueError, AttributeError, KeyError) as error:
    raise errors.UserError(" ".join(str(error).split())) from None


def settings(config: ml_collections.ConfigDict) -> str:
  """Every setting of a config as the flag that would set it, with what its source says of it."""
  known = trees.flat(config)
  usual = trees.flat(configs.default(config.method.name))
  said = _remarks(pathlib.Path(configs.__file__).read_text(encoding="utf-8"))
  options = pathlib.Path(methods.load(config.method.name).__file__).read_text(encoding="utf-8")
  said |= _remarks(options.partition("\nOPTIONS = {")[2].partition("\n}")[0], "method.")
  lines = []
  for key, value in sorted(known.items(), key=lambda item: "." in item[0]):
    section = key.rpartition(".")[0]
    if section and not (lines and lines[-1].startswith(f"  --config.{section}.")):
      lines += ["", *textwrap.wrap(said.get(section, ""), 96, initial_indent="  # ")]
    remark = said.get(key, "")
    if key in usual and value != usual[key]:
      remark = (remark.rstrip(".") + "; " if remark else "") + f"default: {usual[key]}"
    line = f"  --config.{key}={shlex.quote(str(value))}"
    if len(line) + len(remark) + 4 > 100:
      lines += textwrap.wrap(remark, 96, initial_indent="  # ", subsequent_indent="  # ")
      remark = ""
    lines.append(f"{line}  # {remark}" if remark else line)
  return "\n".join(lines)


def _remarks(source: str, section: str = "") -> dict[str, str]:
  """{"optim.lr": "per 256 images"} of the comments beside and above the keys in `config.py`."""
  found, above = {}, []
  for line in source.splitlines():
    code, _, remark = (part.strip() for part in line.partition("# "))
    opened = re.match(r"config\.(\w+) = ml_collections\.ConfigDict\(", code)
    key = re.match(r'config\.(\w+) = |"(\w+)": ', code)
    if opened:
      section = f"{opened[1]}."
    elif key and (text := " ".join([*above, remark]).strip()):
      found[section + (key[1] or key[2])] = text
    elif code == "{" and remark:
      found[section.rstrip(".")] = remark
    above = [*above, remark] if remark and not code else []
  return found


def _alone_under_slurm() -> bool:
  """Whether this is a Slurm step of one task: JAX would give it the one GPU of its local rank."""
  return "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS") == "1"


def _connect(args: argparse.Namespace) -> None:
  """Joins the cluster that the flags or the environment name; one process is fine too."""
  import jax

  if args.coordinator_address:
    if args.num_processes is None or args.process_id is None:
      raise errors.UserError("--coordinator_address needs --num_processes and --process_id too")
    jax.distributed.initialize(args.coordinator_address, args.num_processes, args.process_id)
  elif not _alone_under_slurm():
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


def main(argv: Sequence[str]) -> None:
  """The program; see --help."""
  config, args = parse(argv)
  faulthandler.enable(sys.__stderr__)
  _connect(args)
  from protojax import api

  api.train(config, args.workdir)


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
