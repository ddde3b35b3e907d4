"""Samples of an energy-based model: Langevin chains that go on from a replay buffer.

The buffer is [B, S, ...]: S batches of chains. A row keeps its place in the batch and a step goes
on with one of the S batches, picked at random (JEM picks every chain by itself): with rows spread
over devices no image travels between them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def run(
  log_density: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  key: jax.Array,
  *,
  num_steps: int,
  rate: float,
  noise: float,
) -> jax.Array:
  """Stochastic gradient Langevin dynamics: x += rate grad f(x) + noise N(0, 1), `num_steps` times.

  With noise^2 = 2 rate and small steps the chain samples exp(f); energy-based models of images use
  less noise than that.

  Args:
    log_density: f, [B, ...] -> [B], a row of the result a function of that row alone. What it
      closes over should carry no gradient, or the chain is differentiated in vain.
    x: [B, ...] float start.
    key: typed key; the noise is a function of it and of the shape, not of the devices.
    num_steps: length of the chain; static.
    rate: of the gradient.
    noise: standard deviation a step.

  Returns:
    [B, ...], no gradient.
  """
  gradient = jax.grad(lambda x: log_density(x).sum())

  def move(i, x):
    draw = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    return x + rate * gradient(x) + noise * draw

  return jax.lax.stop_gradient(jax.lax.fori_loop(0, num_steps, move, x))


def contrast(
  log_density: Callable[[jax.Array], jax.Array], data: jax.Array, samples: jax.Array
) -> jax.Array:
  """mean f(samples) - mean f(data), whose gradient is minus that of the mean log likelihood.

  Args:
    log_density: f, [B, ...] -> [B], the log density up to its constant.
    data: [B, ...].
    samples: [B, ...] of exp(f); no gradient.

  Returns:
    [] float32.
  """
  return log_density(jax.lax.stop_gradient(samples)).mean() - log_density(data).mean()


def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A buffer of `shape` [B, S, ...] float32, uniform in [-1, 1)."""
  return jax.random.uniform(key, shape, minval=-1.0)


def start(buffer: jax.Array, key: jax.Array, *, restart: float) -> tuple[jax.Array, jax.Array]:
  """Where the next chains start.

  Args:
    buffer: [B, S, ...].
    key: typed key.
    restart: probability of a row to start anew, uniform in [-1, 1).

  Returns:
    (slot int32 [], x [B, ...]). Give the ends of the chains back to `put`.
  """
  slot_key, fresh_key, restart_key = jax.random.split(key, 3)
  slot = jax.random.randint(slot_key, (), 0, buffer.shape[1])
  x = jax.lax.dynamic_index_in_dim(buffer, slot, axis=1, keepdims=False)
  fresh = jax.random.uniform(fresh_key, x.shape, x.dtype, minval=-1.0)
  rows = jax.random.bernoulli(restart_key, restart, x.shape[:1] + (1,) * (x.ndim - 1))
  return slot, jnp.where(rows, fresh, x)


def put(buffer: jax.Array, slot: jax.Array, x: jax.Array) -> jax.Array:
  """The buffer [B, S, ...] with x [B, ...] in place of batch `slot`."""
  return jax.lax.dynamic_update_slice_in_dim(buffer, x[:, None], slot, axis=1)
