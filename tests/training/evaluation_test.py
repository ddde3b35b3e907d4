import functools

import jax
import numpy as np
import pytest
import tiny
from sklearn import neighbors

from protojax import errors, progress
from protojax.data import pipeline, sources
from protojax.data.sources import source
from protojax.training import encode, evaluation, opening, programs, train_step


@pytest.fixture(scope="module")
def setting():
  c = tiny.config("dino", "mixture", probe__limit=0)
  bank, test = (sources.build("digits", split=s) for s in ("train", "test"))
  program = programs.Program(c, 10)
  return program, program.init(c.seed), evaluation.Snapshot(program, bank=bank, test=test), bank


def test_a_fresh_state_has_not_moved(setting):
  program, state, view, _ = setting
  measures = view.monitor(state)
  assert measures["collapse/drift"] == pytest.approx(1.0, abs=1e-6)
  assert measures["collapse/teacher_distance"] == 0.0
  means = -state.prototypes.means
  turned = state.replace(prototypes=state.prototypes._replace(means=means))
  assert view.monitor(turned)["collapse/drift"] == pytest.approx(-1.0, abs=1e-6)


def test_duplicated_prototypes_are_counted(setting):
  _, state, view, _ = setting
  means = state.prototypes.means.at[8:].set(state.prototypes.means[0])
  measures = view.monitor(state.replace(prototypes=state.prototypes._replace(means=means)))
  assert measures["collapse/unique_0.025"] == 8 / 32
  assert measures["collapse/unique_0.025_random"] == 1.0
  assert measures["collapse/relative_uniqueness"] < 1e-3


def test_a_pass_says_how_many_images_are_done(setting, monkeypatch):
  program, _, _, bank = setting
  done = []
  monkeypatch.setattr(progress.Line, "to", lambda line, n: done.append((line._what, n)))
  rows = encode.rows(
    lambda batch: batch["index"],
    bank,
    mesh=program.mesh,
    batch_size=64,
    image_size=32,
    limit=100,
  )
  assert len(rows) == 100
  assert done == [("encoding digits/train", 64), ("encoding digits/train", 100)]


def test_a_batch_is_under_way_before_the_one_before_it_is_fetched():
  events = []

  def run():
    for batch in range(3):
      events.append(f"run {batch}")
      yield batch

  for batch in encode._one_late(run()):
    events.append(f"got {batch}")
  assert events == ["run 0", "run 1", "got 0", "run 2", "got 1", "got 2"]


def test_usage_is_that_of_the_whole_bank(setting):
  program, state, view, bank = setting
  # Untrained features are bunched: without their mean they spread over the prototypes.
  first = next(iter(pipeline.sequential(bank, batch_size=64, image_size=32)))
  z = program.method.embeddings(train_step.variables_of(state), program.evaluation(first))
  mean = z["prototypes"].mean(axis=0)
  state = state.replace(prototypes=state.prototypes._replace(feature_mean=mean))
  codes = []
  for batch in pipeline.sequential(bank, batch_size=64, image_size=32):
    variables = train_step.variables_of(state)
    scores = program.method.codes(variables, program.evaluation(batch))["prototypes"]
    codes.append(np.asarray(scores).argmax(axis=1)[batch["mask"]])
  codes = np.concatenate(codes)
  assert len(set(codes[:64])) < len(set(codes))  # else a part of the bank would do
  measures = view.evaluate(state)
  share = np.bincount(codes, minlength=32) / len(codes)
  assert measures["collapse/used"] == pytest.approx((share > 0).mean(), abs=1e-6)
  entropy = -sum(p * np.log(p) for p in share if p > 0)
  assert measures["collapse/perplexity"] == pytest.approx(np.exp(entropy), rel=1e-4)
  assert 0.1 < measures["probe/knn"] <= 1.0


def test_accuracy_on_the_bank_itself_sees_the_image(setting):
  """With the train images as test images, the nearest neighbour is the image: k = 1 is perfect."""
  program, state, _, bank = setting
  config = program.config.copy_and_resolve_references()
  config.probe.k = 1
  view = evaluation.Snapshot(programs.Program(config, 10), bank=bank, test=bank)
  assert view.evaluate(state)["probe/knn"] == 1.0


def test_floors_are_what_there_is_without_training(setting, monkeypatch):
  _, state, view, bank = setting
  floors = view.floors(state)
  assert floors["floor/knn_untrained"] == view.evaluate(state)["probe/knn"]
  assert floors["floor/bank_images"] == len(bank) and floors["floor/test_images"] == 355
  # At 32 px and not at 16: a few may change their class.
  train, test = (
    np.stack([row["image"] for row in s.read(range(len(s)))])[..., 0].reshape(len(s), -1)
    for s in (bank, view._test)
  )
  near = neighbors.KNeighborsClassifier(
    20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
  )
  expected = near.fit(train / 255, bank.labels).score(test / 255, view._test.labels)
  assert floors["floor/knn_pixels"] == pytest.approx(expected, abs=0.01) and expected > 0.9
  assert floors["floor/linear_pixels"] > 0.9
  assert "floor/knn" not in view.evaluate(state)
  assert evaluation.Snapshot(setting[0], bank=bank).floors(state) == {}
  # Of a bank that is larger than the floors take, the net is compared on their images.
  monkeypatch.setattr(evaluation, "FLOOR_IMAGES", 100)
  few = view.floors(state)
  assert few["floor/bank_images"] == few["floor/test_images"] == 100
  assert few["floor/knn_untrained"] == view.evaluate(state)["floor/knn"]
  fewer, _ = view.final(state)
  assert 0.1 < fewer["floor/linear"] < fewer["probe/linear_fitted"]


def test_images_without_a_label_are_left_out_of_accuracies_and_counted(
  setting, caplog, monkeypatch
):
  program, state, view, _ = setting
  some, rest = [], []
  for whole in view._bank, view._test:
    images, labels = whole._read.args
    labels = np.where(np.arange(len(whole)) % 2, -1, labels).astype(np.int32)
    read = functools.partial(source.read_items, images, labels)
    every = np.arange(len(whole))
    some.append(source.Source(whole.name, every, read, labels, class_names=whole.class_names))
    rest.append(whole.subset(every[::2], whole.name, None))
  partly, half = (evaluation.Snapshot(program, bank=b, test=t) for b, t in (some, rest))
  with caplog.at_level("INFO"):
    found = partly.floors(state)
  assert found == half.floors(state)
  assert "721 of 1442 images of digits/train have no label: accuracies leave" in caplog.text
  measures, arrays = partly.final(state)
  expected, _ = half.final(state)
  accuracies = [name for name in expected if name.startswith("probe/")]
  assert accuracies and all(measures[name] == expected[name] for name in accuracies)
  assert arrays["usage"].sum() == len(some[0])
  # More images than the floors take: the net is compared on theirs, of which half have labels.
  monkeypatch.setattr(evaluation, "FLOOR_IMAGES", 100)
  floors, ended = partly.floors(state), partly.final(state)[0]
  assert 40 < floors["floor/bank_images"] < 60 and "floor/linear" in ended
  assert ended["floor/knn"] == floors["floor/knn_untrained"]
  monkeypatch.setattr(evaluation, "_FLOOR_PRODUCTS", 0)
  assert "floor/linear" not in partly.final(state)[0]


def test_a_split_without_a_label_is_one_line(setting):
  program, state, view, bank = setting
  images, labels = view._test._read.args
  read = functools.partial(source.read_items, images, np.full_like(labels, -1))
  names = bank.class_names
  test = source.Source("set/test", np.arange(len(labels)), read, class_names=names)
  with pytest.raises(
    errors.UserError, match="none of 355 images of set/test has a label: .*test_s"
  ):
    evaluation.Snapshot(program, bank=bank, test=test).floors(state)


@pytest.mark.parametrize(("pixels", "told"), [(0.2, True), (0.4, False)])
def test_raw_pixels_that_are_worse_than_the_net_are_told(
  setting, monkeypatch, caplog, pixels, told
):
  caplog.set_level("INFO")
  _, state, view, _ = setting
  monkeypatch.setattr(evaluation, "FLOOR_IMAGES", 100)
  found = [0.3, pixels]
  monkeypatch.setattr(view, "_knn", lambda *_: found.pop())
  view.floors(state)
  assert ("raw pixels are worse than the untrained net here" in caplog.text) == told


def test_usage_of_random_prototypes_is_measured_on_the_same_sample(setting):
  _, state, view, bank = setting
  measures = view.monitor(state)
  sample = view._run(state, bank, 32, ("embeddings",))["embeddings"]["prototypes"]
  rows = np.random.default_rng(0).normal(size=(2000, 32, sample.shape[1]))
  rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
  used = [len(set((sample @ r.T).argmax(axis=1))) / 32 for r in rows]
  assert min(used) <= measures["collapse/used_sample_random"] <= max(used)
  assert measures["collapse/used_sample_most"] == 1.0
  assert np.mean(used) < 0.3  # an untrained net's embeddings are near one another


def test_final_gives_what_the_picture_draws(setting):
  _, state, view, bank = setting
  measures, arrays = view.final(state)
  assert arrays["usage"].sum() == len(bank) and arrays["usage"].shape == (32,)
  assert arrays["nearest"].shape == arrays["nearest_random"].shape == (32,)
  assert jax.tree.all(jax.tree.map(np.isfinite, measures))


def test_some_of_many_prototypes_are_looked_at_and_all_at_the_end():
  looked = evaluation.looked_at
  assert looked(65_536, None, ended=False) == looked(65_536, 0, ended=False) == 65_536
  assert looked(100_000, None, ended=False) == 2048
  assert looked(100_000, 0, ended=False) == looked(100_000, None, ended=True) == 100_000
  assert looked(100_000, 500, ended=True) == 500 and looked(100, 500, ended=False) == 100


def test_the_monitor_looks_at_as_many_prototypes_as_it_is_told(setting, monkeypatch):
  program, state, view, _ = setting
  means = state.prototypes.means.at[8:].set(state.prototypes.means[0])
  copies = state.replace(prototypes=state.prototypes._replace(means=means))
  config = program.config.copy_and_resolve_references()
  config.monitor.prototypes = 16  # every other: four of those 7, and twelve of those 25
  monkeypatch.setattr(view, "_config", config)
  measures = view.monitor(copies)
  assert measures["collapse/unique_of"] == 16
  assert measures["collapse/unique_0.025"] == pytest.approx((3 + 13 / 25) / 16)
  _, arrays = view.final(copies)
  assert arrays["nearest"].shape == arrays["nearest_random"].shape == (16,)
  assert "collapse/unique_of" not in setting[2]._monitor(state, None)


def test_images_that_could_not_be_read_are_counted(setting):
  _, _, view, bank = setting
  limit = view._config.probe.limit
  rows = {"label": np.zeros(min(limit or len(bank), len(bank)))}, {"label": np.zeros(355)}
  assert view._unreadable(*rows) == {}
  assert view._unreadable({"label": rows[0]["label"][2:]}, {"label": rows[1]["label"][1:]}) == {
    "data/unreadable_bank": 2.0,
    "data/unreadable_test": 1.0,
  }


def test_the_opening_says_what_a_look_costs_where_prototypes_are_many():
  def said(num, asked):
    config = tiny.config("dino", "mixture")
    config.monitor.update({"every": 250, "prototypes": asked})
    return opening._looks(config, {"prototypes": np.empty((num, 64), np.int8)})

  assert said(4096, None) == ""
  assert said(65_536, None) == (
    "every 250 steps and at the end all pairs of prototypes compared, 1.4e+11 multiplications"
  )
  assert said(1_000_000, None) == (
    "every 250 steps 2,048 prototypes with all 1,000,000 compared, 1.3e+11 multiplications; at the "
    "end all pairs of prototypes compared, 3.2e+13 multiplications"
  )
  for asked in (2048, 0):
    assert said(1_000_000, asked).startswith("every 250 steps and at the end ")
