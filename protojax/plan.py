"""What a step will cost: protojax plan --config=RECIPE --topology=v5e:16x16

Compiles the training step for devices that need not be here and says what it needs of each.
"""

import argparse
import pathlib
import re
import sys

import ml_collections

from protojax import cli, errors, files, typed
from protojax.planning import compiled, report, targets
from protojax.training import origin

_DESCRIPTION = """\
Compiles the step that training would run, and says of one device what memory it takes, what it
computes, moves and sends, what bounds it, and how many images a second that allows at most.

  protojax plan --config=gmm_vit_s --topology=v5e:4x4
  protojax plan --config=gmm_vit_s --topology=v5e:16x16 --mesh=data:64,model:4 \\
    --config.batch_size=1024 --json=plan.json
  protojax plan --config=quickstart --devices=8          virtual ones, of this CPU

Without --topology and --devices: for the devices at hand. A topology needs libtpu (pip install
"jax[tpu]") and no TPU. No image is read. A full recipe may take ten minutes to compile on two
cores; NAME:debug, which takes about one, is the way to try a command."""

# Images and classes of what the recipes name; of anything else those of ImageNet.
_IMAGENET = (1_281_167, 1000)
_KNOWN = {"digits": (1442, 10), "cifar10": (50_000, 10), "cifar100": (50_000, 100)}


def _parser() -> argparse.ArgumentParser:
  parser = cli.parser("plan", _DESCRIPTION)
  parser.usage = "protojax plan --config=RECIPE [--topology=v5e:16x16] [--config.KEY=VALUE ...]"
  parser.add_argument("--config", metavar="RECIPE", required=True, help="NAME, FILE.py, NAME:debug")
  parser.add_argument("--topology", help="a slice of TPUs: v5e:4x4, v5p:4x4x4, v6e:8x8, ...")
  parser.add_argument("--devices", type=int, help="so many virtual devices of this CPU")
  parser.add_argument("--mesh", help="data:64,model:4; default: the recipe's config.mesh")
  parser.add_argument("--images", type=int, help="of the data set; default: as its name says")
  parser.add_argument("--classes", type=int, help="of the online probe; 0 leaves it out")
  parser.add_argument(
    "--fit",
    action="store_true",
    help="compile half the batch, too: the largest that fits is read off a line through both",
  )
  parser.add_argument("--json", help="file to write everything to")
  parser.add_argument("--config.KEY", metavar="VALUE", help="changes a setting of the recipe")
  return parser


def mesh_of(text: str) -> dict[str, int]:
  """{"data": 64, "model": 4} of "data:64,model:4".

  Raises:
    UserError: if that is not what it says.
  """
  parts = [re.fullmatch(r"(data|model)[:=](-?\d+)", part.strip()) for part in text.split(",")]
  if not all(parts):
    raise errors.UserError(f"--mesh={text}: give the sizes of its axes, as --mesh=data:64,model:4")
  return {part[1]: int(part[2]) for part in parts if part}


def parse(argv: list[str]) -> tuple[ml_collections.ConfigDict, argparse.Namespace]:
  """(the resolved config of a run as it is typed, the other flags).

  Args:
    argv: the command line after the name of the program.

  Raises:
    UserError: for a mistake in it, one line.
    SystemExit: after --help.
  """
  changes, others = typed.split(argv)
  args = _parser().parse_args(others)
  if args.topology and args.devices is not None:
    raise errors.UserError("--topology and --devices are two targets: give one")
  config = typed.config(args.config, changes)
  if config.init_from and "init_from" in dict(changes):
    origin.take_over(config, dict(changes))
  if args.mesh:
    # Whichever is not named takes what the other leaves; model does only where it is named.
    config.mesh.update({"data": -1, "model": 1} | mesh_of(args.mesh))
  images, classes = _KNOWN.get(config.data.name, _IMAGENET)
  args.images = images if args.images is None else args.images
  args.classes = classes if args.classes is None else args.classes
  return compiled.resolved(config, args.images), args


def plan(argv: list[str]) -> report.Plan:
  """The plan that a command line asks for.

  Args:
    argv: the command line after the name of the program.

  Raises:
    UserError: for a mistake in it, one line.
    SystemExit: after --help.
  """
  return _planned(*parse(argv))


def _planned(config: ml_collections.ConfigDict, args: argparse.Namespace) -> report.Plan:
  """The plan of what `parse` gives."""
  if args.topology:
    target = targets.of_topology(args.topology)
  elif args.devices is not None:
    target = targets.virtual(args.devices)
  else:
    target = targets.at_hand()
  step = compiled.compile_step(config, args.classes, target)
  other = None
  if args.fit:
    half = config.copy_and_resolve_references()
    half.batch_size = config.batch_size // 2
    other = compiled.compile_step(half, args.classes, target)
  return report.make(args.config, target, args.images, args.classes, step, other)


def main(argv: list[str]) -> None:
  """The program; see --help."""
  config, args = parse(argv)
  planned = _planned(config, args)
  print("\n".join(report.lines(planned)))
  if args.json:
    files.write_json(pathlib.Path(args.json).expanduser(), report.as_json(planned))


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
