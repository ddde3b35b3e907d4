"""GELU: values and slopes against SciPy, what it keeps for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from protojax.models import activations

_X = np.linspace(-6.0, 6.0, 241, dtype=np.float32)


def _exact(x):
  below = special.ndtr(x)
  return x * below, below + x * np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-8)])
def test_gelu_and_its_slope_are_exact_to_the_dtype(dtype, error):
  x = jnp.asarray(_X, dtype)
  value, slope = jax.jit(jax.vmap(jax.value_and_grad(activations.gelu)))(x)
  assert value.dtype == slope.dtype == dtype
  expected = _exact(np.asarray(x, np.float64))
  for found, exact in zip((value, slope), expected, strict=True):
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=error, atol=error)


def test_gradients_are_those_of_automatic_differentiation():
  x, g = jnp.asarray(_X), jnp.cos(_X)
  own, automatic = (
    jax.jit(lambda x, f=f: jax.vjp(f, x)[1](g)[0])(x)
    for f in (activations.gelu, lambda x: jax.nn.gelu(x, approximate=False))
  )
  np.testing.assert_allclose(own, automatic, atol=1e-6)


def test_one_array_of_the_inputs_dtype_is_kept_for_the_backward_pass():
  _, back = jax.vjp(activations.gelu, jnp.asarray(_X, jnp.bfloat16))
  kept = [leaf for leaf in jax.tree.leaves(back) if leaf.size > 1]
  assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(_X.shape, jnp.bfloat16)]
