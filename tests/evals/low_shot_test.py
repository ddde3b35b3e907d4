import numpy as np
import pytest
from sklearn import datasets, linear_model

from protojax import errors
from protojax.evals import linear, low_shot


def _digits():
  x, y = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(x))
  x, y = x[order].astype(np.float32), y[order]
  return x[:1200], y[:1200], x[1200:], y[1200:]


def _unit(x):
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("size", [{"per_class": 1}, {"per_class": 5}, {"share": 0.1}])
def test_classifier_is_scikit_learns_with_the_strength_over_the_mean_loss(size):
  """C = 10 at any n is .1 / n on the mean: the trap of the published scripts."""
  x, y, test_x, test_y = _digits()
  rows = low_shot.subset(y, seed=3, **size)
  got = linear.fit(
    _unit(x[rows]),
    y[rows],
    num_classes=10,
    l2=0.1 / rows.size,
    max_steps=500,
    standardise=False,
    intercept=False,
  )
  peer = linear_model.LogisticRegression(C=10.0, fit_intercept=False, tol=1e-8, max_iter=5000)
  peer.fit(_unit(x[rows]), y[rows])
  np.testing.assert_allclose(got.weight.T, peer.coef_, atol=5e-3 * np.abs(peer.coef_).max())
  logits = _unit(test_x) @ got.weight
  chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(chances, peer.predict_proba(_unit(test_x)), atol=1e-3)
  np.testing.assert_array_equal(got.bias, 0.0)


def test_accuracies_are_scikit_learns_over_the_same_draws():
  x, y, test_x, test_y = _digits()
  got = low_shot.evaluate(
    x, y, test_x, test_y, num_classes=10, shares=(0.05,), per_class=(2,), seeds=(0, 1, 2)
  )
  for name, size in (("2_per_class", {"per_class": 2}), ("5_percent", {"share": 0.05})):
    each = []
    for seed in (0, 1, 2):
      rows = low_shot.subset(y, seed=seed, **size)
      peer = linear_model.LogisticRegression(C=10.0, fit_intercept=False, tol=1e-8, max_iter=5000)
      each.append(peer.fit(_unit(x[rows]), y[rows]).score(_unit(test_x), test_y))
    assert got[f"{name}_mean"] == pytest.approx(np.mean(each), abs=1e-3)
    assert got[f"{name}_std"] == pytest.approx(np.std(each, ddof=1), abs=1e-3)
    assert got[f"{name}_images"] == rows.size
  assert got["2_per_class_std"] > 0.0


def test_draws_that_are_alike_have_no_deviation_of_rounding(monkeypatch):
  """Three times .1 is .30000000000000004, a third of it .10000000000000002."""
  x, y, test_x, test_y = (rows[:100] for rows in _digits())
  one_right = np.where(np.arange(10) == 0, test_y[:10], test_y[:10] + 1)
  monkeypatch.setattr(linear, "predict", lambda *_: one_right)
  got = low_shot.evaluate(
    x, y, test_x[:10], test_y[:10], num_classes=10, shares=(), per_class=(2,), seeds=(0, 1, 2)
  )
  assert (got["2_per_class_mean"], got["2_per_class_std"]) == (pytest.approx(0.1), 0.0)


def test_subset_takes_its_share_of_every_class_and_one_at_least():
  labels = np.repeat([0, 1, 2, 5], [1000, 200, 30, 7])
  rows = low_shot.subset(labels, seed=0, share=0.01)
  np.testing.assert_array_equal(np.bincount(labels[rows]), [10, 2, 1, 0, 0, 1])
  assert (np.diff(rows) > 0).all()
  rows = low_shot.subset(labels, seed=0, per_class=5)
  np.testing.assert_array_equal(np.bincount(labels[rows]), [5, 5, 5, 0, 0, 5])


def test_subset_is_a_function_of_the_seed_and_grows_by_additions():
  labels = np.random.default_rng(0).integers(4, size=100)
  two = low_shot.subset(labels, seed=1, per_class=2)
  np.testing.assert_array_equal(two, low_shot.subset(labels, seed=1, per_class=2))
  assert set(two) < set(low_shot.subset(labels, seed=1, per_class=5))
  assert set(two) != set(low_shot.subset(labels, seed=2, per_class=2))


def test_a_class_with_too_few_images_is_named():
  with pytest.raises(errors.UserError, match="class 2 has 3 of the 5 images") as caught:
    low_shot.subset(np.repeat([0, 1, 2], [9, 5, 3]), seed=0, per_class=5)
  assert "\n" not in str(caught.value)
