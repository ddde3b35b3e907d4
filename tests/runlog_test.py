import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax import errors, runlog


def _log(tmp_path, losses, **changes):
  """Runs the losses of successive steps through a log; the losses written, by step."""
  config = tiny.config(num_steps=len(losses), **changes)
  nothing = np.zeros(config.batch_size, np.int32)
  with runlog.RunLog(tmp_path, config, start=0, describe=str) as log:
    for step, loss in enumerate(losses):
      log.step(step, {"train/loss": jnp.float32(loss)}, skipped=nothing, waited=0.0)
    log.sync()
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["train/loss"] for line in lines}


def test_a_line_is_the_mean_of_the_steps_since_the_last(tmp_path):
  assert _log(tmp_path, [8.0, 7.0, 5.0, 3.0], log_every=2) == {1: 8.0, 2: 7.0, 4: 4.0}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_the_run_in_one_line(tmp_path, loss):
  with pytest.raises(errors.UserError, match=f"the loss is {loss} after step 2: lower") as info:
    _log(tmp_path, [1.0, loss, 1.0])
  assert "\n" not in str(info.value)
