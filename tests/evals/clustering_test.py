import itertools

import numpy as np
import pytest
from sklearn import datasets, metrics

from protojax.evals import clustering, purity


def _codes(num=300, num_codes=6, num_classes=6):
  rng = np.random.default_rng(0)
  labels = rng.integers(num_classes, size=num)
  noise = rng.integers(num_codes, size=num)
  return np.where(rng.random(num) < 0.6, (labels + 1) % num_codes, noise), labels


def _entropy(counts):
  p = counts[counts > 0] / counts.sum()
  return -np.sum(p * np.log(p))


def test_nmi_is_its_formula_with_the_arithmetic_mean():
  codes, labels = _codes()
  table = np.zeros((6, 6))
  np.add.at(table, (labels, codes), 1)
  h_labels, h_codes = _entropy(table.sum(1)), _entropy(table.sum(0))
  mutual = h_labels + h_codes - _entropy(table.ravel())
  got = clustering.evaluate(codes, labels, num_codes=6, num_classes=6)
  np.testing.assert_allclose(got["nmi"], 2 * mutual / (h_labels + h_codes), rtol=1e-9)
  np.testing.assert_allclose(got["perplexity"], np.exp(h_codes), rtol=1e-9)


def test_scores_are_those_of_scikit_learn_and_the_chance_is_below_them():
  codes, labels = _codes()
  got = clustering.evaluate(codes, labels, num_codes=6, num_classes=6)
  assert got["ami"] == metrics.adjusted_mutual_info_score(labels, codes)
  assert got["ari"] == metrics.adjusted_rand_score(labels, codes)
  assert got["nmi_above_permuted"] == got["nmi"] - got["nmi_permuted"] > 0.2
  assert got["nmi_permuted"] < 0.1 and got["used"] == 6
  assert "purity" not in got


def test_hungarian_accuracy_is_the_best_of_all_matchings():
  codes, labels = _codes(num_codes=5)
  best = max(
    np.mean(np.array(order)[codes] == labels) for order in itertools.permutations(range(6), 5)
  )
  assert clustering.hungarian_accuracy(codes, labels) == pytest.approx(best)
  got = clustering.evaluate(codes, labels, num_codes=5, num_classes=6)
  assert got["hungarian"] == pytest.approx(best) and best > 0.5


def test_more_codes_than_classes_are_judged_by_majority_vote():
  codes, labels = np.array([0, 0, 0, 7, 7, 3]), np.array([1, 1, 0, 2, 2, 0])
  assert purity.purity(codes, labels) == pytest.approx(5 / 6)
  got = clustering.evaluate(codes, labels, num_codes=8, num_classes=3)
  assert got["purity"] == pytest.approx(5 / 6) and "hungarian" not in got and got["used"] == 3
  assert got["purity_permuted"] < 1.0


def test_a_code_for_every_image_is_pure_and_no_better_than_chance():
  labels = np.arange(200) % 10
  got = clustering.evaluate(np.arange(200), labels, num_codes=256, num_classes=10)
  assert got["purity"] == got["purity_permuted"] == 1.0
  assert abs(got["nmi_above_permuted"]) < 1e-9 < 0.5 < got["nmi"]


@pytest.mark.parametrize(
  ("num_codes", "expected"), [(10, 0.002), (100, 0.013), (1000, 0.113), (16_384, 0.353)]
)
def test_chance_of_ten_thousand_images_of_ten_classes_is_that_of_the_table(num_codes, expected):
  labels = np.repeat(np.arange(10), 1000)  # the test split of CIFAR-10
  assert clustering.chance_nmi(labels, num_codes) == pytest.approx(expected, abs=1e-3)


def test_chance_counts_unused_codes_but_permuted_labels_do_not():
  """All images in two of 4,096 codes: uniform codes would look much better, permuted labels not."""
  labels = np.arange(1000) % 10
  codes = np.random.default_rng(0).integers(2, size=1000)
  got = clustering.evaluate(codes, labels, num_codes=4096, num_classes=10)
  assert got["nmi_permuted"] < 0.01 < 0.4 < got["nmi_uniform"]


def test_kmeans_codes_are_fitted_to_the_bank_and_find_separate_clusters():
  rng = np.random.default_rng(0)
  means = rng.normal(size=(4, 16))
  labels, other = rng.integers(4, size=200), rng.integers(4, size=50)
  # Lengths differ: only directions count.
  bank = rng.uniform(1, 9, (200, 1)) * (means[labels] + 0.05 * rng.normal(size=(200, 16)))
  queries = rng.uniform(1, 9, (50, 1)) * (means[other] + 0.05 * rng.normal(size=(50, 16)))
  codes, found = clustering.kmeans_codes(bank, queries, num_clusters=4)
  assert clustering.hungarian_accuracy(codes, labels) == 1.0
  matched = {c: labels[codes == c][0] for c in range(4)}
  assert [matched[c] for c in found] == other.tolist()


def test_queries_take_the_nearest_centroid_not_that_of_the_largest_product():
  x, _ = datasets.load_digits(return_X_y=True)
  codes, found = clustering.kmeans_codes(x[:400], x[400:900], num_clusters=20)
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  centroids = np.stack([unit[:400][codes == c].mean(axis=0) for c in range(20)])
  distances = np.square(unit[400:900, None] - centroids[None]).sum(axis=-1)
  assert np.mean(found == distances.argmin(axis=1)) > 0.99
  assert np.mean(found == (unit[400:900] @ centroids.T).argmax(axis=1)) < 0.98


def test_kmeans_does_not_depend_on_an_order_by_class():
  x, y = datasets.load_digits(return_X_y=True)
  order = np.argsort(y, kind="stable")
  mixed, _ = clustering.kmeans_codes(x, x[:5], num_clusters=10)
  sorted_, _ = clustering.kmeans_codes(x[order], x[:5], num_clusters=10)
  nmi = [metrics.normalized_mutual_info_score(a, b) for a, b in ((y, mixed), (y[order], sorted_))]
  assert abs(nmi[0] - nmi[1]) < 0.02 and min(nmi) > 0.7
