"""The notebook docs/tour.ipynb: its cells run, one after the other, without Jupyter."""

import json
import pathlib
import re

import matplotlib.pyplot as plt

_NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "tour.ipynb"


def _cells():
  notebook = json.loads(_NOTEBOOK.read_text())
  return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _words(said: str) -> list[str]:
  """Without numbers, which are not the same on every machine."""
  return re.findall(r"[A-Za-z]+", said)


def test_the_tour_trains_judges_shows_and_loops(tmp_path, monkeypatch, capsys):
  """Every cell prints lines of the form that its committed output has, or draws where it drew."""
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setattr("tempfile.tempdir", None)  # read anew
  names = {"__name__": "tour"}
  for cell in _cells():
    capsys.readouterr()
    exec("".join(cell["source"]), names)
    said = capsys.readouterr().out
    committed = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
    assert _words(committed) == _words(said), cell["source"][:1]
    drew = any("image/png" in output.get("data", {}) for output in cell["outputs"])
    assert drew == ("".join(cell["source"]).endswith("figure"))
  plt.close("all")
  assert (names["workdir"] / "report.html").is_file()
  assert names["measures"]["step"] == 30 and 0.1 < names["measures"]["probe/knn"] <= 1
  assert names["codes"].shape == (128,) and names["verdict"].sentence
  assert names["found"]["collapse/unique_0.025"] > 0.5
  assert names["losses"][-1] < names["losses"][0]


def test_the_committed_notebook_has_outputs_and_nothing_of_the_machine_that_made_them():
  cells = _cells()
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  assert sum(bool(cell["outputs"]) for cell in cells) >= 4
  text = _NOTEBOOK.read_text()
  assert len(text) < 60_000 and not re.search(r"/(home|root|tmp|Users)/", text)
