"""Online EM against a float64 transcription of the recursion, and the properties it must have."""

import functools
import itertools
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.mixture
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protojax.prototypes import mixture

K, D, N = 6, 8, 32  # of most tests


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def check_distances(aux, before, after, rows):
  """`movement` and `max_cos` of one update, from the means before and after it."""
  before, after, rows = (unit(np.asarray(x, np.float64)) for x in (before, after, rows))
  np.testing.assert_allclose(aux.movement, (1 - (before * after).sum(axis=1)).mean(), atol=1e-6)
  np.testing.assert_allclose(aux.max_cos, (rows @ before.T).max(axis=1).mean(), atol=1e-6)


def make(num=K, dim=D, **options):
  if "window" not in options:
    options = {"horizon_steps": 3.0, **options}
  return compiled(num, dim, tuple(sorted(options.items())))


def plain(num, dim, options):
  """`online_em` from all its arguments by name, wherever they belong."""
  rare = {k: v for k, v in options.items() if k in mixture.Options._fields}
  common = {k: v for k, v in options.items() if k not in rare}
  return mixture.online_em(num, dim, **common, options=mixture.Options(**rare))


@functools.cache  # what one test compiled, the others reuse
def compiled(num, dim, options):
  tx = plain(num, dim, dict(options))
  return mixture.PrototypeTransformation(tx.init, jax.jit(tx.update))


@pytest.fixture
def constants(monkeypatch):
  """(**constants of the module) -> None: set for one test, whose programs no other shares."""
  compiled.cache_clear()
  yield lambda **values: [monkeypatch.setattr(mixture, k, v) for k, v in values.items()]
  compiled.cache_clear()


def batches(steps=4, rows=N, dim=D, seed=0):
  """Clustered float32 features, not normalised."""
  rng = np.random.default_rng(seed)
  centers = rng.normal(size=(4, dim))
  picks = rng.choice(4, (steps, rows), p=[0.5, 0.25, 0.15, 0.1])
  return (centers[picks] + 0.5 * rng.normal(size=(steps, rows, dim))).astype(np.float32)


def run(tx, state, features):
  for rows in features:
    state, aux = tx.update(state, jnp.asarray(rows))
  return state, aux


class Reference:
  """The recursion in its own units: S^pi starts at W ("ca") or N / K ("ema"). float64."""

  def __init__(
    self,
    means,
    rows,
    *,
    horizon,
    mass,
    covariance,
    use_pi,
    balanced,
    kappa=20.0,
    beta=1.0,
    normalize=True,
  ):
    num, dim = means.shape
    self.window = horizon * rows / num
    self.mass, self.covariance, self.use_pi, self.balanced = mass, covariance, use_pi, balanced
    self.kappa, self.beta, self.normalize = kappa, beta, normalize
    self.mu = np.asarray(means, np.float64)
    self.var = np.full(means.shape, 1.0 / dim)
    self.s0 = np.full(num, self.window if mass == "ca" else rows / num)
    self.s1 = self.s0[:, None] * self.mu
    self.s2 = self.s0[:, None] * (self.mu**2 + self.var)
    self.floor = max(1e-4, 0.05 / dim)

  @property
  def pi(self):
    return self.s0 / self.s0.sum()

  def posterior(self, h):
    difference = (h[:, None, :] - self.mu[None]) ** 2
    if self.covariance == "isotropic":
      joint = -0.5 * self.kappa * difference.sum(axis=2)
    else:
      joint = -0.5 * (difference / self.var[None] + np.log(self.var)[None]).sum(axis=2)
    if self.use_pi:
      joint = joint + np.log(self.pi)[None]
    joint = self.beta * joint
    q = np.exp(joint - joint.max())
    if not self.balanced:
      return q / q.sum(axis=1, keepdims=True)
    for _ in range(3):
      q = q / q.sum(axis=0, keepdims=True)
      q = q / q.sum(axis=1, keepdims=True)
    return q

  def step(self, features):
    h = np.asarray(features, np.float64)
    h = unit(h) if self.normalize else h
    q = self.posterior(h)
    n, m, squares = q.sum(axis=0), q.T @ h, q.T @ h**2
    keep = np.exp(-n / self.window)
    if self.mass == "ca":
      scale = self.window / n
      new = self.window, scale[:, None] * m, scale[:, None] * squares
    else:
      new = n, m, squares
    self.s0 = keep * self.s0 + (1 - keep) * new[0]
    self.s1 = keep[:, None] * self.s1 + (1 - keep)[:, None] * new[1]
    self.s2 = keep[:, None] * self.s2 + (1 - keep)[:, None] * new[2]
    mean = self.s1 / self.s0[:, None]
    self.var = np.maximum(self.s2 / self.s0[:, None] - mean**2, self.floor)
    self.mu = unit(mean) if self.normalize else mean
    return q


@pytest.mark.parametrize(
  ("mass", "covariance", "use_pi", "balanced"),
  tuple(itertools.product(("ca", "ema"), ("isotropic", "diagonal"), (True, False), (True, False))),
)
def test_recursion_equals_its_float64_transcription(mass, covariance, use_pi, balanced):
  options = dict(mass=mass, covariance=covariance, use_pi=use_pi, balanced=balanced)
  tx = make(**options, beta=0.7)
  state = tx.init(jax.random.key(0))
  reference = Reference(state.means, N, horizon=3.0, beta=0.7, **options)
  for rows in batches(5):
    before = state.means
    state, aux = tx.update(state, jnp.asarray(rows))
    q = reference.step(rows)
    check_distances(aux, before, state.means, rows)
    np.testing.assert_allclose(state.means, reference.mu, atol=1e-5)
    np.testing.assert_allclose(mixture.weights(state), reference.pi, atol=1e-5)
    unit_mass = reference.window if mass == "ca" else N / K
    np.testing.assert_allclose(state.mass, reference.s0 / unit_mass, atol=1e-5)
    np.testing.assert_allclose(state.sums, reference.s1 / unit_mass, atol=1e-5)
    np.testing.assert_allclose(aux.usage, q.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(aux.entropy, scipy.stats.entropy(q, axis=1).mean(), atol=1e-5)
    np.testing.assert_allclose(aux.perplexity, np.exp(scipy.stats.entropy(q.mean(0))), rtol=1e-5)
    if covariance == "diagonal":
      np.testing.assert_allclose(state.variances, reference.var, atol=1e-5)
      np.testing.assert_allclose(state.squares, reference.s2 / unit_mass, atol=1e-5)


@pytest.mark.parametrize("covariance", ["isotropic", "diagonal"])
def test_without_normalisation_it_is_a_plain_gaussian_mixture(covariance):
  means = batches(1, rows=K, seed=5)[0]
  tx = make(covariance=covariance, normalize=False, kappa=2.0, mass="ema")
  state = tx.init(jax.random.key(0), means)
  reference = Reference(
    means,
    N,
    horizon=3.0,
    mass="ema",
    covariance=covariance,
    use_pi=True,
    balanced=False,
    kappa=2.0,
    normalize=False,
  )
  for rows in batches(5):
    before = state.means
    state, aux = tx.update(state, jnp.asarray(rows))
    reference.step(rows)
    check_distances(aux, before, state.means, rows)
  np.testing.assert_allclose(state.means, reference.mu, atol=1e-5)
  np.testing.assert_allclose(mixture.weights(state), reference.pi, atol=1e-5)


@pytest.mark.parametrize(("covariance", "balanced"), [("isotropic", True), ("diagonal", False)])
def test_log_posterior_is_the_e_step_of_update(covariance, balanced):
  tx = make(covariance=covariance, balanced=balanced, center_features=True, beta=0.5)
  state, _ = run(tx, tx.init(jax.random.key(0)), batches(2))
  rows = jnp.asarray(batches(1, seed=3)[0])
  _, aux = tx.update(state, rows)
  # update first counts this batch into the feature mean.
  centred = state._replace(feature_mean=(2 * state.feature_mean + rows.mean(axis=0)) / 3)
  options = {"beta": 0.5, "balance_steps": 3 if balanced else 0}
  log_q = jax.jit(functools.partial(mixture.log_posterior, **options))(centred, rows)
  np.testing.assert_allclose(jnp.exp(log_q).sum(axis=1), np.ones(N), rtol=1e-5)
  np.testing.assert_allclose(jnp.exp(log_q).mean(axis=0), aux.usage, atol=1e-6)


# Forgetting.


def opposite_means(kappa=500.0, **options):
  """Component 0 takes every feature near +e_1; the others, near -e_1, get exactly nothing."""
  means = -np.eye(D, dtype=np.float32)[np.zeros(K, int)]
  means += 0.1 * np.random.default_rng(0).normal(size=(K, D))
  means[0] *= -1
  tx = make(kappa=kappa, **options)
  rng = np.random.default_rng(1)
  features = np.eye(D)[0] + 0.05 * rng.normal(size=(5, N, D))
  return tx, tx.init(jax.random.key(0), means), features.astype(np.float32)


@pytest.mark.parametrize(("mass", "covariance"), [("ca", "isotropic"), ("ema", "diagonal")])
def test_component_without_responsibility_stays_to_the_bit(mass, covariance):
  tx, start, features = opposite_means(mass=mass, covariance=covariance, beta=100.0)
  state, _ = tx.update(start, jnp.asarray(features[0]))
  # A state that came from update, and one that did not.
  for before, after in ((start, state), (state, tx.update(state, jnp.asarray(features[1]))[0])):
    per_component = ["mass", "sums", "means"]
    per_component += ["squares", "variances"] if covariance == "diagonal" else []
    for name in per_component:
      old, new = np.asarray(getattr(before, name)), np.asarray(getattr(after, name))
      assert old[1:].tobytes() == new[1:].tobytes(), name
      assert name in ("mass", "variances") or (old[0] != new[0]).any()
    assert (after.usage[1:] < before.usage[1:]).all()


@pytest.mark.parametrize("mass", ["ca", "ema"])
def test_batch_composes_mass_from_the_rule_of_one_sample(mass):
  """Mass and forgetting of a batch are those of its rows one by one; sums only of equal rows."""
  tx, state, features = opposite_means(mass=mass, window=50.0)
  state = state._replace(mass=state.mass * 0.3, sums=state.sums * 0.3)
  target = 1.0 if mass == "ca" else K  # in units of the balanced mass

  def both(rows):
    batch = tx.update(state, jnp.asarray(rows))[0]
    single, _ = run(tx, state, rows[:, None])
    expected = target + np.exp(-len(rows) / 50.0) * (0.3 - target)
    np.testing.assert_allclose(batch.mass[0], expected, rtol=1e-5)
    np.testing.assert_allclose(single.mass[0], expected, rtol=1e-5)
    return np.abs(batch.sums[0] - single.sums[0]).max()

  assert both(np.repeat(features[0][:1], N, axis=0)) < 1e-5
  assert both(features[0]) > 1e-4  # later rows weigh more


def test_single_component_in_use_is_an_exponential_running_mean():
  tx, state, features = opposite_means(window=40.0)
  expected = np.asarray(state.means[0], np.float64)
  keep = np.exp(-N / 40.0)
  for rows in features:
    expected = keep * expected + (1 - keep) * unit(rows.astype(np.float64)).mean(axis=0)
  state, _ = run(tx, state, features)
  np.testing.assert_allclose(state.sums[0], expected, atol=1e-6)
  np.testing.assert_allclose(state.means[0], unit(expected), atol=1e-6)


def test_horizon_is_the_window_in_steps_of_balanced_usage():
  by_horizon, by_window = make(horizon_steps=7.0), make(window=7.0 * N / K)
  state = by_horizon.init(jax.random.key(0))
  chex.assert_trees_all_close(
    run(by_horizon, state, batches(3))[0], run(by_window, state, batches(3))[0], atol=1e-6
  )


def test_a_long_window_still_moves_every_component():
  """1 - exp(-n / W) is 0 in float32 for n / W = 1e-9; expm1 is not, and the sums can tell."""
  tx = make(window=N / 1e-9)
  start = tx.init(jax.random.key(0))._replace(sums=jnp.zeros((K, D)))
  state, aux = tx.update(start, jnp.asarray(batches(1)[0]))
  expected = aux.usage * 1e-9
  _, aux = tx.update(start, jnp.asarray(batches(1)[0]))
  q = np.exp(mixture.log_posterior(start, jnp.asarray(batches(1)[0])))
  mean = (q.T @ unit(batches(1)[0])) / q.sum(axis=0)[:, None]
  np.testing.assert_allclose(state.sums, expected[:, None] * mean, rtol=1e-4, atol=1e-16)


# Weights.


def unequal_usage(mass, steps=60, **options):
  """Three of four well separated components get 8, 16 and 40 of the 64 rows of every batch."""
  means = np.eye(4, D)
  rng = np.random.default_rng(0)
  labels = np.repeat([0, 1, 2], [8, 16, 40])
  features = means[labels] + 0.05 * rng.normal(size=(steps, 64, D))
  tx = make(4, D, mass=mass, kappa=100.0, horizon_steps=2.0, **options)
  state = tx.init(jax.random.key(0), means)
  state = state._replace(mass=jnp.asarray([0.2, 3.0, 1.0, 0.7]))
  state = state._replace(sums=state.mass[:, None] * state.means)
  return run(tx, state, features.astype(np.float32))[0]


def test_ca_makes_the_weights_of_used_components_uniform():
  state = unequal_usage("ca")
  np.testing.assert_allclose(state.mass[:3], np.ones(3), rtol=1e-4)
  np.testing.assert_allclose(state.mass[3], 0.7, rtol=1e-6)  # unused


def test_ema_makes_weights_proportional_to_usage():
  state = unequal_usage("ema", momentum=0.8)
  np.testing.assert_allclose(state.mass[:3] * 64 / 4, [8, 16, 40], rtol=1e-3)
  np.testing.assert_allclose(state.usage, np.array([8, 16, 40, 0]) / 64, atol=1e-4)


def test_ema_mass_settles_at_the_mean_square_over_the_mean():
  """Usage that alternates between 0 and 2 n looks like 2 n: a batch without it is no evidence."""
  means = np.eye(2, D, dtype=np.float32)
  tx = make(2, D, mass="ema", kappa=100.0, window=200.0)
  features = np.repeat(means[np.arange(200) % 2][:, None], 16, axis=1)
  state, _ = run(tx, tx.init(jax.random.key(0), means), features)
  np.testing.assert_allclose(state.mass * 16 / 2, [16.0, 16.0], rtol=1e-3)


# Posterior.


def test_balanced_responsibilities_use_every_component_alike():
  tx = make(balanced=True, balance_steps=50)
  state = tx.init(jax.random.key(0))
  _, aux = tx.update(state, jnp.asarray(batches(1)[0]))
  np.testing.assert_allclose(aux.usage, np.full(K, 1 / K), rtol=1e-3)
  _, plain = make().update(state, jnp.asarray(batches(1)[0]))
  assert plain.perplexity < 0.9 * K
  assert aux.perplexity > 0.999 * K


def test_pi_changes_the_plain_posterior_and_not_the_balanced_one():
  rows = jnp.asarray(batches(1)[0])
  state = make().init(jax.random.key(0))._replace(mass=jnp.linspace(0.1, 3.0, K))

  def usage(use_pi=True, balanced=False):
    tx = make(mass="ca", covariance="isotropic", use_pi=use_pi, balanced=balanced, beta=0.7)
    return tx.update(state, rows)[1].usage

  assert np.abs(usage() - usage(use_pi=False)).max() > 0.01
  np.testing.assert_allclose(usage(balanced=True), usage(balanced=True, use_pi=False), atol=1e-5)


def test_weights_under_ca_stay_uniform_to_the_bit():
  tx = make(mass="ca", balanced=False)
  state, _ = run(tx, tx.init(jax.random.key(0)), batches(4))
  np.testing.assert_array_equal(state.mass, np.ones(K, np.float32))
  assert state.usage.max() > 1.1 * state.usage.min()


@pytest.mark.parametrize("normalize", [True, False])
def test_learned_kappa_finds_the_concentration(normalize):
  """A fit to samples of von Mises-Fisher (kappa 60) and of Gaussians (kappa 4, sigma .5)."""
  rng = np.random.default_rng(0)
  means, labels = np.eye(3, D), rng.integers(3, size=(40, 256))
  if normalize:
    draw = [scipy.stats.vonmises_fisher(m, 60.0, seed=rng).rvs(40 * 256) for m in means]
    rows = np.stack(draw)[labels, np.arange(40 * 256).reshape(40, 256)]
  else:
    means = 6.0 * means
    rows = means[labels] + 0.5 * rng.normal(size=(40, 256, D))
  tx = make(3, D, learn_kappa=True, kappa=10.0, horizon_steps=10.0, normalize=normalize)
  state = tx.init(jax.random.key(0), means)
  assert float(state.kappa) == 10.0
  state, _ = run(tx, state, rows.astype(np.float32))
  np.testing.assert_allclose(state.kappa, 60.0 if normalize else 4.0, rtol=0.05)


@pytest.mark.parametrize(
  ("dim", "given", "floor"), [(D, None, 0.05 / D), (1000, None, 1e-4), (D, 1e-6, 1e-6)]
)
def test_variances_stay_above_the_floor(dim, given, floor):
  tx = make(K, dim, covariance="diagonal", horizon_steps=0.1, normalize=False, variance_floor=given)
  means = np.arange(K)[:, None] * np.ones(dim)
  state, _ = run(tx, tx.init(jax.random.key(0), means), [np.repeat(means, 4, 0)] * 3)
  np.testing.assert_allclose(state.variances, np.full((K, dim), floor), rtol=1e-6)


def test_learned_kappa_stays_between_one_and_the_floor_of_the_variance():
  means = np.eye(3, D)
  tx = make(3, D, learn_kappa=True)
  state = tx.init(jax.random.key(0), means)
  exact, _ = tx.update(state, jnp.asarray(np.repeat(means, 8, axis=0), jnp.float32))
  np.testing.assert_allclose(exact.kappa, D / 0.05, rtol=1e-6)
  far = state._replace(scatter=jnp.float32(2.0), step=jnp.int32(10**6))
  tx = make(3, D, learn_kappa=True, horizon_steps=1e9)
  away, _ = tx.update(far, jnp.asarray(-means, jnp.float32))
  assert float(away.kappa) == 1.0


def test_fit_of_separated_blobs_is_that_of_sklearn():
  """Diagonal covariance, beta 1, horizon of 20 epochs: means to .05 standard deviations."""
  rng = np.random.default_rng(0)
  centers = np.array([[0, 0], [6, 0], [0, 6], [5, 6], [-5, -4.0]])
  sigmas = np.array([[0.5, 1], [1, 0.7], [0.6, 0.6], [1, 1], [0.8, 0.4]])
  parts = np.array([0.3, 0.2, 0.2, 0.18, 0.12])
  labels = rng.choice(5, 2048, p=parts)
  data = (centers[labels] + sigmas[labels] * rng.normal(size=(2048, 2))).astype(np.float32)
  start = centers + 0.7 * rng.normal(size=centers.shape)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    fit = sklearn.mixture.GaussianMixture(
      5, covariance_type="diag", means_init=start, tol=1e-6, max_iter=500, random_state=0
    ).fit(data)
  steps = 4  # in an epoch
  tx = make(5, 2, normalize=False, covariance="diagonal", mass="ema", horizon_steps=20 * steps)
  state = tx.init(jax.random.key(0), start)

  @jax.jit
  def epoch(state, order):
    rows = jnp.asarray(data)[order].reshape(steps, -1, 2)
    return jax.lax.scan(tx.update, state, rows)[0]

  for _ in range(300):
    state = epoch(state, rng.permutation(2048))
  distance = np.abs(state.means - fit.means_) / np.sqrt(fit.covariances_)
  assert distance.max() < 0.05
  np.testing.assert_allclose(mixture.weights(state), fit.weights_, atol=0.01)
  np.testing.assert_allclose(state.variances, fit.covariances_, rtol=0.1)


# Features.


def test_features_may_be_those_of_numpy_and_of_other_libraries():
  class Foreign:  # what PyTorch's tensors have
    def __init__(self, x):
      self.__dlpack__, self.__dlpack_device__ = x.__dlpack__, x.__dlpack_device__

  em = plain(K, D, {"horizon_steps": 3.0, "center_features": True})
  start, rows = em.init(jax.random.key(0)), batches(1)[0]
  expected, _ = em.update(start, jnp.asarray(rows))
  for features in (rows, Foreign(rows)):
    # Not to the bit: memory that is taken over as it lies may be aligned otherwise.
    chex.assert_trees_all_close(em.update(start, features)[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
      mixture.center(expected, features), mixture.center(expected, jnp.asarray(rows)), atol=1e-6
    )


def test_features_of_any_float_dtype_and_leading_axes():
  tx = make()
  state = tx.init(jax.random.key(0))
  rows = jnp.asarray(batches(1)[0], jnp.bfloat16)
  flat, _ = tx.update(state, rows.astype(jnp.float32))
  shaped, aux = tx.update(state, rows.reshape(N // 2, 2, D))
  chex.assert_trees_all_close(shaped, flat, atol=1e-6)
  assert {x.dtype for x in jax.tree.leaves((shaped._replace(step=()), aux))} == {np.dtype("f4")}


def test_features_need_the_right_dimension_and_a_float_dtype():
  tx = make(center_features=True)
  state = tx.init(jax.random.key(0))
  for features in (jnp.zeros((4, D + 1)), jnp.zeros((4, D), jnp.int32)):
    with pytest.raises(ValueError, match=rf"floats \[\.\.\., {D}\], got"):
      tx.update(state, features)


@pytest.mark.parametrize(
  "options",
  [
    {"balanced": True, "learn_kappa": True},
    {"covariance": "diagonal", "center_features": True, "reseed": True},
  ],
  ids=str,
)
def test_no_gradient_reaches_features_or_state(options, constants):
  constants(_RESEED_BELOW=5.0)
  tx = make(**options)
  state = tx.init(jax.random.key(0))

  def value(means, features):
    new, aux = tx.update(state._replace(means=means, sums=1.0 * means), features)
    floats = [x for x in jax.tree.leaves((new, aux)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum((x**2).sum() for x in floats)

  gradients = jax.jit(jax.grad(value, argnums=(0, 1)))(state.means, jnp.asarray(batches(1)[0]))
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_feature_mean_is_a_plain_mean_that_becomes_a_moving_one():
  tx = make(center_features=True, momentum=0.5)
  features = batches(3)
  state, _ = run(tx, tx.init(jax.random.key(0)), features)
  means = features.astype(np.float64).mean(axis=1)
  expected = 0.5 * (means[0] + means[1]) * 0.5 + 0.5 * means[2]
  np.testing.assert_allclose(state.feature_mean, expected, rtol=1e-5, atol=1e-6)


def test_centring_undoes_a_common_offset():
  """The mixture sees centred features, and `center` gives a loss the same directions."""
  offset = 30.0 * np.ones(D, np.float32)
  features = np.repeat(batches(1), 3, axis=0)
  state = make(center_features=True).init(jax.random.key(0))
  moved, aux = run(make(center_features=True), state, features + offset)
  centred = features - features[0].mean(axis=0)
  plain, plain_aux = run(make(), make().init(jax.random.key(0)), centred)
  np.testing.assert_allclose(moved.means, plain.means, atol=1e-4)
  np.testing.assert_allclose(aux.max_cos, plain_aux.max_cos, atol=1e-4)

  seen = mixture.center(moved, jnp.asarray(features[0] + offset))
  length = np.linalg.norm(features[0] + offset, axis=1, keepdims=True)
  np.testing.assert_allclose(seen, unit(centred[0]) * length, rtol=1e-3, atol=1e-3)
  cosine = unit(np.asarray(seen)) @ np.asarray(moved.means).T
  previous, _ = run(make(center_features=True), state, features[:2] + offset)
  np.testing.assert_allclose(
    (unit(np.asarray(seen)) @ np.asarray(previous.means).T).max(axis=1).mean(),
    aux.max_cos,
    atol=1e-4,
  )
  assert cosine.max() <= 1.0 + 1e-5


def test_center_passes_gradient_to_features_only():
  tx = make(center_features=True)
  state, _ = run(tx, tx.init(jax.random.key(0)), batches(1))

  def value(state_mean, z):
    return (mixture.center(state._replace(feature_mean=state_mean), z) ** 3).sum()

  to_mean, to_z = jax.grad(value, argnums=(0, 1))(state.feature_mean, jnp.ones((3, 2, D)))
  np.testing.assert_array_equal(to_mean, np.zeros(D))
  assert np.abs(to_z).min() > 0


# Start, schedules, reseeding, options.


def test_random_start_is_unique_and_balanced():
  state = make(1024, 128, covariance="diagonal").init(jax.random.key(0))
  means = np.asarray(state.means, np.float64)
  np.testing.assert_allclose(np.linalg.norm(means, axis=1), np.ones(1024), rtol=1e-5)
  cosine = means @ means.T - 2 * np.eye(1024)
  assert cosine.max() < 0.5  # unique at every threshold
  np.testing.assert_allclose(mixture.weights(state), np.full(1024, 1 / 1024), rtol=1e-6)
  second_moment = state.squares / state.mass[:, None]
  first_moment = state.sums / state.mass[:, None]
  np.testing.assert_allclose(second_moment - first_moment**2, state.variances, atol=1e-6)
  other = make(1024, 128).init(jax.random.key(1)).means
  assert np.abs(other - state.means).max() > 0.1


def test_start_shares_no_buffers():
  leaves = jax.tree.leaves(
    make(covariance="diagonal", center_features=True, reseed=True).init(jax.random.key(0))
  )
  leaves = [
    jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves
  ]
  assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def test_given_means_are_the_start():
  means = 3.0 * batches(1, rows=K)[0]
  np.testing.assert_allclose(make().init(jax.random.key(0), means).means, unit(means), atol=1e-6)
  tx = make(normalize=False)
  np.testing.assert_array_equal(tx.init(jax.random.key(0), means).means, means)
  with pytest.raises(ValueError, match=r"means are \[K, D\] = \(6, 8\)"):
    tx.init(jax.random.key(0), means[:2])


@pytest.mark.parametrize("name", ["horizon_steps", "window", "beta", "kappa"])
def test_schedules_are_functions_of_past_updates(name):
  def schedule(step):
    return 2.0 + 3.0 * step

  scheduled = make(**{name: schedule})
  state = constant = scheduled.init(jax.random.key(0))
  assert name != "kappa" or float(state.kappa) == 2.0
  for step, rows in enumerate(batches(2)):
    state, _ = scheduled.update(state, jnp.asarray(rows))
    fixed = make(**{name: schedule(step)})
    if name == "kappa":
      constant = constant._replace(kappa=jnp.float32(schedule(step)))
    constant, _ = fixed.update(constant, jnp.asarray(rows))
    np.testing.assert_allclose(state.means, constant.means, atol=1e-6)
    assert int(state.step) == step + 1
  ignored = run(make(**{name: 2.0}), scheduled.init(jax.random.key(0)), batches(2))[0]
  assert np.abs(ignored.means - state.means).max() > 1e-4


@pytest.mark.parametrize(("covariance", "most"), [("isotropic", 2), ("diagonal", 5)])
def test_reseeding_moves_the_least_used_components_to_the_batch(covariance, most, constants):
  constants(_RESEED_BELOW=0.5, _RESEED_MOST=most, _RESEED_NOISE=0.01)
  tx, state, features = opposite_means(reseed=True, covariance=covariance)
  usage = jnp.asarray([0.9, 0.01, 0.02, 0.03, 0.2, 0.5])  # 1, 2 and 3 are below .5 / 6
  state = state._replace(usage=usage, mass=state.mass * 2)
  rows = jnp.asarray(features[0])
  new, _ = tx.update(state, rows)
  moved = np.abs(new.means - state.means).max(axis=1) > 0.5
  np.testing.assert_array_equal(moved, [False, True, True, most == 5, False, False])
  np.testing.assert_allclose(np.linalg.norm(new.means, axis=1), np.ones(K), rtol=1e-5)
  nearest = (np.asarray(new.means) @ unit(features[0]).T).max(axis=1)
  assert (nearest[1:3] > 0.999).all()
  assert new.means[1] @ new.means[2] < 0.9999  # other rows, or at least other noise
  # Statistics give back mass, mean and variance of a start.
  np.testing.assert_allclose(new.mass[1:3], [1.0, 1.0])
  np.testing.assert_allclose(new.usage[1:3], [1 / K, 1 / K], rtol=1e-6)
  np.testing.assert_allclose(new.sums[1:3], new.means[1:3], atol=1e-6)
  if covariance == "diagonal":
    variance = new.squares[1:3] - new.sums[1:3] ** 2
    np.testing.assert_allclose(variance, np.full((2, D), 1 / D), atol=1e-6)
    np.testing.assert_allclose(new.variances[1:3], variance, atol=1e-6)


def test_reseeding_draws_anew_in_every_step_and_for_every_key(constants):
  constants(_RESEED_MOST=1)
  tx, state, features = opposite_means(reseed=True)
  state = state._replace(usage=jnp.zeros(K))
  rows = jnp.asarray(features[0])

  def fresh(state):
    new, _ = tx.update(state, rows)
    return np.asarray(new.means[1])

  np.testing.assert_array_equal(fresh(state), fresh(state))
  assert np.abs(fresh(state) - fresh(state._replace(step=state.step + 1))).max() > 1e-3
  assert np.abs(fresh(state) - fresh(state._replace(key=jax.random.key(7)))).max() > 1e-3


def test_reseeding_noise_is_in_standard_deviations_of_the_batch():
  tx, state, features = opposite_means(reseed=True, normalize=False, kappa=1.0)
  scale = np.geomspace(0.1, 100, D).astype(np.float32)
  rows = jnp.asarray((features[0] - features[0].mean(axis=0)) * scale[None])
  draws = []
  for step in range(300):
    aged = state._replace(usage=-jnp.ones(K), step=jnp.int32(step))
    draws.append(tx.update(aged, rows)[0].means)
  spread = np.concatenate(draws).std(axis=0)
  # A row of the batch plus as much again: sqrt(2) standard deviations.
  np.testing.assert_allclose(spread / np.asarray(rows).std(axis=0), np.full(D, 2**0.5), rtol=0.1)


def test_three_steps_trace_once():
  tx = mixture.online_em(
    K,
    D,
    balanced=True,
    center_features=True,
    horizon_steps=lambda step: 1.0 + step,
    options=mixture.Options(covariance="diagonal", reseed=True),
  )
  calls = []

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, rows):
    calls.append(1)
    return tx.update(state, rows)

  state = jax.jit(tx.init)(jax.random.key(0))
  for rows in batches(3):
    state, _ = update(state, jnp.asarray(rows))
  assert len(calls) == 1 and int(state.step) == 3


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"num": 1}, "num_components=1"),
    ({"dim": 0}, "dim=0"),
    ({"window": 5.0, "horizon_steps": 5.0}, "exactly one of horizon_steps and window"),
    ({"window": None, "horizon_steps": None}, "exactly one of horizon_steps and window"),
    ({"mass": "mean"}, "mass='mean': choose ca or ema"),
    ({"covariance": "full"}, "covariance='full': choose isotropic or diagonal"),
    ({"learn_kappa": True, "covariance": "diagonal"}, "learn_kappa needs"),
    ({"learn_kappa": True, "kappa": lambda step: step}, "learn_kappa starts from a number"),
    ({"balanced": True, "balance_steps": 0}, "balance_steps=0"),
    ({"horizon_steps": 0.0}, "horizon_steps=0.0: must be positive"),
    ({"window": -1.0}, "window=-1.0: must be positive"),
    ({"kappa": 0.0}, "kappa=0.0: must be positive"),
    ({"beta": float("nan")}, "beta=nan: must be positive"),
    ({"variance_floor": 0.0}, "variance_floor=0.0: must be positive"),
    ({"momentum": 1.0}, "momentum=1.0: must be in [0, 1)"),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_invalid_options_say_what_is_wrong(options, text):
  with pytest.raises(ValueError, match=re.escape(text)):
    make(**options)


# Meshes.

MK, MD, MN = 64, 24, 160  # no two shapes below coincide


def on_mesh(data, model, **options):
  """(compiled update, its state's shardings, the batch's) on a mesh of data x model devices."""
  kinds = (AxisType.Auto,) * 2
  mesh = jax.make_mesh(
    (data, model), ("data", "model"), axis_types=kinds, devices=jax.devices()[: data * model]
  )
  tx = plain(MK, MD, {"horizon_steps": 3.0, **options})
  abstract = jax.eval_shape(tx.init, jax.random.key(0))

  def place(leaf):
    return NamedSharding(
      mesh, PartitionSpec("model") if leaf.shape[:1] == (MK,) else PartitionSpec()
    )

  shardings = jax.tree.map(place, abstract)
  rows = NamedSharding(mesh, PartitionSpec("data"))
  update = jax.jit(tx.update, in_shardings=(shardings, rows), out_shardings=(shardings, None))
  compiled = update.lower(abstract, jax.ShapeDtypeStruct((MN, MD), jnp.float32)).compile()
  return tx, compiled, shardings, rows


def collectives(text):
  """[(operation, [shape, ...])] of a compiled module."""
  out = []
  for line in text.splitlines():
    found = re.search(
      r"= (.*?) (all-reduce|all-gather|all-to-all|collective-[a-z]+|reduce-scatter)[a-z-]*\(", line
    )
    if found:
      shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
      out.append((found[2], [tuple(map(int, s.split(","))) if s else () for s in shapes]))
  return out


DIAGONAL = {"covariance": "diagonal", "balanced": True, "center_features": True, "mass": "ema"}


@pytest.mark.parametrize(
  ("options", "meshes"),
  [
    ({}, ((8, 1), (2, 4), (1, 8))),
    (DIAGONAL, ((2, 4),)),
    ({"normalize": False, "learn_kappa": True}, ((2, 4),)),
  ],
  ids=["isotropic", "diagonal-balanced", "learned-kappa"],
)
def test_meshes_agree_with_one_device_and_exchange_only_sums(options, meshes):
  features = batches(3, rows=MN, dim=MD)

  def three_steps(data, model):
    tx, compiled, shardings, rows = on_mesh(data, model, **options)
    state = jax.device_put(tx.init(jax.random.key(0)), shardings)
    for batch in features:
      state, aux = compiled(state, jax.device_put(batch, rows))
    assert state.means.sharding.spec == shardings.means.spec
    return jax.device_get((state, aux)), collectives(compiled.as_text())

  expected, none = three_steps(1, 1)
  assert not none
  for data, model in meshes:
    result, exchanged = three_steps(data, model)
    chex.assert_trees_all_close(result, expected, atol=1e-5, rtol=1e-5)
    assert {operation for operation, _ in exchanged} == {"all-reduce"}
    shapes = [shape for _, of_one in exchanged for shape in of_one]
    per_component, sums = (MK // model,), (MK // model, MD)
    allowed = {()}
    if data > 1:
      allowed |= {per_component, sums, (MD,)}
      assert shapes.count(sums) == (2 if options.get("covariance") == "diagonal" else 1)
    if model > 1:
      allowed |= {(MN // data,)}
      assert (MN // data,) in shapes
    assert set(shapes) <= allowed


def test_reseeding_gathers_one_number_a_component():
  _, compiled, _, _ = on_mesh(2, 4, reseed=True)
  gathered = [shapes for op, shapes in collectives(compiled.as_text()) if op != "all-reduce"]
  assert gathered == [[(MK,)]]
