"""Trains: protojax train --config=RECIPE --workdir=FOLDER [--config.KEY=VALUE ...]"""

import argparse
import faulthandler
import os
import pathlib
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Sequence

import ml_collections
from absl import logging

from protojax import cli, errors, hosts, methods, recipes, trees, typed
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
--config.data.data_dir and --config.data.name say. A recipe of your own is a file:
--config=path/to/file.py. `python -m protojax.main` is the same program."""
_EXAMPLE = "protojax train --config=quickstart --workdir=runs/quickstart"


def _of_the_recipe(flag: str) -> str | None:
  """--num_steps is --config.num_steps: the flag of a setting that was typed as one of its own."""
  key = typed.key_named(flag.removeprefix("--"), configs.default())
  return f"--config.{key}" if key else None


def _parser(list_recipes: bool) -> argparse.ArgumentParser:
  listed = [
    textwrap.fill(f"  {name:<25}{recipes.title(name)}", 100, subsequent_indent=" " * 27)
    for name in (recipes.names() if list_recipes else ())
  ]
  parser = cli.parser(
    "train", _DESCRIPTION, epilog="\n".join(["recipes:", *listed]), meant=_of_the_recipe
  )
  parser.usage = "protojax train --config=RECIPE --workdir=FOLDER [--config.KEY=VALUE ...]"
  parser.add_argument("--config", metavar="RECIPE", help="NAME, FILE.py, NAME:debug")
  parser.add_argument("--workdir", help="folder of this run; resumed if it holds one")
  parser.add_argument("--config.KEY", metavar="VALUE", help="changes a setting of the recipe")
  parser.add_argument(
    "--coordinator_address", help="host:port of process 0, where no cluster is detected"
  )
  parser.add_argument("--num_processes", type=int, help="with --coordinator_address")
  parser.add_argument("--process_id", type=int, help="with --coordinator_address")
  parser.add_argument(
    "--start_timeout",
    type=float,
    default=300.0,
    help="seconds that processes wait for each other at the start (300)",
  )
  parser.add_argument(
    "--host_timeout",
    type=float,
    default=60.0,
    help="seconds of silence after which a process is lost and all end (60)",
  )
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
  changes, others = typed.split(argv)
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
  config = typed.config(args.config, changes)
  given = dict(changes)
  if config.init_from and "init_from" in given:
    from protojax.training import origin

    origin.take_over(config, given)
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


def _detected(seconds: float) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
  """(coordinator's address, number of processes, index of this one, devices) of the environment."""
  try:
    from jax._src import clusters  # what jax.distributed.initialize() asks

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    return detect(address, None, None, None, None, int(seconds))
  except Exception as error:  # another version of JAX, or nobody answers: it is asked once more
    logging.debug("no cluster was detected: %s", error)
    return None, None, None, None


def _connect(args: argparse.Namespace) -> hosts.Hosts | None:
  """Joins the cluster that the flags or the environment name; one process is fine too."""
  import jax

  others = None
  if not args.coordinator_address and (args.num_processes, args.process_id) != (None, None):
    raise errors.UserError(
      "--num_processes and --process_id need --coordinator_address too: host:port of process 0"
    )
  if args.coordinator_address:
    if args.num_processes is None or args.process_id is None:
      raise errors.UserError("--coordinator_address needs --num_processes and --process_id too")
    if not 0 <= args.process_id < args.num_processes:
      raise errors.UserError(
        f"--process_id={args.process_id} of --num_processes={args.num_processes}: processes are "
        f"counted from 0 to {args.num_processes - 1}"
      )
    address, count, index, devices = (
      args.coordinator_address,
      args.num_processes,
      args.process_id,
      None,
    )
  elif _alone_under_slurm():
    return None
  else:
    address, count, index, devices = _detected(args.start_timeout)
  if address is None or count is None or index is None:
    try:
      jax.distributed.initialize()
    except ValueError:  # no cluster: a single process
      pass
  else:
    if count > 1:
      others = hosts.join(
        address,
        count,
        index,
        start_timeout=args.start_timeout,
        timeout=args.host_timeout,
        intact=lambda: _intact(args.workdir),
      )
      address = hosts.through_relay(address) if index else address
    jax.distributed.initialize(
      address,
      count,
      index,
      None if "JAX_LOCAL_DEVICE_IDS" in os.environ else devices,
      initialization_timeout=int(args.start_timeout) + 1,
      # JAX looks after the others too, and crashes: later than `hosts`.
      heartbeat_timeout_seconds=max(100, 10 * int(args.host_timeout)),
    )
    # JAX takes SIGTERM for itself, and does nothing: back to what it was.
    if (handler := signal.getsignal(signal.SIGTERM)) is not None:
      signal.signal(signal.SIGTERM, handler)
  return others


def _log_place() -> None:
  """Which of several processes this is, and its devices."""
  import jax

  if jax.process_count() > 1:
    logging.info(
      "process %d of %d, %d local of %d devices (%s)",
      jax.process_index(),
      jax.process_count(),
      jax.local_device_count(),
      jax.device_count(),
      jax.devices()[0].device_kind,
    )


def _intact(workdir: str) -> str:
  """What there is to go on from."""
  from protojax.training import checkpoint

  return checkpoint.intact(workdir)


def main(argv: Sequence[str]) -> None:
  """The program; see --help."""
  config, args = parse(argv)
  faulthandler.enable(sys.__stderr__)
  with hosts.told(_connect(args)):
    from protojax import api, environment

    environment.keep_memory()
    environment.keep_compiled()
    _log_place()
    api.train(config, args.workdir)


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
