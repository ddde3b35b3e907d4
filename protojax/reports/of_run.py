"""Writes the report of a run when its training ends, or of several runs from what they left."""

import pathlib
import shlex
from collections.abc import Sequence

import jax

from protojax import config as configs
from protojax import errors, files, loading, pretrained, progress
from protojax.reports import comparison, gallery, page, picture, record
from protojax.training import datasets, workdir

OF_SEVERAL = "comparison.html"


def command(folders: Sequence[pathlib.Path | str]) -> str:
  """The command line that writes the page of these runs again."""
  return shlex.join(["protojax", "report", *(f"--workdir={f}" for f in folders)])


def after_training(folder: pathlib.Path, program, state, arrays: dict, *, bank, train) -> None:
  """Writes report.png and report.html of a run that has just written its result.

  Every process calls it; process 0 writes.

  Args:
    folder: workdir.
    program: `training.programs.Program` of the run.
    state: the final `training.train_step.TrainState`.
    arrays: of `training.evaluation.Snapshot.final`.
    bank, train: sources of evaluation and pretraining.
  """
  with progress.during("writing the report"):
    model = loading.of_state(str(folder), program, state, program.config.num_steps)
    found = gallery.collect(model, model.config, bank=bank, train=train, arrays=arrays)
    if jax.process_index() == 0:
      run = record.read([folder])[0]
      picture.draw(run)
      files.write(folder / workdir.REPORT, page.build([run], {run.name: found}, command([folder])))


def write(
  folders: Sequence[pathlib.Path],
  *,
  out: pathlib.Path | None = None,
  limit: int = gallery.LIMIT,
  origin: str | None = None,
) -> pathlib.Path:
  """Writes the page of runs on the disk, finished or not, all of them in the same charts.

  Several runs have a picture of the same name beside it, .png.

  Args:
    folders: their workdirs.
    out: the file to write; by default report.html, of several runs comparison.html, in the (first)
      workdir.
    limit: images among which those nearest to a prototype are sought; 0: all of the bank.
    origin: the command line that the page names as what wrote it; by default that of `command`.

  Returns:
    The path of the page.

  Raises:
    UserError: if a folder holds no run or the page cannot be written.
  """
  runs = record.read(folders)
  out = out or folders[0] / (workdir.REPORT if len(folders) == 1 else OF_SEVERAL)
  if out.suffix not in (".html", ".htm"):
    raise errors.UserError(f"out={out} is the page: give it a name that ends in .html")
  found = {}
  for run in progress.over(runs, "drawing pictures of run"):
    found[run.name] = pictures(run, limit)
  files.write(out, page.build(runs, found, origin or command(folders)))
  if len(runs) > 1:
    comparison.draw(runs, out.with_suffix(".png"))
  return out


def pictures(run: record.Record, limit: int = gallery.LIMIT) -> gallery.Pictures | str:
  """Makes the pictures of a run on the disk; a sentence that says why if there are none.

  Args:
    run: from `record.read`.
    limit: images among which those nearest to a prototype are sought; 0: all of the bank.
  """
  try:
    config = configs.restored(run.config.to_dict())
  except (AttributeError, KeyError, TypeError, ValueError):
    return "config.json is missing or of another version."
  arrays, train = run.arrays, _or_error(datasets.pretraining, config)
  model = bank = _or_error(loading.load, str(run.folder))
  if isinstance(model, pretrained.Trained):
    bank = _or_error(pretrained.source, model, "train")
    if run.measures(record.FINAL).get("step") != model.step:
      arrays = {}  # of another state
  return gallery.collect(model, config, bank=bank, train=train, arrays=arrays, limit=limit)


def _or_error(call, *arguments, **options):
  """What `call` returns, or the UserError that says why it does not."""
  try:
    return call(*arguments, **options)
  except errors.UserError as error:
    return error
