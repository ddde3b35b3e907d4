"""The vMF normaliser and loss against published values and SciPy's Bessel functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from protojax import losses
from protojax.prototypes import vmf

# Exact ln C_256.
GOLDEN = {
  1.0: 344.33292254, 5.0: 344.28605677, 10.0: 344.13971072, 25.0: 343.11987710,
  50.0: 339.54014479, 100.0: 326.04867219,
}  # fmt: skip


def _at_zero(dim):
  """ln C_p(0): one over the area of the sphere."""
  return scipy.special.gammaln(dim / 2) - np.log(2) - dim / 2 * np.log(np.pi)


def _reference(kappa, dim):
  """ln C_p(kappa) - ln C_p(0) from the exponentially scaled Bessel function, float64."""
  nu = dim / 2 - 1
  log_bessel = np.log(scipy.special.ive(nu, kappa)) + kappa
  exact = nu * np.log(kappa) - dim / 2 * np.log(2 * np.pi) - log_bessel
  return exact - _at_zero(dim)


def test_golden_values_in_float64_and_float32():
  kappa, exact = np.array(list(GOLDEN)), np.array(list(GOLDEN.values())) - _at_zero(256)
  with jax.enable_x64(True):
    value = vmf.log_normalizer(jnp.asarray(kappa), 256)
    np.testing.assert_allclose(value, exact, rtol=0, atol=2e-8)
  single = vmf.log_normalizer(jnp.asarray(kappa, jnp.float32), 256)
  assert single.dtype == jnp.float32
  np.testing.assert_allclose(single, exact, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize(
  ("temperature", "expected"),
  [(0.1, [0.146, 0.0, -0.2435, -0.584, -1.551]), (0.04, [0.910, 0.0, -1.503, -3.580, -9.349])],
)
def test_golden_corrections_relative_to_norm_one(temperature, expected):
  norms = jnp.array([0.5, 1.0, 1.5, 2.0, 3.0])
  scores = vmf.mixture_scores(jnp.zeros((2, 5)), norms, temperature, 256) / temperature
  np.testing.assert_allclose(scores - scores[:, 1:2], np.tile(expected, (2, 1)), atol=6e-4)


@pytest.mark.parametrize(("dim", "bound"), [(64, 6e-7), (256, 9e-9)])
def test_error_in_float64_is_within_the_stated_bound(dim, bound):
  kappa = np.geomspace(1.0, 500.0, 100)
  with jax.enable_x64(True):
    value = vmf.log_normalizer(jnp.asarray(kappa), dim)
  np.testing.assert_allclose(value, _reference(kappa, dim), rtol=0, atol=bound)


def _reference_loss(z, w, g, q, temperature):
  """Cross entropy of z [B, V, D] under a vMF mixture against q [B, T, K] of the other views."""
  logits = z @ (g[:, None] * w).T / temperature + _reference(g / temperature, z.shape[-1])
  log_p = scipy.special.log_softmax(logits, axis=-1)
  pairs = [(v, t) for v in range(z.shape[1]) for t in range(q.shape[1]) if v != t]
  return np.mean([-(q[:, t] * log_p[:, v]).sum(-1).mean() for v, t in pairs])


def test_loss_and_gradients_in_norms_and_features_match_the_exact_bessel_function():
  rng = np.random.default_rng(0)
  z, w = rng.normal(size=(2, 3, 64)), rng.normal(size=(5, 64))
  z, w = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, w))
  g, q = rng.uniform(0.5, 3.0, 5), rng.dirichlet(np.ones(5), (2, 2))

  def loss(g, z):
    scores = vmf.mixture_scores(z @ (g[:, None] * w).T, g, 0.1, 64)
    return losses.cross_view_entropy(scores, jnp.asarray(q), temperature=0.1)

  with jax.enable_x64(True):
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(g, z)
  np.testing.assert_allclose(value, _reference_loss(z, w, g, q, 0.1), rtol=1e-6)
  for i, gradient in enumerate(gradients):
    numeric = np.zeros_like((g, z)[i])
    for index in np.ndindex(*numeric.shape):
      step = [np.zeros_like(g), np.zeros_like(z)]
      step[i][index] = 1e-5
      up, down = (_reference_loss(z + s * step[1], w, g + s * step[0], q, 0.1) for s in (1, -1))
      numeric[index] = (up - down) / 2e-5
    assert np.linalg.norm(numeric) > 0.1
    assert np.linalg.norm(np.asarray(gradient) - numeric) < 1e-6 * np.linalg.norm(numeric)


@pytest.mark.parametrize(("dim", "slack"), [(16, 1e-3), (64, 2e-5), (128, 1e-5)])
def test_value_and_derivative_match_scipy(dim, slack):
  kappa = np.geomspace(0.5, 400.0, 30)
  nu = dim / 2 - 1
  slope = -scipy.special.ive(nu + 1, kappa) / scipy.special.ive(nu, kappa)
  function = jax.vmap(jax.value_and_grad(lambda k: vmf.log_normalizer(k, dim)))
  value, gradient = function(jnp.asarray(kappa, jnp.float32))
  np.testing.assert_allclose(value, _reference(kappa, dim), rtol=1e-5, atol=slack)
  np.testing.assert_allclose(gradient, slope, rtol=slack)


def test_zero_and_huge_concentration_are_finite():
  kappa = jnp.array([0.0, 1e-20, 1e6], jnp.float32)
  value, gradient = jax.vmap(jax.value_and_grad(lambda k: vmf.log_normalizer(k, 256)))(kappa)
  assert np.isfinite(value).all() and np.isfinite(gradient).all()
  assert value[0] == 0.0 and gradient[0] == 0.0


def test_dimension_below_four_is_refused():
  with pytest.raises(ValueError, match="dimension 4 or more, got 3"):
    vmf.log_normalizer(jnp.ones(2), 3)


def test_mean_assignment_keeps_its_logarithm_where_probabilities_vanish():
  logits = np.array([[[0.0, 400.0, 1.0]], [[0.0, 500.0, 2.0]]])
  value = vmf.log_mean_assignment(jnp.asarray(logits, jnp.float32))
  wide = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
  expected = scipy.special.logsumexp(wide, axis=(0, 1)) - np.log(2)
  np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
