"""Langevin chains against the exact moments of their recursion, and the contrast they feed."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from protojax.models import langevin
from protojax.training import sharding


def test_chain_on_a_quadratic_has_the_moments_of_the_discrete_dynamics():
  """x' = (1 - rate a) x + noise xi: mean r^n x0, variance noise^2 (1 - r^2n) / (1 - r^2)."""
  rows, a, rate, noise, start = 40_000, jnp.array([0.5, 2.0]), 0.2, 0.3, 1.5
  r = 1.0 - rate * np.asarray(a)
  for steps in (1, 7):
    x = langevin.run(
      lambda x: -0.5 * (a[None] * x**2).sum(axis=1),
      jnp.full((rows, 2), start),
      jax.random.key(3),
      num_steps=steps,
      rate=rate,
      noise=noise,
    )
    variance = noise**2 * (1 - r ** (2 * steps)) / (1 - r**2)
    tolerance = 4.0 * np.sqrt(variance / rows)  # four standard errors
    assert (np.abs(np.mean(x, axis=0) - r**steps * start) < tolerance).all()
    np.testing.assert_allclose(np.var(x, axis=0), variance, rtol=4.0 * np.sqrt(2.0 / rows))
    assert abs(np.corrcoef(np.asarray(x).T)[0, 1]) < 4.0 / np.sqrt(rows)


def test_without_noise_a_chain_climbs_to_the_mode():
  mode = jnp.array([[0.3, -1.2]])
  x = langevin.run(
    lambda x: -((x - mode) ** 2).sum(axis=1),
    jnp.zeros((5, 2)),
    jax.random.key(0),
    num_steps=60,
    rate=0.2,
    noise=0.0,
  )
  np.testing.assert_allclose(x, np.tile(mode, (5, 1)), atol=1e-5)


def test_chains_do_not_depend_on_the_devices():
  def chains(x):
    return langevin.run(
      lambda x: jnp.sin(x).sum(axis=(1, 2)), x, jax.random.key(1), num_steps=4, rate=0.5, noise=0.1
    )

  x = jax.random.normal(jax.random.key(0), (16, 3, 2))
  mesh = sharding.make_mesh()
  rows = NamedSharding(mesh, PartitionSpec("data"))
  with jax.set_mesh(mesh):
    spread = jax.jit(chains, in_shardings=rows, out_shardings=rows)(jax.device_put(x, rows))
  np.testing.assert_allclose(spread, jax.jit(chains)(x), rtol=1e-6)


def test_gradient_of_the_contrast_is_the_difference_of_mean_gradients():
  """Of f(x) = logsumexp_k (w x)_k, by finite differences of NumPy in float64; samples get none."""
  rng = np.random.default_rng(0)
  w, data, samples = rng.normal(size=(4, 3)), rng.normal(size=(6, 3)), rng.normal(size=(9, 3))

  def mean_density(w, x):
    return np.log(np.exp(x @ w.T).sum(axis=1)).mean()

  def slope(x):
    out = np.zeros_like(w)
    for index in np.ndindex(*w.shape):
      d = np.zeros_like(w)
      d[index] = 1e-6
      out[index] = (mean_density(w + d, x) - mean_density(w - d, x)) / 2e-6
    return out

  def contrast(w, data, samples):
    return langevin.contrast(lambda x: jax.nn.logsumexp(x @ w.T, axis=1), data, samples)

  with jax.enable_x64(True):
    arrays = [jnp.asarray(a) for a in (w, data, samples)]
    value, (by_w, by_samples) = jax.value_and_grad(contrast, argnums=(0, 2))(*arrays)
    np.testing.assert_allclose(value, mean_density(w, samples) - mean_density(w, data), rtol=1e-12)
    np.testing.assert_allclose(by_w, slope(samples) - slope(data), rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(by_samples, 0.0)


def test_buffer_starts_uniform_and_gives_back_what_was_put():
  buffer = langevin.init(jax.random.key(0), (8, 3, 4, 4, 3))
  assert buffer.dtype == jnp.float32
  assert -1.0 <= buffer.min() < -0.99 and 0.99 < buffer.max() < 1.0
  np.testing.assert_allclose(np.var(buffer), 1 / 3, rtol=0.05)
  slot, x = langevin.start(buffer, jax.random.key(1), restart=0.0)
  np.testing.assert_array_equal(x, buffer[:, slot])
  new = np.asarray(langevin.put(buffer, slot, x + 5.0))
  expected = np.asarray(buffer).copy()
  expected[:, slot] += 5.0
  np.testing.assert_array_equal(new, expected)


def test_all_slots_come_up_and_restarts_are_as_frequent_as_asked():
  buffer = jnp.full((500, 3, 2), 7.0)
  slots = []
  for seed in range(20):
    slot, x = langevin.start(buffer, jax.random.key(seed), restart=0.2)
    slots.append(int(slot))
    fresh = np.asarray(x != 7.0)
    assert (fresh.all(axis=1) == fresh.any(axis=1)).all()
    assert 0.1 < fresh[:, 0].mean() < 0.3
    assert np.abs(x[fresh]).max() < 1.0
  assert set(slots) == {0, 1, 2}
