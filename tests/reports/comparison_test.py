"""Runs side by side: the table says what their files do, floors once, sizes apart; the picture."""

import json

import matplotlib.image
import numpy as np
import pytest
import tiny
from matplotlib import axes

from protojax.reports import comparison, record


def _run(folder, final, lines=(), pixels=32, **arrays):
  """A workdir of a run that ended with `final`, or that has not if that is None."""
  (folder / "eval" / "final").mkdir(parents=True)
  config = tiny.config(num_steps=400, augment__global_size=pixels).to_dict()
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  if final is not None:
    text = json.dumps({"measures": final, "protocol": {}, "environment": {}})
    (folder / "eval" / "final" / "result.json").write_text(text)
  if arrays:
    np.savez(folder / "eval" / "final" / "arrays.npz", **arrays)
  return folder


_FINAL = {
  "step": 400,
  "collapse/unique_0.025": 0.99,
  "collapse/unique_0.25": 0.875,
  "collapse/unique_0.5": 0.25,
  "collapse/unique_0.25_random": 1.0,
  "collapse/unique_0.5_random": 0.75,
  "collapse/used": 0.125,
  "probe/knn": 0.75,
  "probe/linear": 0.5,
  "probe/linear_fitted": 0.625,
  "floor/knn_pixels": 0.97,
  "floor/linear_pixels": 0.96,
  "floor/knn_untrained": 0.43,
}


def _lines(*folders):
  """Of the table, each with single spaces."""
  return [" ".join(line.split()) for line in comparison.table(record.read(folders))]


def test_a_row_has_the_final_measures_and_floors_are_said_once(tmp_path):
  one = _run(tmp_path / "joint", _FINAL)
  two = _run(tmp_path / "decoupled", _FINAL | {"collapse/used": 0.9})
  lines = _lines(one, two)
  assert lines[1] == "unique .25 unique .5 used k-NN linear"
  assert lines[2:7] == [
    "joint 87.5 % 25.0 % 12.5 % 75.0 % 62.5 %",
    "decoupled 87.5 % 25.0 % 90.0 % 75.0 % 62.5 %",
    "random prototypes 100.0 % 75.0 % - - -",
    "raw pixels - - - 97.0 % 96.0 %",
    "untrained net - - - 43.0 % -",
  ]


def test_accuracies_on_more_images_than_the_floors_have_those_on_their_images_below(tmp_path):
  lines = _lines(_run(tmp_path / "joint", _FINAL | {"floor/knn": 0.7, "floor/linear": 0.5}))
  assert lines[2:4] == [
    "joint 87.5 % 25.0 % 12.5 % 75.0 % 62.5 %",
    "on the floors' images - - - 70.0 % 50.0 %",
  ]


def test_the_verdict_on_each_run_stands_below(tmp_path):
  one = _run(tmp_path / "joint", _FINAL)
  better = {"collapse/unique_0.25": 0.95, "probe/linear_fitted": 0.96}
  two = _run(tmp_path / "decoupled", _FINAL | better)
  said = " ".join(_lines(one, two))
  assert "joint: prototypes bunch. 88% of 32 prototypes are unique at cosine distance" in said
  assert said.split("decoupled: ")[1].startswith("ok ") and said.count("bunch") == 1


def test_floors_that_differ_name_their_run(tmp_path):
  one = _run(tmp_path / "one", _FINAL)
  two = _run(tmp_path / "two", _FINAL | {"floor/knn_untrained": 0.5})
  lines = _lines(one, two)
  assert "untrained net, one - - - 43.0 % -" in lines and "raw pixels - - - 97.0 % 96.0 %" in lines
  assert "untrained net, two - - - 50.0 % -" in lines


def test_images_of_different_sizes_are_told_apart(tmp_path):
  folders = _run(tmp_path / "small", _FINAL), _run(tmp_path / "large", _FINAL, pixels=96)
  lines = _lines(*folders)
  heads = [line.split("unique")[0] for line in lines if "unique .25" in line]
  assert heads == ["at 32 px ", "at 96 px "]
  assert sum(line.startswith("raw pixels -") for line in lines) == 2
  assert [line.split()[0] for line in lines if "62.5 %" in line] == ["small", "large"]


def test_an_unfinished_run_says_its_latest_and_what_is_missing_is_a_dash(tmp_path):
  lines = [{"step": 2, "collapse/used_sample": 0.5}, {"step": 3, "probe/knn": 0.25}]
  assert "begun - - 50.0 % 25.0 % -" in _lines(_run(tmp_path / "begun", None, lines))


def test_no_line_of_numbers_is_wider_than_a_terminal(tmp_path):
  runs = record.read([_run(tmp_path / ("x" * 60), _FINAL), _run(tmp_path / "b", _FINAL)])
  assert max(len(line) for line in comparison.table(runs) if "%" in line and ":" not in line) <= 80


@pytest.mark.parametrize("nearest", [True, False])
def test_picture_changes_with_what_is_drawn(tmp_path, nearest):
  rng = np.random.default_rng(0)
  arrays = {}
  if nearest:
    arrays = {"nearest": rng.uniform(0, 1, 30), "nearest_random": rng.uniform(0.5, 1, 30)}
  lines = [{"step": s, "collapse/unique_0.5": 1 - s / 5, "probe/knn": s / 5} for s in range(4)]
  images = []
  for part, more in (("a", {}), ("b", {"collapse/unique_0.5": 0.9})):
    folders = [
      _run(tmp_path / part / "one", _FINAL, [*lines, {"step": 4} | more], **arrays),
      _run(tmp_path / part / "two", _FINAL, lines),
    ]
    path = tmp_path / f"{part}.png"
    comparison.draw(record.read(folders), path)
    images.append(matplotlib.image.imread(path))
  assert images[0].shape[0] > 500 and images[0].std() > 0.01
  assert not np.array_equal(*images)


def test_picture_draws_percent_of_the_curves_under_their_names(tmp_path, monkeypatch):
  drawn, plot = {}, axes.Axes.plot

  def kept(self, x, y, *style, **options):
    drawn[options["label"]] = list(y)
    return plot(self, x, y, *style, **options)

  monkeypatch.setattr(axes.Axes, "plot", kept)
  values = {"collapse/unique_0.25": 1.0, "collapse/unique_0.5": 0.5, "collapse/used_sample": 0.25}
  one = _run(tmp_path / "one", _FINAL, [{"step": 4, "probe/knn": 0.75, **values}])
  comparison.draw(record.read([one]), tmp_path / "a.png")
  assert drawn == {
    "one, at 0.25": [100.0],
    "one, at 0.5": [50.0],
    "one, by the sample": [25.0],
    "one": [75.0],
  }
