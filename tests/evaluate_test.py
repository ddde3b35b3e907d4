"""The program on a workdir: results, certificates, comparisons, and mistakes."""

import contextlib
import io
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from protojax import cli, errors, evaluate, loading, pretrained, recipes, resolving
from protojax.data import sources
from protojax.evals import clustering, knn, long_tail, protocols, result_files
from protojax.evaluating import floors, judged
from protojax.training import checkpoint, datasets, export, programs, workdir

pytestmark = pytest.mark.xdist_group("evaluate")  # one worker: its tests share a costly fixture

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a run on a long tail with two checkpoints, and every protocol's result.

  Its states are not trained: that would take longer than everything else here.
  """
  config = recipes.load(str(ROOT / "configs" / "quickstart.py:debug"))
  config.model.update({"depth": 1, "width": 32, "heads": 2})
  config.data.imbalance = 10.0
  config.method.num_prototypes = 32
  config = resolving.resolve(config, len(datasets.of_run(config)[0]))
  folder = workdir.claim(str(tmp_path_factory.mktemp("evaluate") / "run"), config)
  program = programs.Program(config)
  with contextlib.closing(checkpoint.Checkpoints(folder)) as checkpoints:
    for step in (1, 2):
      state = program.init(step)
      checkpoints.save(step, state, workdir.metadata(config, 0.0))
      workdir.export_encoder(folder, step, state, program)
  with contextlib.redirect_stdout(io.StringIO()) as said:
    evaluate.main([f"--workdir={folder}", "--protocol=all", "--epochs=1"])
  (folder / "said.txt").write_text(said.getvalue())
  return folder


def _result(run, name):
  return json.loads((run / "eval" / name / "result.json").read_text())


def _evaluate(*argv):
  evaluate.main([str(a) for a in argv])


def _refused(words, *argv):
  with pytest.raises(errors.UserError, match=words) as caught:
    _evaluate(*argv)
  assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def rows(run):
  """(bank, test) as `pretrained.encoded` gives them."""
  model = loading.load(str(run))
  return [
    pretrained.encoded(model, pretrained.source(model, split), parts=("features", "codes"))
    for split in ("train", "test")
  ]


def test_measures_are_those_of_the_functions_on_the_same_rows(run, rows):
  bank, test = rows
  got = _result(run, "knn")["measures"]
  assert got == knn.evaluate(
    bank["features"]["last"],
    bank["label"],
    test["features"]["last"],
    test["label"],
    num_classes=10,
  )
  got = _result(run, "clustering")["measures"]
  for split, seen in (("train", bank), ("test", test)):
    expected = clustering.evaluate(
      seen["codes"]["prototypes"], seen["label"], num_codes=32, num_classes=10
    )
    assert {k: got[f"{split}_prototypes_{k}"] for k in expected} == expected
    assert got[f"{split}_kmeans_hungarian"] > 0.1
  few = _result(run, "low_shot")["measures"]
  assert few["1_per_class_images"] == 10 and few["10_percent_images"] == 143


def test_a_result_says_everything_that_made_it(run, rows):
  bank, test = rows
  result = _result(run, "knn")
  assert set(result) == {"measures", "protocol", "environment"}
  protocol = result["protocol"]
  assert protocol["bank"] == {
    "data": "digits",
    "split": "train",
    "images": 1442,
    "unreadable": 0,
    "classes": 10,
    "names": result_files.names(sources.build("digits", split="train")),
    "content": result_files.content(bank["index"], bank["label"]),
  }
  assert protocol["test"]["images"] == 355
  assert protocol["test"]["content"] != protocol["bank"]["content"]
  assert protocol["k"] == [10, 20, 100, 200] and protocol["temperature"] == [0.07]
  assert protocol["transform"] == {"storage_px": 32, "px": 32, "crop": 1.0}
  assert protocol["model"]["weights"] == "teacher" and protocol["model"]["step"] == 2
  assert protocol["model"]["prototypes"] == {"prototypes": 32}
  assert {"jax", "scikit-learn", "devices"} <= set(protocol["software"])
  assert _result(run, "low_shot")["protocol"]["lambda"] == "0.1 / n"
  assert "arithmetic" in _result(run, "clustering")["protocol"]["nmi"]


def _draw(root):
  """Images of two classes, six of each, for training and test."""
  rng = np.random.default_rng(0)
  for split in ("train", "test"):
    for name in "ab":
      (root / split / name).mkdir(parents=True)
      for i in range(6):
        pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def test_what_was_missing_when_weights_were_converted_stands_with_their_numbers(
  run, tmp_path, capsys
):
  tensors, info = export.read(run / "exported")
  fresh = {"params.backbone.norm.scale": "norm.weight"}
  export.write(tmp_path / "theirs", tensors, info | {"initialised": fresh})
  _draw(tmp_path / "images")
  (tmp_path / "images" / "test").rename(tmp_path / "images" / "third")
  flags = ["--protocol=knn", "--k=5", "--data=folder", f"--data_dir={tmp_path / 'images'}"]
  _evaluate(f"--workdir={tmp_path / 'theirs'}", *flags, "--test_split=third")
  said = (
    "NOTE: 1 tensor is freshly initialised, missing in the file that was converted: norm.weight"
  )
  shown = capsys.readouterr().out
  assert shown.count(said) == 1
  assert re.search(r"floors on these images, k = 12: k-NN raw pixels \S+%, untrained \S+%", shown)
  protocol = _result(tmp_path / "theirs", "knn")["protocol"]
  assert protocol["model"]["initialised"] == ["norm.weight"]
  assert protocol["test"]["split"] == "third"


def test_images_that_cannot_be_read_are_told_beside_the_numbers(run, tmp_path, capsys):
  """So that the counts of the listing and of the result are seen to agree."""
  shutil.copytree(run / "exported", tmp_path / "exported")
  config = json.loads((tmp_path / "exported" / "config.json").read_text())
  (tmp_path / "exported" / "config.json").write_text(json.dumps(config | {"step": None}))
  _draw(tmp_path / "images")
  (tmp_path / "images" / "train" / "b" / "3.png").write_bytes(b"no image")
  flags = ["--protocol=knn", "--k=5", "--data=folder", f"--data_dir={tmp_path / 'images'}"]
  _evaluate(f"--workdir={tmp_path / 'exported'}", *flags)
  said = capsys.readouterr().out
  assert "bank folder train (11 images), test folder test (12)" in said and "None" not in said
  assert "left out: 1 of 12 images of folder train, which cannot be read" in said
  assert said.count("which cannot be read") == 1


def test_all_protocols_end_in_one_table_of_test_scores_that_says_what_was_chosen_where(run, rows):
  lines = (run / "said.txt").read_text().splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith("protocol "))
  assert lines[start - 1].endswith("on 355 test images (digits test) at 32 px")
  assert lines[-2].startswith("held-out bank: a tenth of the train images, no test image")
  assert re.fullmatch("floors on these images, k = 20: k-NN .*, untrained .*", lines[-1])
  table = [line.split() for line in lines[start + 1 : -2]]
  assert max(map(len, lines[start:])) <= 80
  share = np.bincount(rows[1]["label"]).max() / 355
  for protocol, measure, value, *chosen, chance in table:
    measures = _result(run, protocol)["measures"]
    assert value == result_files.show(measures[measure])
    fitted = "linear" in protocol + measure and not measure.startswith("even_")
    assert " ".join(chosen) == ("held-out bank" if fitted else "-")
    expected = "-" if protocol == "long_tail" else f"{share:.4f}"
    if protocol == "clustering":
      expected = result_files.show(measures[f"{measure}_uniform"])
    assert chance == expected
  measures = [(row[0], row[1]) for row in table]
  assert ("knn", "top1_k20_T0.07") in measures and ("linear", "accuracy") in measures
  assert ("clustering", "test_prototypes_nmi") in measures and len(measures) >= 15
  # Scores of images that chose something are named so, and stand in no table of test scores.
  held_out = [k for k in _result(run, "linear")["measures"] if "best_of" in k]
  assert held_out and all(k.startswith("held_out_best_of_") for k in held_out)
  assert "best_of" not in "\n".join(lines[start:])
  paper = protocols.headlines("linear", {"accuracy": 0.5}, {"mode": "paper"}, 0.1)
  assert [row.chosen_on for row in paper] == ["TEST IMAGES"]


def test_content_changes_with_an_image_a_label_or_the_order():
  index, label = np.arange(5), np.array([0, 1, 0, 1, 1])
  prints = [
    result_files.content(index, label),
    result_files.content(index, label[::-1]),
    result_files.content(index + 1, label),
    result_files.content(index[::-1], label[::-1]),
  ]
  assert len(set(prints)) == 4
  assert prints[0] == result_files.content(index.astype(np.int32), label.astype(np.int32))


def test_data_sets_of_as_many_images_and_classes_are_told_apart_wherever_they_lie(tmp_path):
  def made(root, classes, height=32, file="{}.png"):
    for name in classes:
      (root / "train" / name).mkdir(parents=True)
      for i in range(3):
        image = Image.fromarray(np.zeros((height, 32, 3), np.uint8))
        image.save(root / "train" / name / file.format(i))
    return result_files.names(sources.build("folder", split="train", data_dir=root))

  one = made(tmp_path / "one", "ab")
  assert made(tmp_path / "moved", "ab") == one
  others = [
    made(tmp_path / "classes", "ac"),
    made(tmp_path / "sizes", "ab", height=31),
    made(tmp_path / "names", "ab", file="x{}.png"),
  ]
  assert len({one, *others}) == 4
  earlier, now, then = {"bank": {}}, {"bank": {"names": one}}, {"bank": {"names": "x"}}
  assert result_files.differences(earlier, now) == []
  assert result_files.differences(now, then) == [f"bank.names {one} -> x"]


def test_long_tail_takes_the_images_the_run_was_trained_on(run):
  result = _result(run, "long_tail")
  model = loading.load(str(run))
  data = datasets.of_run(model.config)[0]
  assert result["protocol"]["bank"]["images"] == len(data) < 1442
  assert result["protocol"]["bank"]["split"] == "train, imbalance 10, seed 0"
  split = long_tail.splits(data.labels, 10)
  assert {k: v.tolist() for k, v in split.items()} == data.tail_split
  measures = result["measures"]
  assert [measures[f"classes_{s}"] for s in long_tail.SPLITS] == [len(v) for v in split.values()]
  for kind in ("used", "unique"):
    shares = [measures[f"prototypes_{kind}_{s}"] for s in long_tail.SPLITS]
    assert sum(shares) == pytest.approx(1.0)


def test_paper_mode_says_that_it_selected_on_the_test_images(run, capsys, tmp_path):
  assert "held-out tenth" in _result(run, "linear")["protocol"]["selection"]
  copy = shutil.copytree(run, tmp_path / "run")
  _evaluate(
    f"--workdir={copy}",
    "--protocol=linear",
    "--mode=paper",
    "--epochs=1",
    "--layers=last",
    "--overwrite",
  )
  protocol = _result(copy, "linear")["protocol"]
  assert protocol["mode"] == "paper"
  assert protocol["selection"] == "layer and rate on the test images"
  assert "selected on the test images" in capsys.readouterr().out
  _refused("linear: .*mode honest -> paper", "--compare", run, copy, "--protocol=linear")


def test_the_same_again_replaces_its_own_file_only(run, tmp_path):
  copy = tmp_path / "moved" / "run"
  shutil.copytree(run, copy)
  files = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
  _evaluate(f"--workdir={copy}", "--protocol=knn")
  after = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
  assert {p for p in after if after[p] != files.get(p)} == {copy / "eval" / "knn" / "result.json"}
  assert _result(copy, "knn")["measures"] == _result(run, "knn")["measures"]


def test_a_result_made_otherwise_is_not_replaced_without_overwrite(run, capsys):
  path = run / "eval" / "knn" / "result.json"
  protocol = _result(run, "knn")["protocol"]
  result_files.require_free(path, protocol | {"software": {"jax": "0"}, "k": (10, 20, 100, 200)})
  result_files.require_free(path.with_name("none.json"), {})
  for part, words in (
    ({"model": protocol["model"] | {"step": 1}}, "model.step 2 -> 1.*add --overwrite"),
    ({"k": [5]}, r"k \[10, 20, 100, 200\] -> \[5\]"),
  ):
    with pytest.raises(errors.UserError, match=words):
      result_files.require_free(path, protocol | part)
  before = path.read_bytes()
  _refused("add --overwrite", f"--workdir={run}", "--protocol=knn", "--step=1")
  assert path.read_bytes() == before and capsys.readouterr().out == ""


def test_compare_shows_both_and_the_difference_of_two_steps(run, tmp_path, capsys):
  copy = shutil.copytree(run, tmp_path / "run")
  (copy / "eval" / "step_1").mkdir()  # as of an extended run
  measured = {"measures": {"probe/knn": 0.5}, "protocol": {"bank": "digits/train"}}
  (copy / "eval" / "step_1" / "result.json").write_text(json.dumps(measured))
  _evaluate(f"--workdir={copy}", "--protocol=knn", "--step=1", "--overwrite")
  capsys.readouterr()
  _evaluate("--compare", run / "eval" / "knn" / "result.json", copy, "--protocol=knn")
  out = capsys.readouterr().out
  a, b = (_result(w, "knn")["measures"]["top1_k20_T0.07"] for w in (run, copy))
  line = next(line for line in out.splitlines() if "top1_k20_" in line)
  assert line.split() == ["top1_k20_T0.07", f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"]
  assert "model.step 2 -> 1" in out and "transform" not in out


def test_unlike_protocols_are_refused_in_one_line_with_every_difference(run, tmp_path):
  other = tmp_path / "result.json"
  result = _result(run, "knn")
  result["protocol"]["k"] = [20]
  result["protocol"]["bank"]["content"] = "sha256:0"
  result["protocol"]["model"]["seed"] = 7  # this may differ
  other.write_text(json.dumps(result))
  _refused(
    r"bank.content sha256:\w+ -> sha256:0; knn: k \[10, 20, 100, 200\] -> \[20\]$",
    "--compare",
    run,
    other,
  )


def test_images_of_another_size_are_never_compared(run, tmp_path):
  other = tmp_path / "result.json"
  result = _result(run, "knn")
  result["protocol"]["transform"]["px"] = 96
  other.write_text(json.dumps(result))
  _refused("transform.px 32 -> 96$", "--compare", run, other)


def test_compare_needs_results_of_both(run, tmp_path):
  _refused("no eval/.*/result.json", "--compare", run, tmp_path)
  (tmp_path / "result.json").write_text("{}")
  _refused("is not a result of", "--compare", run, tmp_path / "result.json")
  other = tmp_path / "knn.json"
  other.write_text(json.dumps(_result(run, "knn")))
  _refused("no protocol in common", "--compare", other, run, "--protocol=linear")


def test_exported_weights_are_judged_beside_themselves_and_say_what_was_left_out(
  run, tmp_path, capsys
):
  exported = shutil.copytree(run / "exported", tmp_path / "exported")
  _evaluate(f"--workdir={exported}", "--protocol=clustering", "--data=digits")
  assert "left out" not in capsys.readouterr().out
  got, expected = (_result(w, "clustering")["measures"] for w in (exported, run))
  assert got.keys() == expected.keys()
  for k in got:
    assert got[k] == pytest.approx(expected[k], abs=0.02)
  (exported / "prototypes.safetensors").unlink()
  _evaluate(f"--workdir={exported}", "--protocol=clustering", "--data=digits", "--overwrite")
  assert "left out: codes of prototypes: there are no prototypes" in capsys.readouterr().out
  assert set(_result(exported, "clustering")["measures"]) == {k for k in got if "_kmeans_" in k}


def test_what_the_bank_has_no_images_for_is_named():
  label = np.repeat([0, 1, 2], [150, 30, 4])
  rows = {"features": {"last": np.zeros((184, 2))}, "label": label}
  encoded = protocols.Encoded(rows, rows, 3, {})
  assert protocols.tail(encoded).notes == ["allocation of prototypes: there are no prototypes"]
  near = protocols.knn(encoded, ks=None, temperatures=(0.07,))
  assert near.settings["k"] == [10, 20, 100] and near.notes == ["k=200: the bank has 184 images"]
  few = protocols.few_shot(encoded)
  assert few.notes == ["5 a class: the smallest class of the bank has 4 images"]
  assert few.settings["per_class"] == [1, 2]
  one = {"features": {"last": np.zeros((90, 2))}, "label": np.repeat([0, 1, 2], 30), "codes": {}}
  assert protocols.tail(protocols.Encoded(one, one, 3, {})).notes == [
    "many: no class of the bank has over 100 images",
    "few: no class of the bank has 1 to 19 images",
  ]


def test_features_that_are_not_finite_are_counted(run, tmp_path):
  exported = shutil.copytree(run / "exported", tmp_path / "exported")
  file = exported / "encoder.safetensors"
  with safetensors.safe_open(file, framework="numpy") as opened:
    metadata = opened.metadata()
  tensors = safetensors.numpy.load_file(file)
  name = next(k for k in tensors if "cls_token" in k)
  tensors[name] = np.full_like(tensors[name], np.nan)
  safetensors.numpy.save_file(tensors, file, metadata=metadata)
  _refused(
    "1442 of 1442 rows of features of digits/train .*NaN.* of .*exported 1 of .* NaN or infinity: "
    "params.backbone.cls_token: export or convert an earlier or an undamaged checkpoint",
    f"--workdir={exported}",
    "--protocol=knn",
    "--data=digits",
  )
  assert not (exported / "eval").exists()


def _labelled(name, labels, class_names):
  labels = np.array(labels, np.int32)
  return sources.Source(name, np.arange(labels.size), None, labels, str, class_names)


@pytest.mark.parametrize(
  ("bank", "test", "class_names", "words"),
  [
    ([0, 0], [0], ["cat"], "^shop/test has one class, so every answer is right"),
    ([0, 0], [0], ["cat", "dog"], "all images of shop/train are of class 'cat'"),
    (
      [0, 1],
      [0, 2],
      ["cat", "dog", "emu"],
      "^1 classes of shop/test have no image in shop/train, 'emu' first",
    ),
    ([0, 1], [0, -1], ["cat", "dog"], "1 of 2 images of shop/test have no label"),
  ],
)
def test_labels_that_say_nothing_are_one_line(run, monkeypatch, bank, test, class_names, words):
  images = {
    "train": _labelled("shop/train", bank, class_names),
    "test": _labelled("shop/test", test, class_names),
  }

  def rows(model, source, **options):
    labels, features = source.labels, np.ones((len(source), 4), np.float32)
    return {"label": labels, "index": np.arange(labels.size), "features": {"last": features}}

  monkeypatch.setattr(pretrained, "source", lambda model, split, **options: images[split])
  monkeypatch.setattr(pretrained, "encoded", rows)
  _refused(words, f"--workdir={run}", "--protocol=knn", "--k=1", "--overwrite")


def _images(root, names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(
      root / name
    )
  return f"--data_dir={root}"


@pytest.mark.parametrize(
  ("names", "words"),
  [
    (["train/0.png", "test/0.png"], "needs labels and .*train has none"),
    (["train/a/0.png", "train/b/1.png", "test/a/0.png", "test/c/0.png"], "different classes"),
    (["train/a/0.png", "train/b/1.png", "test/0.png"], "needs labels and .*test has none"),
    (
      ["train/a/0.png", "train/b/1.png", "test/a/0.png", "test/b/0.png"],
      "--k=10 neighbours of a bank of 2 images",
    ),
  ],
)
def test_unusable_images_are_one_line(run, tmp_path, names, words):
  exported = shutil.copytree(run / "exported", tmp_path / "exported")
  data = _images(tmp_path / "images", names)
  _refused(words, f"--workdir={exported}", "--protocol=knn", "--data=folder", data)
  assert not (exported / "eval").exists()


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--step=5"], "no checkpoint 5 in .*: there are 2, 1"),
    (["--k=2000"], "--k=2000 neighbours of a bank of 1442 images"),
    (["--k=0"], "choose 1 to 1442"),
    (["--k=many"], "--k: invalid"),
    (["--temperature=0"], "--temperature=0 must be positive"),
    (["--protocol=linear", "--layers=last9"], "--layers=last9 is unknown here: there are last"),
    (["--protocol=linear", "--epochs=0"], "--epochs=0 must be at least 1"),
    (["--protocol=fast"], "invalid choice: 'fast'"),
    (["--data=nothing", "--data_dir=."], "no data set 'nothing'"),
    (
      ["--data=digits", "--test_split=train"],
      "1442 images of --test_split=train are in --train_spl",
    ),
    (
      ["--test_split=val"],
      "--test_split=val is of data that --data names; the run's own is config",
    ),
  ],
)
def test_mistakes_are_one_line(run, arguments, words):
  _refused(words, f"--workdir={run}", "--protocol=knn", *arguments)


def test_a_folder_without_a_run_is_one_line_and_status_2(tmp_path, capfd):
  with pytest.raises(SystemExit) as ended:
    cli.guarded(evaluate.main, [f"--workdir={tmp_path}"])
  done = capfd.readouterr()
  assert ended.value.code == 2 and done.out == ""
  assert done.err.startswith("protojax: ") and len(done.err.splitlines()) == 1
  assert not list(tmp_path.iterdir())


def test_nothing_to_judge_is_one_line():
  with pytest.raises(SystemExit) as stopped:
    cli.guarded(evaluate.main, [])
  assert stopped.value.code == 2


def _of_digits(split, num=None):
  source = sources.build("digits", split=split)
  return judged.Images(source, split, {"label": np.zeros(num or len(source), int)})


def test_floors_are_measured_on_the_images_of_the_accuracies(run):
  """The state of checkpoint 1 is the untrained net of seed 1, so that its k-NN is that floor."""
  model = loading.load(str(run), step=1)
  config = model.config.copy_and_resolve_references()
  config.seed = 1
  model = model._replace(config=config)
  bank, test = _of_digits("train"), _of_digits("test")
  (line,) = floors.lines(model, bank, test, own=True)
  rows = [pretrained.encoded(model, images.source) for images in (bank, test)]
  options = {"num_classes": 10, "k": 20, "temperature": 0.07}

  def accuracy(of):
    (a, x), (b, y) = ((of(r), r["label"]) for r in rows)
    return knn.accuracy(a, x, b, y, **options)

  untrained = accuracy(lambda r: r["features"]["last"])
  assert f"untrained {untrained:.1%}" in line
  found = re.fullmatch(
    r"  floors on these images, k = 20: k-NN raw pixels (.*)%, untrained .*", line
  )
  assert float(found[1]) > 90  # of digits
  said = " ".join((run / "said.txt").read_text().split())
  assert said.count("floors on these images, k = 20") == 3  # knn, linear, and the table


def test_floors_of_the_training_are_those_of_its_images(tmp_path):
  run = pretrained.Trained._make([None] * len(pretrained.Trained._fields))
  run = run._replace(kind="run", path=str(tmp_path))
  known = {"step": 0, "floor/knn_pixels": 0.977, "floor/knn_untrained": 0.904}
  known |= {"floor/bank_images": 512, "floor/test_images": 355}
  (tmp_path / "metrics.jsonl").write_text(json.dumps(known) + "\n")
  few, many = (_of_digits("train", num) for num in (512, 20_000))
  test = _of_digits("test", 355)
  said = "k-NN raw pixels 97.7%, untrained 90.4%"
  (line,) = floors.lines(run, few, test, own=True)
  assert line == f"  floors: {said}"
  lines = floors.lines(run, many, test, own=True)
  assert " ".join(" ".join(lines).split()) == (
    f"floors of the training's bank of 512 and test of 355 images, not comparable: {said}"
  )
  assert max(map(len, lines)) <= 80
  (line,) = floors.lines(run._replace(kind="encoder"), many, test, own=False)
  assert "unknown here" in line
