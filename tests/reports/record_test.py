"""What is read back of a run: its verdict while it was trained."""

import json
import math

import pytest
import tiny

from protojax import errors
from protojax.reports import record


def _write(path, lines):
  path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
  return path


def _run(tmp_path, records):
  c = tiny.config(num_steps=1000)
  (tmp_path / "config.json").write_text(json.dumps(c.to_dict()))
  _write(tmp_path / "metrics.jsonl", records)
  return record.verdict(tmp_path)


def test_a_run_is_judged_by_all_it_has_measured_and_since_when(tmp_path):
  chance = math.log(32)
  records = []
  for i in range(1, 9):  # only both lines together tell: .01 from ln K is not enough alone
    records.append({"step": 100 * i, "train/target_entropy": 1.0 if i < 4 else chance})
    loss = chance + (0.5 if i < 4 else 0.01)
    records.append({"step": 100 * i, "train/loss": loss, "train/ln_k": chance})
  verdict, step, since = _run(tmp_path, [*records, "torn {"])
  assert (verdict.label, step, since) == ("uniform collapse", 800, 400)
  (tmp_path / "metrics.jsonl").write_text("")
  assert record.verdict(tmp_path) is None


def test_what_the_end_of_a_shorter_run_was_is_no_verdict_on_the_extended_one(tmp_path):
  floors = {"floor/knn_untrained": 0.2, "floor/linear_pixels": 0.5}
  look = {"probe/knn": 0.4, "collapse/rankme": 30.0}
  end = {"step": 500, **look, "probe/linear_fitted": 0.4}
  records = [{"step": 0, **floors}, end]
  assert _run(tmp_path, records).verdict.label == "worse than raw pixels"
  assert _run(tmp_path, [*records, {"step": 900, **look}]).verdict.label == "ok"


def test_a_run_that_ended_in_nan_says_what(tmp_path):
  records = [
    {"step": 100, "train/loss": 3.0},
    {"step": 200, "train/loss": None, "non_finite": ["train/loss"]},
  ]
  verdict, _, since = _run(tmp_path, records)
  assert verdict.label == "non-finite" and "train/loss" in verdict.sentence and since == 200


def test_a_run_whose_settings_are_gone_is_one_line(tmp_path):
  _run(tmp_path, [])
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(errors.UserError, match="config.json cannot be read"):
    record.verdict(tmp_path)
