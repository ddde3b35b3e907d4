"""Barlow Twins against NumPy in float64, finite differences and cases known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax import errors, methods
from protojax.methods import barlow_twins
from protojax.methods.networks import student

_PAIRS = {
  "augment__num_local": 0,
  "head__l2": False,
  "head__norm": "batch",
  "head__activation": "relu",
}


def _random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def _reference(z, weight, scale):
  """Equation 1 of the paper, element by element, with the standardisation of its code."""
  a, b = ((v - v.mean(0)) / np.sqrt(v.var(0) + 1e-5) for v in (z[:, 0], z[:, 1]))
  total = 0.0
  for i in range(z.shape[2]):
    for j in range(z.shape[2]):
      c = (a[:, i] * b[:, j]).mean()
      total += (1 - c) ** 2 if i == j else weight * c**2
  return scale * total


def _objective(monkeypatch, **changes):
  """What `make` hands to the training step: z -> (value, metrics)."""
  config = tiny.config("barlow_twins", "none", **_PAIRS, **changes)
  with monkeypatch.context() as patch:
    patch.setattr(student, "two_views", lambda config, objective: objective)
    return barlow_twins.make(config)


def test_value_and_gradient_match_numpy_in_float64(monkeypatch):
  z = 3 * _random(0, 6, 2, 4) + 1
  with jax.enable_x64(True):
    value_of = _objective(monkeypatch, method__off_diagonal_weight=0.3, method__scale=0.7)
    value, gradient = jax.value_and_grad(lambda z: value_of(z)[0])(jnp.asarray(z))
  np.testing.assert_allclose(value, _reference(z, 0.3, 0.7), rtol=1e-12)
  numeric = np.zeros_like(z)
  for index in np.ndindex(*z.shape):
    step = np.zeros_like(z)
    step[index] = 1e-5
    up, down = _reference(z + step, 0.3, 0.7), _reference(z - step, 0.3, 0.7)
    numeric[index] = (up - down) / 2e-5
  assert np.linalg.norm(numeric) > 0.1
  assert np.linalg.norm(np.asarray(gradient) - numeric) < 1e-6 * np.linalg.norm(numeric)


def test_float32_value_matches_numpy_with_the_published_weights(monkeypatch):
  z = _random(1, 32, 2, 24)
  value, metrics = _objective(monkeypatch)(jnp.asarray(z, jnp.float32))
  np.testing.assert_allclose(value, _reference(z, 0.0051, 1.0), rtol=1e-5)
  np.testing.assert_allclose(metrics["on_diagonal"], _reference(z, 0.0, 1.0), rtol=1e-5)


def test_same_views_with_uncorrelated_dimensions_cost_nothing():
  columns = np.array([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1.0]])
  z = jnp.asarray(np.stack([columns, columns], axis=1))
  correlation = barlow_twins.cross_correlation(z)
  np.testing.assert_allclose(correlation, np.eye(3), atol=2e-5)
  np.testing.assert_allclose(barlow_twins.redundancy(correlation), 0.0, atol=1e-8)


def test_collapse_costs_one_a_dimension_and_copies_of_one_dimension_cost_the_rest():
  constant = jnp.ones((8, 2, 5))
  parts = barlow_twins.redundancy(barlow_twins.cross_correlation(constant))
  np.testing.assert_allclose(parts, (5.0, 0.0))
  copies = jnp.broadcast_to(_random(2, 8, 1, 1), (8, 2, 5))
  parts = barlow_twins.redundancy(barlow_twins.cross_correlation(copies))
  np.testing.assert_allclose(parts, (0.0, 20.0), atol=2e-3)


def test_scale_and_offset_of_a_dimension_do_not_matter():
  z = jnp.asarray(_random(3, 16, 2, 6), jnp.float32)
  moved = z * jnp.array([1.0, 2.0, 30.0, 4.0, 5.0, 6.0])[None, None] + 10.0
  np.testing.assert_allclose(
    barlow_twins.cross_correlation(moved), barlow_twins.cross_correlation(z), atol=1e-4
  )


@pytest.mark.parametrize(
  "z",
  [
    np.ones((4, 2, 3)),
    _random(4, 2, 2, 3),
    np.repeat(_random(5, 1, 2, 3), 4, axis=0),
    1e6 * _random(6, 4, 2, 3),
  ],
  ids=["constant", "batch of 2", "one image four times", "large"],
)
def test_gradient_is_finite(monkeypatch, z):
  value_of = _objective(monkeypatch)
  value, gradient = jax.value_and_grad(lambda z: value_of(z)[0])(jnp.asarray(z, jnp.float32))
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_embeddings_are_computed_in_float32():
  z = jnp.asarray(_random(7, 16, 2, 6), jnp.bfloat16)
  correlation = barlow_twins.cross_correlation(z)
  assert correlation.dtype == jnp.float32
  wide = barlow_twins.cross_correlation(z.astype(jnp.float32))
  np.testing.assert_array_equal(correlation, wide)


@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 2, 5), (4, 2)])
def test_shapes_that_do_not_fit_are_refused(shape):
  with pytest.raises(ValueError, match="embeddings"):
    barlow_twins.cross_correlation(jnp.ones(shape))


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("method.prototypes", "mixture"),
    ("method.block", 4),
    ("method.precision", "high"),
    ("augment.num_local", 2),
    ("head.l2", True),
  ],
)
def test_what_has_no_meaning_without_prototypes_is_one_line(name, key, value):
  c = tiny.config(name, "none", **{**_PAIRS, key: value})
  with pytest.raises(errors.UserError, match=f"^{key}={value!r}: .*set config.{key}=") as caught:
    methods.load(name).make(c)
  assert "\n" not in str(caught.value)
