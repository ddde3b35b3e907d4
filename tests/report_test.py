"""The page of a report: what it says, what it leaves out, and that it stands alone."""

import html.parser
import json
import re

import matplotlib.figure
import numpy as np
import pytest

from protojax import cli, errors, report
from protojax.reports import charts, gallery, numbers, of_run, page, picture, style
from protojax.reports import record as records

_VOID = {"meta", "img", "br"}
_FINAL = {
  "probe/knn": 0.6197183,
  "probe/linear_fitted": 0.92394,
  "collapse/unique_0.025": 1.0,
  "collapse/unique_0.25": 0.5,
  "collapse/unique_0.025_random": 1.0,
  "collapse/used": 0.17578125,
  "collapse/perplexity": 18.97177,
  "collapse/rankme": 9.8976221,
  "collapse/feature_std": 0.49065,
  "train/loss": 5.2110966,
  "train/ln_k": 5.545177,
  "seconds": 140.9907,
  "step": 50,
  "seed": 3,
}
_CONFIG = {
  "method": {"name": "dino", "prototypes": "mixture", "num_prototypes": 256},
  "optim": {"warmup_steps": 10},
  "num_steps": 50,
  "batch_size": 16,
  "seed": 3,
  "log_every": 10,
  "monitor": {"images": 128},
  "model": {"name": "vit_tiny"},
  "head": {"bottleneck": 16},
  "data": {"name": "digits", "num_records": 1442},
  "probe": {
    "name": "digits",
    "train_split": "train",
    "test_split": "test",
    "k": 20,
    "temperature": 0.07,
  },
}
_PROTOCOL = {"bank": "digits/train (1442 images)", "test": "digits/test (355 images)", "k": 20}


def test_every_link_of_the_navigation_is_seen_on_a_phone():
  """At 400 px links take two rows; what scrolls is the row of runs alone."""
  narrow = style.CSS.partition("@media(max-width:760px){")[2].partition("@media print")[0]
  rules = dict(re.findall(r"(nav[^{}]*)\{([^{}]*)\}", narrow))
  assert "flex-wrap:wrap" in style.CSS.partition("nav div{")[2].partition("}")[0]
  assert not {"nowrap", "overflow"} & set(re.split("[:;-]", rules.get("nav div", "")))
  assert "overflow-x:auto" in rules["nav span"] and "flex:0 0 100%" in rules["nav span"]


class _Page(html.parser.HTMLParser):
  """Elements of a page; fails at a tag that is not closed in its turn."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.data, self.text, self._open = [], [], "", []
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in _VOID:
      self._open.append(tag)
    if tag == "data":
      self.data.append([dict(attrs), ""])

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._open and self._open[-1] not in ("script", "style"):
      self.text += data
    if self._open and self._open[-1] == "data":
      self.data[-1][1] += data

  def all(self, tag):
    return [attrs for name, attrs in self.elements if name == tag]

  def chart(self, title):
    """What the chart of this title draws, from its data-lines."""
    charts_ = [a for a in self.all("svg") if a["aria-label"].startswith(f"{title}. ")]
    return json.loads(charts_[0]["data-lines"])["lines"] if charts_ else None


def _lines(loss=lambda step: 7.0 - 0.01 * step, last=50):
  lines = [{"step": s, "train/loss": loss(s), "train/ln_k": 5.5} for s in range(10, last + 1, 10)]
  return [*lines, {"step": last, "probe/knn": 0.6, "collapse/unique_0.025": 0.9}]


def _run(folder, lines=None, measures=_FINAL, config=_CONFIG, arrays=True, more=()):
  """A workdir as a run leaves it; None leaves a part out."""
  final = folder / "eval" / "final"
  final.mkdir(parents=True)
  lines = _lines() if lines is None else lines
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
  if config is not None:
    (folder / "config.json").write_text(json.dumps(config))
  if measures is not None:
    result = {"measures": measures, "protocol": _PROTOCOL, "environment": {"protojax": "0"}}
    (final / "result.json").write_text(json.dumps(result))
  for name, content in more:
    (folder / "eval" / name).mkdir()
    (folder / "eval" / name / "result.json").write_text(json.dumps(content))
  if arrays:
    rng = np.random.default_rng(0)
    np.savez(
      final / "arrays.npz",
      spectrum=np.array([3.0, 1.0, 0.0]),
      usage=np.array([5, 0, 1]),
      nearest=rng.uniform(0, 1, 30),
      nearest_random=rng.uniform(0.5, 1, 30),
    )
  return folder


def _page(*folders, pictures="none"):
  runs = records.read(folders)
  text = page.build(runs, {run.name: pictures for run in runs}, "command")
  return _Page(text), text


def _measures(folder, file):
  return json.loads((folder / file).read_text())["measures"]


def _pictures(text="a cat"):
  picture = gallery.Picture("data:image/webp;base64,AAAA", text, True)
  card = gallery.Card(7, 3, text, 2 / 3, (picture, picture))
  return gallery.Pictures(
    gallery.Gallery({"Most used": (card,)}, "so found"), ((picture,),), ((picture, picture),)
  )


def test_the_page_needs_nothing_from_outside(tmp_path):
  parsed, text = _page(_run(tmp_path / "run"), pictures=_pictures())
  for tag, attrs in parsed.elements:
    for name in ("src", "href", "action", "data", "xlink:href", "srcset"):
      assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    assert tag not in ("link", "iframe", "object", "base", "form")
  assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|import\(", text)
  assert len(parsed.all("img")) == 5 and all(a["alt"] for a in parsed.all("img"))
  assert all(attrs["aria-label"] for attrs in parsed.all("svg"))


def test_every_number_of_the_tables_is_that_of_its_file(tmp_path):
  more = [("knn", {"measures": {"top1": {"k20": 0.61, "k200": 0.1234567}}, "protocol": {"k": 1}})]
  folders = {
    n: _run(tmp_path / n, measures=_FINAL | {"probe/knn": v}, more=more)
    for n, v in (("one", 0.25), ("two", 0.75))
  }
  parsed, _ = _page(*folders.values())
  shown = set()
  for attrs, text in parsed.data:
    content = _measures(folders[attrs["data-run"]], attrs["data-file"])
    for key in attrs["data-key"].split(".k") if attrs["data-key"] not in content else []:
      content = content[key] if key in content else content[f"k{key}"]
    value = content[attrs["data-key"]] if isinstance(content, dict) else content
    assert float(attrs["value"]) == value
    if text.endswith(" %"):
      assert float(text[:-2]) == pytest.approx(100 * value, abs=0.05)
    elif attrs["data-key"] != "seconds":
      assert float(text.replace(",", "")) == pytest.approx(value, rel=1e-3)
    shown.add((attrs["data-run"], attrs["data-key"]))
  wanted = set(_FINAL) - {"step", "seed", "collapse/unique_0.025_random"}
  wanted |= {"top1.k20", "top1.k200"}
  assert shown == {(run, key) for run in folders for key in wanted}
  assert "2 min 21 s" in parsed.text and "bank digits/train (1442 images)" in parsed.text


def test_several_runs_share_every_chart_and_their_differences_are_named(tmp_path):
  other = _CONFIG | {"batch_size": 777, "seed": 4}
  folders = [_run(tmp_path / "one"), _run(tmp_path / "two", config=other, lines=_lines(last=90))]
  parsed, text = _page(*folders)
  loss = [line for line in parsed.chart("Loss") if "ln K" not in line["n"]]
  assert [(line["n"], line["c"]) for line in loss] == [("one", 0), ("two", 1)]
  assert [line["x"][-1] for line in loss] == [50, 90]
  for title in ("k-NN accuracy", "Images per prototype", "Spectrum of the features"):
    assert {"one", "two"} <= {line["n"] for line in parsed.chart(title)}
  differing = text[text.index("Settings that differ") : text.index("All ")]
  assert "batch_size" in differing and "777" in differing and ">seed<" in differing
  assert "bottleneck" not in differing
  assert "All settings of the runs are the same" not in text


def test_accuracies_on_images_of_different_sizes_stand_in_rows_of_their_own(tmp_path):
  """32 px is never set beside 96 px: not in a row of a table, and in no chart without its size."""
  more = {
    px: [("knn", {"measures": {"top1": 0.5}, "protocol": {"transform": {"px": px}}})]
    for px in (32, 96)
  }
  folders = [
    _run(tmp_path / name, config=_CONFIG | {"augment": {"global_size": px}}, more=more[px])
    for name, px in (("one", 32), ("two", 96), ("three", 96))
  ]
  parsed, _ = _page(*folders)
  assert "k-NN accuracy, at 32 px" in parsed.text and "k-NN accuracy, at 96 px" in parsed.text
  assert "top1, at 32 px" in parsed.text and "Uniqueness, at" not in parsed.text
  shown = [(a["data-run"], a["data-key"]) for a, _ in parsed.data if a["data-key"] == "probe/knn"]
  assert [run for run, _ in shown] == ["one", "two", "three"]
  assert [li["n"] for li in parsed.chart("k-NN accuracy")] == [
    "one, 32 px",
    "two, 96 px",
    "three, 96 px",
  ]
  assert [line["n"] for line in parsed.chart("Loss") if "ln K" not in line["n"]][0] == "one"
  alike, _ = _page(*folders[1:])
  assert ", at 96 px" not in alike.text
  assert [line["n"] for line in alike.chart("k-NN accuracy")] == ["two", "three"]


def test_more_runs_than_columns_fit_are_listed_line_by_line(tmp_path):
  folders = [_run(tmp_path / f"run{i}") for i in range(8)]
  parsed, text = _page(*folders)
  assert 'class="keys many"' in text and 'class="keys"' not in text
  assert "8 runs" in parsed.text
  colours = [(line["n"], line["c"]) for line in parsed.chart("k-NN accuracy")]
  assert colours == [(f"run{i}", i) for i in range(8)]
  assert '<g class="line again c1">' in text  # the colour of run1, but dashed


def test_equal_names_are_told_apart_and_one_run_is_not_taken_twice(tmp_path):
  folders = [_run(tmp_path / a / "run") for a in ("a", "b")]
  assert [run.name for run in records.read(folders)] == [str(f) for f in folders]
  with pytest.raises(errors.UserError, match="twice"):
    records.read([folders[0], tmp_path / "b" / ".." / "a" / "run"])


def test_method_without_prototypes_says_so(tmp_path):
  config = _CONFIG | {"method": {"name": "vicreg", "prototypes": "none", "num_prototypes": 0}}
  lines = [{"step": 10, "train/loss": 3.0, "probe/knn": 0.5}]
  folder = _run(tmp_path / "run", lines, {"probe/knn": 0.5, "step": 10}, config, arrays=False)
  parsed, _ = _page(folder)
  assert "No run here has prototypes" in parsed.text
  assert parsed.chart("Used") is None and parsed.chart("Entropy of the targets") is None
  assert "collapse/used" not in parsed.text


def test_unfinished_run_shows_its_latest_metrics(tmp_path):
  folder = _run(tmp_path / "run", measures=None, arrays=False)
  parsed, _ = _page(folder)
  found = {attrs["data-key"]: attrs for attrs, _ in parsed.data}
  assert float(found["train/loss"]["value"]) == 7.0 - 0.01 * 50
  assert {attrs["data-file"] for attrs in found.values()} == {"metrics.jsonl"}
  assert "Unfinished" in parsed.text and "of step 50" in parsed.text
  assert "step 50" not in parsed.text.replace("of step 50", "")
  assert "are written when a run ends" in parsed.text


def test_ln_k_of_carp_is_told_to_be_that_of_a_block(tmp_path):
  for method, told in ({"partition_size": 64}, "; K: the 64 prototypes of a block"), ({}, ""):
    config = _CONFIG | {"method": _CONFIG["method"] | method}
    run = _run(tmp_path / f"run{len(told)}", config=config)
    text = _page(run)[0].text
    assert f"the largest entropy of a target{told}" in text and ("of a block" in text) == bool(told)


def test_the_picture_of_few_steps_has_whole_steps_on_its_axes(tmp_path, monkeypatch):
  drawn, savefig = [], matplotlib.figure.Figure.savefig

  def keep(figure, *args, **options):
    drawn.append(figure)
    savefig(figure, *args, **options)

  monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
  lines = [{"step": 1, "train/loss": 3.0}]
  lines += [{"step": 3, "train/loss": 2.9, "collapse/unique_0.25": 1.0, "collapse/unique_0.5": 0.9}]
  folder = _run(tmp_path / "run", lines, {"step": 3}, _CONFIG | {"num_steps": 3})
  picture.draw(records.read([folder])[0])
  for axis in drawn[0].axes[:3]:
    low, high = axis.get_xlim()
    shown = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert low == 0 and 3 < high < 4 and shown == [0, 1, 2, 3]
  points = {line.get_marker() for line in drawn[0].axes[1].lines if len(line.get_xdata()) == 1}
  assert len(points) == 2  # told apart


def test_numbers_of_an_earlier_step_say_it(tmp_path):
  """Of a run that was extended from 10 steps and is under way again, evaluated before."""
  floors = {"floor/knn_untrained": 0.2, "floor/knn_pixels": 0.3, "floor/linear_pixels": 0.5}
  end = {"probe/knn": 0.35, "probe/linear": 0.375, "probe/linear_fitted": 0.25}
  lines = [{"step": 0, **floors}, {"step": 10, "train/loss": 3.0, **end}]
  lines += [{"step": 500, "train/loss": 2.0, "probe/knn": 0.45, "collapse/rankme": 30.0}]
  knn = {"measures": {"top1": 0.3125}, "protocol": {"name": "knn", "model": {"step": 10}}}
  config = _CONFIG | {"num_steps": 900}
  folder = _run(tmp_path / "run", lines, None, config, arrays=False, more=[("knn", knn)])
  parsed, text = _page(folder)
  assert "eval/knn/result.json, of step 10: 1 numbers" in parsed.text
  assert "probe/linear_fitted" not in {attrs["data-key"] for attrs, _ in parsed.data}
  before, *more = text.split("<small>step 10</small>")
  assert len(more) == 1 and before.rpartition('data-key="')[2].startswith('probe/linear"')
  assert "worse than raw pixels" not in parsed.text


def test_run_that_has_only_begun_is_a_page_too(tmp_path):
  folder = _run(tmp_path / "run", lines=[], measures=None, arrays=False, config=None)
  parsed, _ = _page(folder)
  assert "No number was written yet" in parsed.text and "no verdict" in parsed.text
  assert "config.json was left out: No such file" in parsed.text
  assert "No measure of prototypes was written yet" in parsed.text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
  folder = _run(tmp_path / "run")
  (folder / "eval" / "final" / "arrays.npz").write_bytes(b"PK\x03\x04 torn")
  (folder / "eval" / "knn").mkdir()
  (folder / "eval" / "knn" / "result.json").write_text("{")
  (folder / "config.json").write_text("[]")
  parsed, _ = _page(folder)
  for name in ("eval/final/arrays.npz", "eval/knn/result.json", "config.json"):
    assert f"{name} was left out" in parsed.text
  assert parsed.chart("Loss") and "62.0 %" in parsed.text


def test_metrics_that_cannot_be_read_leave_the_result(tmp_path):
  folder = _run(tmp_path / "run")
  (folder / "metrics.jsonl").unlink()
  parsed, _ = _page(folder)
  assert "metrics.jsonl was left out: No such file" in parsed.text and "62.0 %" in parsed.text
  assert parsed.chart("Loss") is None and parsed.chart("Images per prototype")


def test_truncated_last_line_is_left_out_and_said(tmp_path):
  folder = _run(tmp_path / "run")
  with open(folder / "metrics.jsonl", "ab") as file:
    file.write(b'{"step": 60, "train/loss": 1.5, "tr')
  run = records.read([folder])[0]
  assert run.curves["train/loss"][0].tolist() == [10, 20, 30, 40, 50]
  assert run.notes == ("1 unreadable line of metrics.jsonl left out.",)


def test_of_resumed_runs_the_latest_line_of_a_step_counts(tmp_path):
  first = [{"step": s, "train/loss": 1.0} for s in (10, 20, 30, 40)]
  # Gone on from step 10; what the abandoned start wrote at 40 must go, too.
  again = [{"step": s, "train/loss": 2.0} for s in (20, 30)]
  twice = [{"step": 30, "train/loss": 3.0}, {"step": 30, "probe/knn": 0.5}]
  run = records.read([_run(tmp_path / "run", [*first, *again, *twice])])[0]
  steps, values = run.curves["train/loss"]
  assert steps.tolist() == [10, 20, 30] and values.tolist() == [1.0, 2.0, 3.0]
  assert run.curves["probe/knn"][0].tolist() == [30]


@pytest.mark.parametrize("bad", ["null", "NaN", "Infinity", "1e999", "1" + 400 * "0"])
def test_value_that_is_not_finite_is_a_marked_gap(tmp_path, bad):
  folder = _run(tmp_path / "run", _lines(), measures=None)
  text = (folder / "metrics.jsonl").read_text()
  (folder / "metrics.jsonl").write_text(text.replace(f"{7.0 - 0.01 * 30!r}", bad))
  run = records.read([folder])[0]
  assert np.isnan(run.curves["train/loss"][1]).tolist() == [False, False, True, False, False]
  parsed, text = _page(folder)
  assert text.count('class="gap"') == 1
  loss = text[text.index('aria-label="Loss.') :]
  drawn = re.search(r'<g class="line c0"><path d="([^"]*)"', loss)[1]
  assert re.sub("[^ML]", "", drawn) == "MLML"
  assert parsed.chart("Loss")[0]["y"][2] == "not finite"


def test_names_from_outside_are_text_and_never_markup(tmp_path):
  evil = "<script>alert(1)<&\"'onload=x "
  measures = _FINAL | {evil: 1.0}
  more = [("x<img src=y>", {"measures": {evil: 2.0}, "protocol": {evil: evil}})]
  config = _CONFIG | {"method": _CONFIG["method"] | {"name": evil}, evil: evil}
  lines = [*_lines(), {"step": 50, evil: 3.0, f"collapse/{evil}unique_0.025": 0.5}]
  folders = [_run(tmp_path / f"{evil}{i}", lines, measures, config, more=more) for i in "12"]
  parsed, text = _page(*folders, pictures=_pictures(evil))
  assert len(parsed.all("script")) == 1 and "<script>alert" not in text
  assert not [attrs for _, attrs in parsed.elements if {"onload", "onerror"} & set(attrs)]
  assert evil in parsed.text and parsed.all("img")[0]["alt"] == evil
  assert all(attrs["src"].startswith("data:") for attrs in parsed.all("img"))


def test_collapse_is_said_in_words_not_by_colour_alone(tmp_path):
  ill = _FINAL | {"collapse/feature_std": 0.001, "step": 100}
  parsed, text = _page(_run(tmp_path / "run", measures=ill))
  assert "representation collapse" in parsed.text and 'class="run bad"' in text
  assert "✕" in parsed.text
  early = records.read([_run(tmp_path / "early")])[0]
  assert numbers.verdict(early)[:2] == ("open", "warming up")
  late = _run(
    tmp_path / "well", measures=_FINAL | {"step": 500}, config=_CONFIG | {"num_steps": 500}
  )
  assert numbers.verdict(records.read([late])[0])[:2] == ("ok", "ok")


def test_the_tick_is_not_given_to_a_net_that_raw_pixels_beat_and_floors_are_dashed(tmp_path):
  floors = {"floor/knn_pixels": 0.977, "floor/knn_untrained": 0.434, "floor/bank_images": 1442.0}
  measures = _FINAL | floors | {"step": 500}
  lines = [{"step": 0, **floors}, *_lines()]
  folder = _run(tmp_path / "run", lines, measures, _CONFIG | {"num_steps": 500})
  parsed, text = _page(folder)
  assert "little learned yet" in parsed.text and 'class="run warn"' in text and "✓" not in text
  assert "97.7 %" in parsed.text and "43.4 %" in parsed.text and "1,442 bank" in parsed.text
  drawn = {line["n"]: line for line in parsed.chart("k-NN accuracy")}
  assert drawn["raw pixels"]["y"] == ["97.7 %"] * 2 and drawn["raw pixels"]["x"] == [0.0, 50.0]
  assert drawn["untrained net"]["y"] == ["43.4 %"] * 2


def test_further_prototype_sets_have_tables_and_charts_of_their_own(tmp_path):
  measures = _FINAL | {"collapse/patch_unique_0.025": 0.25, "collapse/patch_used": 0.75}
  lines = [*_lines(), {"step": 50, "collapse/patch_unique_0.025": 0.25}]
  parsed, text = _page(_run(tmp_path / "run", lines, measures))
  assert text.count("<summary>Prototype set: patch</summary>") == 2
  assert "75.0 %" in parsed.text


def test_a_long_line_keeps_its_extremes():
  y = np.sin(np.arange(50_000) / 500.0)
  y[31_234], y[7] = 40.0, np.nan
  line = charts._thinned(charts.Line("x", np.arange(50_000.0), y))
  assert len(line.x) < 700 and np.nanmax(line.y) == 40.0
  assert line.x[np.nanargmax(line.y)] == 31_234 and np.isnan(line.y[line.x == 7]).all()
  assert line.x[[0, -1]].tolist() == [0, 49_999]


@pytest.mark.parametrize("scale", [charts.LINEAR, charts.PERCENT, charts.LOG, charts.COUNT])
def test_points_lie_where_the_axis_says(scale):
  """A tick's label stands at the height at which the line has the label's value."""
  y = np.array([0.5, 1.0, 10.0, 100.0])
  text = charts.figure(
    "t", [charts.Line("a", np.arange(4.0), y)], x_label="x", caption="c", scale=scale
  )
  path = re.search(r'<g class="line c0"><path d="([^"]*)"', text)[1]
  heights = [float(p.split(" ")[1]) for p in re.split("[ML]", path)[1:]]
  assert heights == sorted(heights, reverse=True)
  ticks = {}
  for height, label in re.findall(r'<text class="y" x="[\d.]+" y="([\d.]+)">([^<]*)<', text):
    share = 0.01 if label.endswith(" %") else 1.0
    ticks[share * float(label.removesuffix(" %").replace(",", ""))] = float(height) - 3.5
  assert len(ticks) >= 3 and all(10 <= height <= 194 for height in ticks.values())
  inner = {v: h for v, h in ticks.items() if y[0] <= v <= y[-1]}
  place = [float(scale.place(np.float64(v))) for v in y]
  for value, height in inner.items():
    expected = np.interp(float(scale.place(np.float64(value))), place, heights)
    assert height == pytest.approx(expected, abs=0.11)


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.0, "0"),
    (1024.0, "1,024"),
    (5.2110966, "5.211"),
    (0.0025, "0.0025"),
    (3e-7, "3e-07"),
    (-12.5, "-12.5"),
    (99999.0, "99,999"),
    (2.5e9, "2.5e+09"),
    (float("nan"), "not finite"),
  ],
)
def test_numbers_are_written_short(value, text):
  assert charts.number(value) == text


def test_ticks_of_long_runs_are_short():
  lines = [charts.Line("a", np.array([0.0, 1.2e6]), np.array([1.0, 2.0]))]
  text = charts.figure("t", lines, x_label="step", caption="c")
  labels = re.findall(r'<text class="x"[^>]*>([^<]*)<', text)
  assert labels == ["0", "250k", "500k", "750k", "1M", "step"]


@pytest.fixture
def no_pictures(monkeypatch):
  """Pictures are gallery_test.py's."""
  monkeypatch.setattr(of_run, "pictures", lambda run, limit: f"none, {limit}")


@pytest.mark.usefixtures("no_pictures")
def test_a_comparison_leaves_the_pages_of_its_runs_alone(tmp_path, capsys):
  one, two = (_run(tmp_path / name) for name in ("one", "two"))
  report.main([f"--workdir={one}"])
  report.main([f"--workdir={one}", f"--workdir={two}"])
  assert (one / "report.html").read_text().count('class="run open"') == 1
  assert (one / "comparison.html").read_text().count('class="run open"') == 2
  assert not list(two.glob("*.html"))
  lines = capsys.readouterr().out.splitlines()
  assert "report.html: 1 run, 0." in lines[0] and "comparison.html: 2 runs, 0." in lines[-1]
  assert lines[-2] == f"{one / 'comparison.png'}: the picture"
  assert (one / "comparison.png").exists() and not (one / "report.png").exists()
  assert [line.split()[0] for line in lines if "62.0 %" in line] == ["one", "two"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([], "--workdir"),
    (["--workdir={tmp}/gone"], "holds no run of protojax"),
    (["--workdir={tmp}"], "holds no run of protojax"),
    (["--workdir={tmp}/run", "--workdir={tmp}/run"], "given twice"),
    (["--workdir={tmp}/run", "--limit=-1"], "must not be negative"),
    (["--workdir={tmp}/run", "--limit=x"], "invalid int value"),
    (["--workdir={tmp}/run", "--out={tmp}/file/r.html"], "cannot write to"),
    (["--workdir={tmp}/run", "--out={tmp}/r.png"], "a name that ends in .html"),
    (["--workdir={tmp}/run", "--out={tmp}/r.pdf"], "a name that ends in .html"),
    (["--workdir={tmp}/run", "--open"], "unrecognized arguments"),
  ],
)
def test_mistake_is_one_line_and_status_2(tmp_path, capsys, arguments, words):
  _run(tmp_path / "run")
  (tmp_path / "file").write_text("x")
  with pytest.raises(SystemExit) as end:
    cli.guarded(report.main, [a.format(tmp=tmp_path) for a in arguments])
  error = capsys.readouterr().err
  assert end.value.code == 2 and error.startswith("protojax: ") and words in error
  assert error.count("\n") == 1 and not list(tmp_path.glob("**/*.html*"))
