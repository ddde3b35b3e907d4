"""VICReg against NumPy in float64, finite differences and cases known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax import errors
from protojax.methods import vicreg
from protojax.methods.networks import student

_PAIRS = {
  "augment__num_local": 0,
  "head__l2": False,
  "head__norm": "batch",
  "head__activation": "relu",
}


def _random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def _reference(z, weights, reduction):
  """Equations 1 to 6 of the paper; "mean" halves the variance term, as the authors' code."""
  spread, overlap = [], 0.0
  for view in (z[:, 0], z[:, 1]):
    matrix = np.cov(view, rowvar=False)  # over N - 1
    spread.append(np.maximum(0.0, 1 - np.sqrt(np.diag(matrix) + 1e-4)).mean())
    overlap += ((matrix**2).sum() - (np.diag(matrix) ** 2).sum()) / z.shape[2]
  distance = ((z[:, 0] - z[:, 1]) ** 2).mean()
  total = sum(spread) if reduction == "sum" else sum(spread) / 2
  return weights[0] * distance + weights[1] * total + weights[2] * overlap


def _objective(monkeypatch, **changes):
  """What `make` hands to the training step: z -> (value, metrics)."""
  config = tiny.config("vicreg", "none", **_PAIRS, **changes)
  with monkeypatch.context() as patch:
    patch.setattr(student, "two_views", lambda config, objective: objective)
    return vicreg.make(config)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_value_and_gradient_match_numpy_in_float64(monkeypatch, reduction):
  # Standard deviations on both sides of 1, none near it.
  z = _random(0, 6, 2, 4) * np.array([0.2, 0.5, 3.0, 4.0]) + 1
  weights = (3.0, 5.0, 0.7)
  with jax.enable_x64(True):
    value_of = _objective(
      monkeypatch,
      method__var_reduction=reduction,
      method__invariance_weight=weights[0],
      method__variance_weight=weights[1],
      method__covariance_weight=weights[2],
    )
    value, gradient = jax.value_and_grad(lambda z: value_of(z)[0])(jnp.asarray(z))
  np.testing.assert_allclose(value, _reference(z, weights, reduction), rtol=1e-12)
  numeric = np.zeros_like(z)
  for index in np.ndindex(*z.shape):
    step = np.zeros_like(z)
    step[index] = 1e-5
    up, down = (_reference(z + s, weights, reduction) for s in (step, -step))
    numeric[index] = (up - down) / 2e-5
  assert np.linalg.norm(numeric) > 0.1
  assert np.linalg.norm(np.asarray(gradient) - numeric) < 1e-6 * np.linalg.norm(numeric)


def test_float32_value_has_the_published_weights_and_sums_the_variance_terms(monkeypatch):
  z = 0.5 * _random(1, 32, 2, 24)
  value, metrics = _objective(monkeypatch)(jnp.asarray(z, jnp.float32))
  np.testing.assert_allclose(value, _reference(z, (25.0, 25.0, 1.0), "sum"), rtol=1e-5)
  np.testing.assert_allclose(metrics["variance"], _reference(z, (0, 1, 0), "sum"), rtol=1e-5)
  mean, _ = _objective(monkeypatch, method__var_reduction="mean")(jnp.asarray(z, jnp.float32))
  np.testing.assert_allclose(value - mean, 12.5 * metrics["variance"], rtol=1e-4)


def test_collapse_costs_its_variance_and_nothing_else():
  z = jnp.full((8, 2, 5), 3.0)
  np.testing.assert_allclose(vicreg.variance(z), 0.99, rtol=1e-6)  # 1 - sqrt(1e-4)
  np.testing.assert_array_equal(vicreg.covariance(z), 0.0)
  np.testing.assert_array_equal(vicreg.invariance(z), 0.0)


def test_uncorrelated_dimensions_of_variance_above_one_cost_nothing():
  columns = np.array([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1.0]])
  z = jnp.asarray(np.stack([columns, columns], axis=1))
  for part in (vicreg.invariance, vicreg.variance, vicreg.covariance):
    np.testing.assert_allclose(part(z), 0.0, atol=1e-7)


def test_views_are_measured_apart():
  z = np.stack([_random(2, 16, 4), np.zeros((16, 4))], axis=1)
  np.testing.assert_allclose(vicreg.variance(jnp.asarray(z))[1], 0.99, rtol=1e-6)
  assert float(vicreg.variance(jnp.asarray(z))[0]) < 0.5
  assert float(vicreg.covariance(jnp.asarray(z))[1]) == 0.0


@pytest.mark.parametrize(
  "z",
  [
    np.zeros((4, 2, 3)),
    _random(4, 2, 2, 3),
    np.repeat(_random(5, 1, 2, 3), 4, axis=0),
    1e6 * _random(6, 4, 2, 3),
  ],
  ids=["zero", "batch of 2", "one image four times", "large"],
)
def test_gradient_is_finite(monkeypatch, z):
  value_of = _objective(monkeypatch)
  value, gradient = jax.value_and_grad(lambda z: value_of(z)[0])(jnp.asarray(z, jnp.float32))
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_embeddings_are_computed_in_float32():
  z = jnp.asarray(_random(7, 16, 2, 6), jnp.bfloat16)
  for part in (vicreg.invariance, vicreg.variance, vicreg.covariance):
    assert part(z).dtype == jnp.float32
    np.testing.assert_array_equal(part(z), part(z.astype(jnp.float32)))


@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 2, 5), (4, 2)])
def test_shapes_that_do_not_fit_are_refused(shape):
  for part in (vicreg.invariance, vicreg.variance, vicreg.covariance):
    with pytest.raises(ValueError, match="embeddings"):
      part(jnp.ones(shape))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"method__var_reduction": "max"}, "method.var_reduction='max' is unknown: choose sum or mean"),
    ({"batch_size": 1}, "batch_size=1: .* need 2 images"),
  ],
)
def test_bad_settings_are_one_line(changes, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    vicreg.make(tiny.config("vicreg", "none", **_PAIRS, **changes))
  assert "\n" not in str(caught.value)
