import io
import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax import config as configs
from protojax import errors, progress
from protojax.metrics import verdicts
from protojax.training import console


def _log(tmp_path, losses, **changes):
  """Runs the losses of successive steps through a log; the losses written, by step."""
  config = tiny.config(num_steps=len(losses), **changes)
  nothing = np.zeros(config.batch_size, np.int32)
  with console.RunLog(tmp_path, config, start=0, describe=str) as log:
    for step, loss in enumerate(losses):
      log.step(step, {"train/loss": jnp.float32(loss)}, skipped=nothing, waited=0.0)
    log.sync()
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["train/loss"] for line in lines}


def test_a_line_is_the_mean_of_the_steps_since_the_last(tmp_path):
  assert _log(tmp_path, [8.0, 7.0, 5.0, 3.0], log_every=2) == {1: 8.0, 2: 7.0, 4: 4.0}


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_the_bar_moves_with_every_step_and_its_eta_is_that_of_the_line(tmp_path, monkeypatch):
  seconds = [0.0]

  def later():
    seconds[0] += 0.25
    return seconds[0]

  monkeypatch.setattr(progress, "_now", later)
  monkeypatch.setattr(console.time, "perf_counter", later)
  monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
  _log(tmp_path, [1.0] * 40, log_every=10)
  shown = terminal.getvalue()
  moves = [int(done) for done in re.findall(r"\rstep (\d+)/40 +\d+% \|", shown)]
  assert set(moves) >= set(range(2, 40)) and moves == sorted(moves)
  for line in (line for line in shown.splitlines() if "  loss " in line and "eta" in line):
    step, eta = re.search(r"step (\d+)/40  eta (\S+)", line).groups()
    below = re.findall(rf"\rstep {step}/40 .*?eta (\S+)", shown)
    assert below and all(abs(int(b[-2:]) - int(eta[-2:])) <= 1 for b in below[-1:])


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_the_run_in_one_line(tmp_path, loss):
  with pytest.raises(errors.UserError, match=f"the loss is {loss} after step 2: lower") as info:
    _log(tmp_path, [1.0, loss, 1.0])
  assert "\n" not in str(info.value)


def test_measures_from_before_the_first_verdict_are_not_judged_later(tmp_path):
  """At step 100 the line comes before the look: what was seen at step 80 is not held against it."""
  config = tiny.config(num_steps=400, optim__warmup_steps=10)
  with console.RunLog(tmp_path, config, start=0, describe=str) as log:
    assert log.verdict(100).label == "ok"
    log.measures(80, {"collapse/rankme": 1.2})
    assert log.verdict(100).label == "warming up"
    log.measures(100, {"collapse/rankme": 1.2})
    assert log.verdict(110).label == "dimensional collapse"


def _line(step, measures, *, name="dino", label="ok"):
  config = configs.default(name)
  config.update({"num_steps": 5000, "batch_size": 82})
  return console.log_line(step, measures, verdicts.Verdict(label, "", False), config=config)


def test_log_line_is_the_documented_one():
  measures = {
    "train/loss": 7.91,
    "train/ln_k": 8.3178,
    "train/target_entropy": 6.10,
    "collapse/unique_0.025": 1.0,
    "collapse/used": 0.61,
    "collapse/used_sample": 0.2,
    "collapse/rankme": 143.2,
    "probe/knn": 0.712,
    "time/img_per_s": 1630.4,
    "time/data_wait": 0.013,
  }
  assert _line(1200, measures) == (
    "step 1200/5000  eta 3:11  loss 7.91 (ln K 8.32)  H 6.10  unique 100%  used 61%  rank 143  "
    "knn 71.2%  img/s 1630  wait 1%  [ok]"
  )


def test_log_line_leaves_out_what_was_not_measured():
  measures = {"train/loss": 1.5, "probe/knn": None, "collapse/used_sample": 0.25}
  line = _line(3, measures, name="carp", label="warming up")
  assert line == "step 3/5000  loss 1.50  used 25%  [warming up]"


@pytest.mark.parametrize(
  ("limit", "said"),
  [(0, "cosine, train -> test"), (64, "cosine, train -> test"), (12, "bank 12 of 64")],
)
def test_summary_says_how_much_of_the_bank_was_searched(tmp_path, limit, said):
  config = tiny.config(probe__limit=limit)
  with console.RunLog(tmp_path, config, start=0, describe=str) as log:
    log.summary({"step": 6, "probe/knn": 0.5}, bank=range(64))
  (line,) = [x for x in (tmp_path / "train.log").read_text().splitlines() if "k-NN" in x]
  assert (
    "50.0% (k=20, T=0.07, cosine" in line and said in line and ("bank" in line) == (limit == 12)
  )


def test_long_runs_have_hours():
  assert "eta 2:16:40" in _line(0, {"time/img_per_s": 50.0})
