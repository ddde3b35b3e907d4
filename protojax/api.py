"""Calls that join rooms: what `import protojax` offers beside its modules."""

import os

import ml_collections

from protojax.reports import of_run
from protojax.training import loop


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
  """Trains a run, or goes on with it, and writes its report.

      config = protojax.config.debug(protojax.config.default("dino"))
      measures = protojax.train(config, "runs/first")

  Args:
    config: of a recipe or `protojax.config.default()`, not resolved.
    workdir: folder of this run, made if missing.

  Returns:
    The measures of the final state, as written to eval/final/result.json.

  Raises:
    errors.UserError: for a mistake in the config or the data; nothing is written then.
    errors.Interrupted: on SIGTERM or Ctrl-C, after a checkpoint was written.
  """
  return loop.run(config, os.fspath(workdir), report=of_run.after_training)
