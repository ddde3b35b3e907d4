import numpy as np
import pytest
import sklearn.linear_model
from sklearn import metrics

from protojax.evals import knn, linear, long_tail, low_shot


def _long_tail():
  """Bank of 150, 100, 20 and 19 images of classes 0 to 3, none of class 4; directions and noise."""
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(4), [150, 100, 20, 19])
  means = np.eye(5, 8)
  queries = np.tile(np.arange(4), 25)

  def rows(y):
    return (means[y] + 0.35 * rng.normal(size=(len(y), 8))).astype(np.float32)

  return rows(labels), labels, rows(queries), queries


def test_cuts_are_above_100_from_20_and_below_20():
  labels = np.repeat(np.arange(5), [101, 100, 20, 19, 1])
  found = long_tail.splits(labels, 6)
  assert {k: v.tolist() for k, v in found.items()} == {"many": [0], "medium": [1, 2], "few": [3, 4]}


def test_accuracies_are_shares_of_each_split_and_balanced_as_in_scikit_learn():
  parts = {"many": np.array([0]), "medium": np.array([1, 2]), "few": np.array([], int)}
  labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
  predicted = np.array([0, 0, 0, 1, 1, 0, 2, 0, 0])
  got = long_tail.accuracies(predicted, labels, parts)
  assert got == {
    "all": 5 / 9,
    "many": 3 / 4,
    "medium": 2 / 5,
    "balanced": pytest.approx(metrics.balanced_accuracy_score(labels, predicted)),
  }


def test_evaluate_judges_both_classifiers_on_every_split():
  bank, labels, queries, right = _long_tail()
  got = long_tail.evaluate(bank, labels, queries, right, num_classes=5)
  near = np.asarray(knn.predict(bank, labels, queries, num_classes=5))
  classifier, l2, _ = linear.choose(bank, labels, num_classes=5)
  for name, found in (("knn", near), ("linear", linear.predict(classifier, queries))):
    assert got[f"{name}_all"] == np.mean(found == right)
    assert got[f"{name}_many"] == np.mean(found[right == 0] == 0)
    assert got[f"{name}_few"] == np.mean(found[right == 3] == 3)
    assert got[f"{name}_balanced"] == pytest.approx(metrics.balanced_accuracy_score(right, found))
  assert got["linear_l2"] == l2
  assert [got[f"classes_{s}"] for s in long_tail.SPLITS] == [1, 2, 1]
  assert got["images_many"] == 150 / 289
  assert got["knn_many"] > got["knn_few"]  # frequent classes outvote rare ones


def test_an_even_bank_has_as_many_images_of_each_class_as_the_smallest():
  bank, labels, queries, right = _long_tail()
  whole = long_tail.evaluate(bank, labels, queries, right, num_classes=4)
  knns, linears = [], []
  for seed in range(long_tail.DRAWS):
    rows = low_shot.subset(labels, seed=seed, per_class=19)
    few = bank[rows] / np.linalg.norm(bank[rows], axis=1, keepdims=True)
    assert np.bincount(labels[rows]).tolist() == [19] * 4
    near = np.asarray(knn.predict(few, labels[rows], queries, num_classes=4))
    knns.append(np.mean(near[right == 3] == 3))
    fitted = sklearn.linear_model.LogisticRegression(C=10.0, fit_intercept=False, tol=1e-8)
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    linears.append(np.mean(fitted.fit(few, labels[rows]).predict(unit)[right == 3] == 3))
  assert whole["even_images_per_class"] == 19
  assert whole["even_knn_few"] == pytest.approx(np.mean(knns))
  assert whole["even_linear_few"] == pytest.approx(np.mean(linears))
  assert whole["even_knn_few"] > whole["knn_few"] + 0.1  # nothing outvotes the rare class


def test_an_even_bank_of_one_image_a_class_has_no_more_neighbours_than_images():
  bank, labels = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 2]], np.array([0, 0, 0, 1, 2])
  found = long_tail.even(bank, labels, np.eye(3), np.arange(3), num_classes=3)
  assert found["images_per_class"] == 1
  assert found["knn_all"] == found["linear_all"] == found["knn_few"] == 1.0


def test_prototypes_serve_the_split_of_their_majority_class():
  parts = {"many": np.array([0]), "medium": np.array([1]), "few": np.array([2])}
  # Prototype 1 is a copy of 0; 4 has no images; 5 has no direction.
  prototypes = np.concatenate([np.eye(4)[[0, 0, 1, 2, 3]], np.zeros((1, 4))])
  codes = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 5])
  labels = np.array([0, 0, 2, 2, 2, 1, 1, 0, 2, 0])
  got = long_tail.allocation(codes, labels, prototypes, parts, num_classes=3)
  # Used: 0 (many), 1 (few), 2 (medium), 3 (few), 5 (many).
  assert [got[f"used_{s}"] for s in long_tail.SPLITS] == [0.4, 0.2, 0.4]
  # Unique: 0 with 1 (2 images of class 0, 3 of class 2: few), 2 (medium), 3 (few).
  assert [got[f"unique_{s}"] for s in long_tail.SPLITS] == pytest.approx([0, 1 / 3, 2 / 3])


def test_of_equally_frequent_classes_the_lowest_is_the_majority():
  parts = {"many": np.array([1]), "medium": np.array([0]), "few": np.array([], int)}
  got = long_tail.allocation(
    np.zeros(4, int), np.array([1, 0, 0, 1]), np.eye(2), parts, num_classes=2
  )
  assert got["used_medium"] == got["unique_medium"] == 1.0
  assert "used_few" not in got and "unique_few" not in got  # of no class there is no share
