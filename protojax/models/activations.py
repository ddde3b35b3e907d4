"""GELU as transformers have it, exact, but with little to keep for the backward pass."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
  """x times the normal distribution function of x (erf, not its tanh approximation).

  Computed in float32. For the backward pass one array in the dtype of x is kept, the derivative;
  differentiating `jax.nn.gelu` keeps three, of bfloat16 in float32.

  Args:
    x: of any shape and float dtype.
  """
  return _value_and_slope(x)[0]


@gelu.defjvp
def _gelu_jvp(primals, tangents):
  value, slope = _value_and_slope(primals[0])
  return value, slope * tangents[0]


def _value_and_slope(x):
  wide = x.astype(jnp.float32)
  below = 0.5 * jax.lax.erfc(-wide * 0.5**0.5)
  density = jnp.exp(-0.5 * wide * wide) * (2.0 * jnp.pi) ** -0.5
  return (wide * below).astype(x.dtype), (below + wide * density).astype(x.dtype)
