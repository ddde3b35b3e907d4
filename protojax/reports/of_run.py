"""The report of one run: written when its training ends, or later from what it left behind."""

import pathlib
import shlex
from collections.abc import Sequence

import jax

from protojax import config as configs
from protojax import errors, files, pretrained
from protojax.data import sources
from protojax.reports import gallery, page, picture, record
from protojax.training import workdir


def command(folders: Sequence[pathlib.Path | str]) -> str:
  """The command line that writes the page of these runs again."""
  return shlex.join(["python", "-m", "protojax.report", *(f"--workdir={f}" for f in folders)])


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
  model = pretrained.of_state(str(folder), program, state, program.config.num_steps)
  looks = gallery.look(model, model.config, bank=bank, train=train, arrays=arrays)
  if jax.process_index() == 0:
    picture.draw(folder)
    run = record.read([folder])[0]
    html = page.build([run], {run.name: looks}, command([folder]))
    files.write(folder / workdir.REPORT, html)


def look(run: record.Record, limit: int = gallery.LIMIT) -> gallery.Looks | str:
  """The pictures of a run on the disk, or a sentence why there are none.

  Args:
    run: from `record.read`.
    limit: images among which those nearest to a prototype are sought; 0: all of the bank.
  """
  try:
    config = configs.restored(run.config.to_dict())
  except (AttributeError, KeyError, TypeError, ValueError):
    return "config.json is missing or of another version."
  data, arrays = config.data, run.arrays
  train = _tried(
    sources.build,
    data.name,
    split=data.split,
    data_dir=data.data_dir,
    imbalance=data.imbalance,
    seed=config.seed,
  )
  model = bank = _tried(pretrained.load, str(run.folder))
  if isinstance(model, pretrained.Trained):
    bank = _tried(pretrained.source, model, "train")
    if run.measures(record.FINAL).get("step") != model.step:
      arrays = {}  # of another state
  return gallery.look(model, config, bank=bank, train=train, arrays=arrays, limit=limit)


def _tried(call, *arguments, **options):
  """What `call` returns, or the UserError that says why it does not."""
  try:
    return call(*arguments, **options)
  except errors.UserError as error:
    return error
