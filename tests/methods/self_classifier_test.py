"""Self-Classifier against NumPy in float64, finite differences and cases known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax import errors
from protojax.methods import self_classifier
from protojax.methods.networks import student


def _random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def _softmax(x, axis):
  e = np.exp(x - x.max(axis=axis, keepdims=True))
  return e / e.sum(axis=axis, keepdims=True)


def _reference(scores, row_temp, column_temp):
  """The loss in probabilities, view by view: by columns, then rows; by rows, then columns."""
  n, num_views, k = scores.shape
  terms = []
  for i in range(num_views):
    for j in range(num_views):
      if i == j or (i >= 2 and j >= 2):
        continue
      a = _softmax(scores[:, i] / column_temp, axis=0)
      a /= a.sum(axis=1, keepdims=True)
      b = _softmax(scores[:, j] / row_temp, axis=1)
      b /= b.sum(axis=0, keepdims=True)
      terms.append(-(a * np.log(n / k * b + 1e-12)).sum() / n)
  return np.mean(terms)


def _loss(scores, row_temp=0.1, column_temp=0.05):
  q = self_classifier.targets(scores, column_temp)
  return self_classifier.cross_entropy(q, self_classifier.log_predictions(scores, row_temp, 1e-12))


@pytest.mark.parametrize("num_views", [2, 4])
def test_value_and_gradient_match_numpy_in_float64(num_views):
  """Differences of the reference move targets and predictions: no gradient is stopped."""
  scores = 0.3 * _random(0, 5, num_views, 4)
  with jax.enable_x64(True):
    value, gradient = jax.value_and_grad(_loss)(jnp.asarray(scores))
  np.testing.assert_allclose(value, _reference(scores, 0.1, 0.05), rtol=1e-12)
  numeric = np.zeros_like(scores)
  for index in np.ndindex(*scores.shape):
    step = np.zeros_like(scores)
    step[index] = 1e-6
    up, down = (_reference(scores + s, 0.1, 0.05) for s in (step, -step))
    numeric[index] = (up - down) / 2e-6
  assert np.linalg.norm(numeric) > 0.1
  assert np.linalg.norm(np.asarray(gradient) - numeric) < 1e-6 * np.linalg.norm(numeric)


def test_float32_value_matches_numpy():
  scores = 0.5 * _random(1, 32, 3, 24)
  value = _loss(jnp.asarray(scores, jnp.float32))
  np.testing.assert_allclose(value, _reference(scores, 0.1, 0.05), rtol=1e-5)


@pytest.mark.parametrize("favoured", [0.0, 0.4, 50.0], ids=["uniform", "leaning", "one class"])
def test_the_same_answer_to_every_image_costs_ln_k(favoured):
  scores = jnp.zeros((6, 2, 9)).at[..., 0].set(favoured)
  np.testing.assert_allclose(_loss(scores), np.log(9), rtol=1e-5)


@pytest.mark.parametrize(("images", "classes"), [(4, 4), (12, 4), (4, 12)])
def test_even_use_of_the_classes_costs_nothing_or_what_a_small_batch_must(images, classes):
  fewer = min(images, classes)
  n, k = np.arange(images)[:, None], np.arange(classes)[None, :]
  chosen = np.where(n % fewer == k % fewer, 50.0, 0.0)
  value = _loss(jnp.asarray(np.stack([chosen, chosen], axis=1), jnp.float32))
  np.testing.assert_allclose(value, max(0.0, np.log(classes / images)), atol=1e-5)


def test_views_that_never_agree_cost_the_floor_of_the_logarithm():
  chosen = 50.0 * np.eye(4)
  scores = jnp.asarray(np.stack([chosen, chosen[::-1]], axis=1), jnp.float32)
  value, gradient = jax.value_and_grad(_loss)(scores)
  np.testing.assert_allclose(value, -np.log(1e-12), rtol=1e-5)
  assert np.isfinite(gradient).all()


def test_local_views_are_compared_with_global_ones_only():
  """A second local view that contradicts the first costs only what its global pairs cost."""
  q = jnp.broadcast_to(jnp.eye(4)[:, None], (4, 4, 4))
  log_p = jnp.zeros((4, 4, 4)).at[:, 2:].set(-7.0)
  # 10 pairs: local targets predicted by global views cost 0, the 4 the other way round cost 7.
  np.testing.assert_allclose(self_classifier.cross_entropy(q, log_p), 2.8, rtol=1e-6)
  with pytest.raises(ValueError, match="2 views"):
    self_classifier.cross_entropy(q[:, :1], log_p[:, :1])


@pytest.mark.parametrize(
  "scores",
  [1e4 * _random(2, 4, 2, 5), _random(3, 2, 2, 5), np.repeat(_random(4, 1, 2, 5), 4, axis=0)],
  ids=["saturated", "batch of 2", "one image four times"],
)
def test_gradient_is_finite(scores):
  value, gradient = jax.value_and_grad(_loss)(jnp.asarray(scores, jnp.float32))
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_targets_are_distributions_and_bfloat16_is_computed_in_float32():
  scores = jnp.asarray(_random(5, 8, 2, 6), jnp.bfloat16)
  q = self_classifier.targets(scores, 0.05)
  np.testing.assert_allclose(q.sum(axis=-1), 1.0, rtol=1e-6)
  assert q.dtype == self_classifier.log_predictions(scores, 0.1, 1e-12).dtype == jnp.float32
  np.testing.assert_array_equal(q, self_classifier.targets(scores.astype(jnp.float32), 0.05))


def test_several_classifiers_cost_the_mean_of_each_alone():
  c = tiny.config(
    "self_classifier", "learned", method__more_classifiers=(8, 4), method__train_prototype_norm=True
  )
  method = self_classifier.make(c)
  variables = method.init(jax.random.key(0))
  assert variables.prototypes["v"].shape == (44, 16) and variables.prototypes["g"].shape == (44, 1)
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape), tiny.abstract_views(c)
  )
  trained = {"encoder": variables.encoder, "prototypes": variables.prototypes}
  frozen = variables.replace(encoder=(), prototypes=())
  key, step = jax.random.key(2), jnp.int32(0)
  grad_fn = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  (value, out), grads = grad_fn(trained, frozen, views, key, step)

  z = np.asarray(jax.jit(student.build(c).embed)(trained, frozen, views, key)[0], np.float64)

  def of_rows(v):
    rows = v / np.linalg.norm(v, axis=1, keepdims=True)
    return np.mean([_reference(z @ part.T, 0.1, 0.05) for part in np.split(rows, [32, 40])])

  v = np.asarray(variables.prototypes["v"], np.float64)
  np.testing.assert_allclose(value, of_rows(v), rtol=1e-5)
  # Targets pass a gradient, too: differences along a random direction move both.
  way = _random(6, *v.shape)
  slope = (of_rows(v + 1e-5 * way) - of_rows(v - 1e-5 * way)) / 2e-5
  np.testing.assert_allclose(np.sum(way * grads["prototypes"]["v"]), slope, rtol=1e-3)
  np.testing.assert_allclose(out.metrics["ln_k"], np.log([32, 8, 4]).mean(), rtol=1e-6)

  names = ["prototypes", "prototypes_2", "prototypes_3"]
  images = views["global"][:, 0]
  z = method.embeddings(variables, images)
  scores, matrices = method.codes(variables, images), method.prototype_matrices(variables)
  assert list(z) == list(scores) == list(matrices) == names
  for name, size in zip(names, (32, 8, 4), strict=True):
    assert matrices[name].shape == (size, 16)
    np.testing.assert_allclose(np.linalg.norm(matrices[name], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(scores[name], z[name] @ matrices[name].T, atol=1e-5)


@pytest.mark.parametrize(
  ("kind", "changes", "message"),
  [
    ("mixture", {"more_classifiers": (8,)}, r"more_classifiers=\(8,\): .*unless method.prototypes"),
    ("learned", {"more_classifiers": (1,)}, "give each 2 classes or more"),
    ("learned", {"column_temp": 0.0}, "method.column_temp=0.0 must be above 0"),
    ("none", {}, "method.prototypes='none' is unknown"),
  ],
)
def test_bad_settings_are_one_line(kind, changes, message):
  changes = {f"method__{key}": value for key, value in changes.items()}
  with pytest.raises(errors.UserError, match=message) as caught:
    self_classifier.make(tiny.config("self_classifier", kind, **changes))
  assert "\n" not in str(caught.value)
