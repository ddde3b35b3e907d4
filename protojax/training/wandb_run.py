"""Numbers of a run at Weights & Biases as well, for whoever has `pip install "protojax[wandb]"`.

Whatever fails there costs one warning and never the training: metrics.jsonl has everything.
"""

import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from absl import logging

RUN_ID = "wandb_run_id"  # in the workdir: a run that goes on goes on there too


class WandbRun:
  """One run at Weights & Biases, the same one after a resume.

  Where the service cannot be reached the numbers are kept in the workdir's folder wandb/, for
  `wandb sync`. The variables of wandb itself hold: WANDB_ENTITY, WANDB_MODE, WANDB_TAGS, ...

  Args:
    project: its name there.
    folder: workdir, existing.
    settings: nested dict, shown beside the run.
  """

  def __init__(self, project: str, folder: pathlib.Path, settings: Mapping[str, Any]):
    self._run: Any = None
    try:
      import wandb
    except ImportError:
      logging.warning(
        "wandb=%s: the package wandb is missing, training goes on without: "
        'pip install "protojax[wandb]"',
        project,
      )
      return
    known = folder / RUN_ID
    if not known.exists():
      known.write_text(secrets.token_hex(4))
    options: dict[str, Any] = {
      "project": project,
      "name": folder.name,
      "id": known.read_text().strip(),
      "resume": "allow",
      "dir": str(folder),
      "config": dict(settings),
      "settings": wandb.Settings(
        console="off", silent=True, login_timeout=30, init_timeout=30, finish_timeout=60
      ),
    }
    try:
      try:
        self._run = wandb.init(**options)
      except Exception as error:
        self._warn("cannot be reached, kept in the workdir for `wandb sync`", error)
        wandb.teardown()  # it still holds the id
        self._run = wandb.init(**options, mode="offline")
      # Not wandb's own count, which refuses the steps that a resumed run does again.
      self._run.define_metric("step")
      self._run.define_metric("*", step_metric="step")
      where = f"offline, {folder / 'wandb'}" if self._run.offline else self._run.url
      logging.info("Weights & Biases: %s", where)
    except Exception as error:
      self._give_up(error)

  def write(self, step: int, numbers: Mapping[str, float]) -> None:
    """Sends finite numbers of the state after `step` updates."""
    if self._run is not None:
      try:
        self._run.log({"step": step, **numbers})
      except Exception as error:
        self._give_up(error)

  def close(self) -> None:
    """Waits a minute at most for what is under way."""
    run, self._run = self._run, None
    if run is not None:
      try:
        run.finish()
      except Exception as error:
        self._warn("did not finish", error)

  def _give_up(self, error: Exception) -> None:
    self._run = None
    self._warn("training goes on without", error)

  @staticmethod
  def _warn(what: str, error: Exception) -> None:
    said = " ".join(str(error).split())[:200]
    logging.warning("Weights & Biases: %s (%s: %s)", what, type(error).__name__, said)
