"""report.png: what it is drawn from, and that a torn one never stands in its place."""

import json

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from protojax.reports import picture, record


def _run(folder, knn=0.5, **arrays):
  """A workdir with what the picture reads."""
  (folder / "eval" / "final").mkdir(parents=True)
  lines = [{"step": s, "train/loss": 7.0 - 0.01 * s, "train/ln_k": 6.9} for s in range(0, 50, 10)]
  lines += [{"step": 40, "probe/knn": knn, "collapse/unique_0.5": 0.9, "probe/linear": None}]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
  np.savez(folder / "eval" / "final" / "arrays.npz", **arrays)
  return folder


def _draw(folder):
  return picture.draw(record.read([folder])[0])


def test_picture_is_drawn_from_what_a_run_leaves(tmp_path):
  rng = np.random.default_rng(0)
  folder = _run(
    tmp_path / "full",
    spectrum=np.array([3.0, 1.0, 0.0]),
    usage=np.array([5, 0, 1]),
    nearest=rng.uniform(0, 1, 30),
    nearest_random=rng.uniform(0.5, 1, 30),
  )
  path = _draw(folder)
  assert path == folder / "report.png"
  image = matplotlib.image.imread(path)
  assert image.shape[0] > 500 and image.std() > 0.01
  assert [file.name for file in folder.glob("report*")] == ["report.png"]


def test_method_without_prototypes_is_drawn_too(tmp_path):
  path = _draw(_run(tmp_path / "none", spectrum=np.array([1.0, 0.5])))
  assert path.stat().st_size > 10_000


def test_picture_changes_with_the_numbers(tmp_path):
  # The same folder name, which is the title.
  spectrum = np.array([1.0, 0.5])
  one = _draw(_run(tmp_path / "a" / "run", spectrum=spectrum))
  two = _draw(_run(tmp_path / "b" / "run", spectrum=np.array([1.0, 0.1])))
  three = _draw(_run(tmp_path / "c" / "run", knn=0.9, spectrum=spectrum))
  images = [matplotlib.image.imread(path) for path in (one, two, three)]
  assert not np.array_equal(images[0], images[1])
  assert not np.array_equal(images[0], images[2])


def test_picture_of_a_resumed_run_shows_the_latest_line_of_a_step(tmp_path):
  spectrum = np.array([1.0, 0.5])
  plain, resumed = (_run(tmp_path / a / "run", spectrum=spectrum) for a in "ab")
  text = (resumed / "metrics.jsonl").read_text()
  (resumed / "metrics.jsonl").write_text(text.replace('"train/loss": 6', '"train/loss": 9') + text)
  images = [matplotlib.image.imread(_draw(folder)) for folder in (plain, resumed)]
  np.testing.assert_array_equal(*images)


def test_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
  folder = _run(tmp_path / "run", spectrum=np.array([1.0, 0.5]))
  before = _draw(folder).read_bytes()

  def torn(figure, path, **options):
    path.write_bytes(b"torn")
    raise RuntimeError

  monkeypatch.setattr(matplotlib.figure.Figure, "savefig", torn)
  with pytest.raises(RuntimeError):
    _draw(folder)
  assert (folder / "report.png").read_bytes() == before and not list(folder.glob("*.tmp"))
