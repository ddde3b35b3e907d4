"""Attention: the kernel, interpreted, against XLA's; over devices; who is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from protojax.models import attention


def _value_and_gradient(implementation, qkv, tokens):
  """([N, tokens, D], [N, T, 3 D]); XLA sees the tokens alone."""
  length = qkv.shape[1] if implementation == "pallas" else tokens
  weights = np.random.default_rng(1).normal(size=(len(qkv), tokens, qkv.shape[2] // 3))

  def loss(x):
    y = attention.attend(x[:, :length], 3, implementation, tokens)[:, :tokens]
    return (y.astype(jnp.float32) * weights).sum(), y

  (_, value), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
  return value, gradient


def _qkv(n=6, length=8, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(0).normal(size=(n, length, 3 * 24)), dtype)


@pytest.mark.parametrize("tokens", [8, 5])
@pytest.mark.parametrize("dtype, error", [(jnp.float32, 1e-6), (jnp.bfloat16, 0.03)])
def test_the_kernel_equals_xla(tokens, dtype, error):
  qkv = _qkv(dtype=dtype)
  found, expected = (_value_and_gradient(name, qkv, tokens) for name in ("pallas", "xla"))
  for ours, theirs in zip(found, expected, strict=True):
    assert ours.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=error * 3, rtol=error
    )
  np.testing.assert_array_equal(np.asarray(found[1][:, tokens:], np.float32), 0.0)


@pytest.mark.parametrize("n", [16, 4])  # divided over both axes, or over the first alone
def test_devices_of_a_mesh_share_the_kernel(n):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  qkv = _qkv(n)
  alone = _value_and_gradient("pallas", qkv, 7)
  with jax.set_mesh(mesh):
    together = _value_and_gradient("pallas", qkv, 7)
  for one, all_of_them in zip(alone, together, strict=True):
    np.testing.assert_allclose(one, all_of_them, atol=1e-6)
  rows = {shard.data.shape[0] for shard in together[1].addressable_shards}
  assert rows == {n // 8 if n == 16 else n // 4}


def test_what_auto_is_follows_devices_and_dtype(monkeypatch):
  assert attention.choose("auto", jnp.bfloat16) == "xla"
  assert attention.choose("pallas", jnp.float32) == "pallas"
  monkeypatch.setattr(attention, "on_tpu", lambda: True)
  assert attention.choose("auto", jnp.float32) == "xla"
  assert attention.choose("auto", jnp.bfloat16) == "xla"  # eight devices, no mesh
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert attention.choose("auto", jnp.bfloat16) == "pallas"
