"""python -m protojax.report --workdir=RUN [--workdir=RUN2 ...] [--out=FILE]: one HTML page."""

import pathlib
import shlex
import sys

import jax
from absl import logging

from protojax import cli, errors, files, trained, workdir
from protojax.data import source as sources
from protojax.reports import gallery, page
from protojax.reports import record as records

NAME, OF_SEVERAL = "report.html", "comparison.html"
_DESCRIPTION = """One self-contained page about a run, or about several in the same charts.

Verdict and numbers with their protocol, curves, collapse of the prototypes, the images nearest to
the most and the least used of them, attention maps, augmented views, settings. Finished runs and
running ones; what a run lacks is left out and said."""


def after_training(model: trained.Trained, arrays: dict, *, bank, train) -> pathlib.Path:
  """Writes report.html into the workdir of a run that has just written its result.

  Every process calls it; process 0 writes.

  Args:
    model: from `trained.of_state`; its path is the workdir.
    arrays: of `snapshot.Snapshot.final`.
    bank, train: sources of evaluation and pretraining.

  Returns:
    The path of the page.
  """
  folder = pathlib.Path(model.path)
  looks = gallery.look(model, model.config, bank=bank, train=train, arrays=arrays)
  if jax.process_index() == 0:
    run = records.read([folder])[0]
    files.write(folder / NAME, page.build([run], {run.name: looks}, _command([folder])))
  return folder / NAME


def _command(folders) -> str:
  return shlex.join(["python", "-m", "protojax.report", *(f"--workdir={f}" for f in folders)])


def _look(run: records.Record, limit: int) -> gallery.Looks | str:
  """The pictures of a run on the disk, or a sentence why there are none."""
  try:
    config = workdir.restored(run.config.to_dict())
  except (AttributeError, KeyError, TypeError, ValueError, errors.UserError):
    return "config.json is missing or of another version."
  data, arrays = config.data, run.arrays
  train = _tried(
    sources.build, data.name, split=data.split, data_dir=data.data_dir, imbalance=data.imbalance,
    seed=config.seed,
  )
  model = bank = _tried(trained.load, str(run.folder))
  if isinstance(model, trained.Trained):
    bank = _tried(trained.source, model, "train")
    if run.measures(records.FINAL).get("step") != model.step:
      arrays = {}  # of another state
  return gallery.look(model, config, bank=bank, train=train, arrays=arrays, limit=limit)


def _tried(call, *arguments, **options):
  """What `call` returns, or the UserError that says why it does not."""
  try:
    return call(*arguments, **options)
  except errors.UserError as error:
    return error


def main(argv: list[str]) -> None:
  parser = cli.parser("report", _DESCRIPTION)
  parser.add_argument(
    "--workdir", action="append", required=True, help="folder of a run; give it again for more"
  )
  parser.add_argument(
    "--out",
    help=f"file to write; default: {NAME}, of several runs {OF_SEVERAL}, in the (first) workdir",
  )  # fmt: skip
  parser.add_argument(
    "--limit", type=int, default=gallery.LIMIT,
    help="images among which those nearest to a prototype are sought; 0: all of the bank",
  )  # fmt: skip
  args = parser.parse_args(argv)
  if args.limit < 0:
    raise errors.UserError(f"--limit={args.limit} must not be negative (0: all images)")
  folders = [pathlib.Path(w).expanduser() for w in args.workdir]
  runs = records.read(folders)
  out = pathlib.Path(args.out).expanduser() if args.out else (
    folders[0] / (NAME if len(folders) == 1 else OF_SEVERAL)
  )
  looks = {}
  for run in runs:
    logging.info("looking at %s", run.folder)
    looks[run.name] = _look(run, args.limit)
  files.write(out, page.build(runs, looks, shlex.join(["python", "-m", "protojax.report", *argv])))
  print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
