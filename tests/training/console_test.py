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
from protojax.metrics import rules
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


def test_a_line_has_the_learning_rate_of_its_update(tmp_path):
  rates = {"optim__lr": 0.32, "optim__final_lr": 0.0, "optim__warmup_steps": 2}
  _log(tmp_path, [8.0, 7.0, 5.0, 3.0], log_every=1, batch_size=16, **rates)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  # Of a batch of 16: .02 at the peak, twice; half a cosine of two steps.
  expected = [0.0, 0.02, 0.02, 0.01]
  np.testing.assert_allclose([line["train/learning_rate"] for line in lines], expected, atol=1e-8)


def test_of_several_processes_the_wait_is_that_of_the_one_which_waited_most(tmp_path, monkeypatch):
  def everyone(waited):
    return np.stack([waited, np.float64(1e9)])  # this one has its images at once

  monkeypatch.setattr(console.jax, "process_count", lambda: 2)
  monkeypatch.setattr(console.multihost_utils, "process_allgather", everyone)
  _log(tmp_path, [1.0] * 4, log_every=2)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert lines[-1]["time/data_wait"] == 1.0


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


@pytest.mark.survives(
  "a loss that is NaN or infinite",
  "both",
  "one line with advice, at the terminal and in train.log",
)
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_the_run_in_one_line(tmp_path, loss):
  with pytest.raises(errors.UserError, match=f"the loss is {loss} after step 2: lower") as info:
    _log(tmp_path, [1.0, loss, 1.0])
  assert "\n" not in str(info.value)
  assert _said(tmp_path)[-1] == str(info.value)  # whoever reads the log later sees why it ends


def test_measures_from_before_the_first_verdict_are_not_judged_later(tmp_path):
  """At step 100 the line comes before the look: what was seen at step 80 is not held against it."""
  config = tiny.config(num_steps=400, optim__warmup_steps=10)
  with console.RunLog(tmp_path, config, start=0, describe=str) as log:
    assert log.verdict(100).label == "not judged"
    log.measures(80, {"collapse/rankme": 1.2})
    assert log.verdict(100).label == "warming up"
    log.measures(100, {"collapse/rankme": 1.2})
    assert log.verdict(110).label == "dimensional collapse"


_CONFIG = configs.default("dino")
_CONFIG.update({"num_steps": 5000, "batch_size": 82})


def _line(step, measures, *, label="ok", **pace):
  verdict = rules.Verdict(label, "", False)
  return console.log_line(step, measures, verdict, config=_CONFIG, **pace)


def test_log_line_is_the_documented_one():
  measures = {
    "train/loss": 7.91,
    "train/ln_k": 8.3178,
    "train/target_entropy": 6.10,
    "collapse/unique_0.025": 1.0,
    "collapse/unique_0.25": 0.98,
    "collapse/used": 0.61,
    "collapse/used_sample": 0.2,
    "collapse/rankme": 143.2,
    "probe/knn": 0.712,
    "time/img_per_s": 1630.4,
    "time/data_wait": 0.013,
  }
  looked = {k: v for k, v in measures.items() if k.startswith(("collapse/", "probe/"))}
  trained = {k: v for k, v in measures.items() if k not in looked}
  assert [
    console.log_line(1200, trained, config=_CONFIG, pace=19.9),
    _line(1200, looked),
  ] == [
    "step 1200/5000  eta 3:11  loss 7.91 (ln K 8.32)  H 6.10  img/s 1630  wait 1%",
    "step 1200/5000  unique.25 98%  used 61%  rank 143  knn 71.2%  [ok]",
  ]
  folded = _line(1200, measures | {"train/cross_entropy": 7.9}, pace=19.9).splitlines()
  assert len(folded) == 2 and all(len(line) <= 80 for line in folded)
  wide = looked | {"collapse/rankme": 1432.0}
  last = _line(1200, wide, label="little learned yet").splitlines()[-1]
  assert last == "  knn 71.2%  [little learned yet]"


def test_the_chance_of_carp_is_that_of_a_block():
  config = configs.default("carp")
  config.method.partition_size = 64
  line = console.log_line(1, {"train/loss": 4.2, "train/ln_k": 4.1589}, config=config)
  assert "loss 4.20 (ln of a block's 64: 4.16)" in line


def test_log_line_leaves_out_what_was_not_measured():
  measures = {"train/loss": 1.5, "probe/knn": None, "collapse/used_sample": 0.25}
  line = _line(3, measures, label="warming up")
  assert line == "step 3/5000  loss 1.50  used 25%  [warming up]"


def _said(folder):
  """The lines of train.log, without the time of day."""
  return [line[20:] for line in (folder / "train.log").read_text().splitlines()]


_FLOORS = {
  "floor/knn_pixels": 0.977,
  "floor/linear_pixels": 0.975,
  "floor/knn_untrained": 0.434,
  "floor/bank_images": 1442.0,
  "floor/test_images": 355.0,
}


def test_summary_sets_accuracies_beside_what_there_is_without_training(tmp_path):
  result = {"step": 6, "probe/knn": 0.62, "probe/linear_fitted": 0.924}
  result |= {"floor/knn": 0.61, "floor/linear": 0.9}
  with console.RunLog(tmp_path, tiny.config(), start=0, describe=str) as log:
    log.floors(_FLOORS)
    log.summary(result, bank=range(64))
  text = "\n".join(_said(tmp_path))
  floors = "floors      k-NN raw pixels 97.7%, k-NN untrained 43.4%; bank 1,442, test 355"
  assert text.startswith(f"{floors}\n") and "left out" not in text
  assert "\nk-NN      62.0% (raw pixels 97.7%, untrained 43.4%); k=20" in text
  assert "of the 1442 bank and 355 test images of the floors: 61.0%" in text
  assert "\nlinear    92.4% (raw pixels 97.5%); fitted" in text
  assert "of the 1442 bank and 355 test images of the floors: 90.0%" in text
  warm = console._beside({"floor/knn_start": 0.5}, "", "knn")
  assert warm == "at the start 50.0%"


def test_the_summary_says_how_many_images_could_not_be_read(tmp_path):
  result = {"step": 6, "data/unreadable_bank": 2.0, "data/unreadable_test": 1.0}
  with console.RunLog(tmp_path, tiny.config(), start=0, describe=str) as log:
    log.summary(result, bank=range(64))
  said = "left out  2 of the bank images and 1 of the test images, which cannot be read"
  assert said in _said(tmp_path)


def test_a_line_says_nothing_twice_nothing_old_and_fits_80_columns(tmp_path):
  config = tiny.config(num_steps=400, log_every=50, monitor__every=100, eval_every=200)
  nothing = np.zeros(config.batch_size, np.int32)
  train = {"train/loss": 5.07, "train/cross_entropy": 4.9, "train/ln_k": 4.34}
  train |= {"train/target_entropy": 3.3}
  look = {"collapse/unique_0.25": 1.0, "collapse/used_sample": 0.5, "collapse/rankme": 143.0}
  with console.RunLog(tmp_path, config, start=0, describe=str) as log:
    log.floors(_FLOORS)
    for step in range(400):
      values = {k: jnp.float32(v) for k, v in train.items()}
      log.step(step, values, skipped=nothing, waited=0.0)
      if step + 1 in (100, 200, 300):
        log.flush()
        log.measures(step + 1, look | ({"probe/knn": 0.62} if step == 199 else {}))
    log.flush()
    log.measures(400, look | {"probe/knn": 0.62})
    log.summary({"step": 400, "probe/knn": 0.62}, bank=range(64))
  said = _said(tmp_path)
  assert max(len(line) for line in said if not line.startswith(("report ", "step "))) <= 80
  lines = [line for line in said if line.startswith("step ")]
  assert len(set(lines)) == len(lines) == 1 + 8 + 4  # the first, every 50th, and the looks
  assert [line.split()[1] for line in lines if "unique" in line] == [
    f"{step}/400" for step in (100, 200, 300, 400)
  ]
  assert sum("knn 62.0%" in line for line in said) == 2  # at 200 and at 400, where lines fold
  assert not [line for line in lines if "unique" in line and ("loss" in line or "img/s" in line)]
  # The sentence comes when the verdict changes, and at the end.
  assert sum(line.startswith("  little learned yet: ") for line in said) == 1
  assert [line for line in said if line.startswith("verdict   little learned yet: k-NN 62.0%")]


@pytest.mark.parametrize(
  ("limit", "said"),
  [(0, "cosine, train -> test"), (64, "cosine, train -> test"), (12, "bank 12 of 64")],
)
def test_summary_says_how_much_of_the_bank_was_searched(tmp_path, limit, said):
  config = tiny.config(probe__limit=limit)
  with console.RunLog(tmp_path, config, start=0, describe=str) as log:
    log.summary({"step": 6, "probe/knn": 0.5}, bank=range(64))
  (line,) = [x for x in _said(tmp_path) if "k-NN" in x]
  assert "50.0%; k=20, T=0.07, cosine" in line and said in line
  assert ("bank" in line) == (limit == 12)


def test_long_runs_have_hours():
  assert "eta 2:16:40" in _line(0, {"time/img_per_s": 50.0}, pace=50.0 / 82)


def test_a_slow_moment_moves_the_eta_by_its_share_of_the_run(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
  config = tiny.config(num_steps=100, log_every=10)
  nothing = np.zeros(config.batch_size, np.int32)
  with console.RunLog(tmp_path, config, start=0, describe=str) as log:
    for step in range(51):
      now[0] += 4.0 if step >= 40 else 1.0  # another program begins
      log.step(step, {"train/loss": jnp.float32(1.0)}, skipped=nothing, waited=0.0)
  (line,) = [line for line in _said(tmp_path) if line.startswith("step 50/100")]
  # 50 steps are left. At the speed of the last ten that would be 3:20.
  minutes, seconds = re.search(r"eta (\d+):(\d+)", line).groups()
  assert 75 <= 60 * int(minutes) + int(seconds) <= 85


@pytest.mark.parametrize(("devices", "told"), [(8, False), (None, False), (2, True)])
def test_a_run_that_goes_on_says_so_with_its_floors(tmp_path, devices, told):
  config = tiny.config(num_steps=40)
  with console.RunLog(tmp_path, config, start=0, describe=str) as log:
    log.floors(_FLOORS)
  with console.RunLog(tmp_path, config, start=10, describe=str) as log:
    log.resumed(10, devices)  # eight are here
  *_, resumed, floors = _said(tmp_path)
  assert resumed.startswith("resumed at step 10") and ("saved on 2 devices" in resumed) == told
  assert floors.startswith("floors      k-NN raw pixels 97.7%") and "bank 1,442" in floors
