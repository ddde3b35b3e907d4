"""Projector and weight-normalised prototypes against float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from protojax import losses
from protojax.models import heads
from protojax.prototypes import weight_norm


def rows(n=6, dim=12, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(n, dim)), jnp.float32)


def test_parameter_count_with_prototypes():
  head = heads.Projector()
  params = jax.eval_shape(lambda: head.init(jax.random.key(0), jnp.zeros((1, 384)))["params"])
  prototypes = jax.eval_shape(
    lambda: weight_norm.init(jax.random.key(0), 65_536, 256, trainable_norm=True)
  )
  total = sum(x.size for x in jax.tree.leaves((params, prototypes)))
  assert total == 22_352_128


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("l2", [True, False])
def test_projector_equals_a_float64_reference(layers, norm, l2):
  head = heads.Projector(layers=layers, hidden=16, bottleneck=5, norm=norm, l2=l2)
  x = rows()
  variables = head.init(jax.random.key(1), x)
  params = jax.tree.map(
    lambda p: p + 0.3 * rows(1, p.size, p.size).reshape(p.shape), variables["params"]
  )
  actual, _ = head.apply(
    {**variables, "params": params}, x, views=2, train=True, mutable=["batch_stats"]
  )

  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  y = np.asarray(x, np.float64)
  for i in range(1, layers + 1):
    y = y @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"]
    if i == layers:
      break
    if norm == "batch":
      for view in range(2):  # rows 0, 2, 4 and 1, 3, 5
        part = y[view::2]
        y[view::2] = (part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5)
      y = y * params[f"norm{i}"]["scale"] + params[f"norm{i}"]["bias"]
    y = y * 0.5 * (1 + special.erf(y / np.sqrt(2)))
  if l2:
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, y, atol=2e-5)


def test_one_layer_is_a_single_linear():
  params = heads.Projector(layers=1, bottleneck=5).init(jax.random.key(0), rows())["params"]
  assert jax.tree.map(jnp.shape, params) == {"fc1": {"kernel": (12, 5), "bias": (5,)}}


def test_weights_start_normal_and_biases_at_zero():
  params = heads.Projector(hidden=256).init(jax.random.key(0), rows(1, 256))["params"]
  for layer in params.values():
    np.testing.assert_allclose(np.std(layer["kernel"]), 0.02, rtol=0.02)
    assert np.abs(layer["kernel"]).max() > 0.05
    np.testing.assert_array_equal(layer["bias"], 0.0)


def test_projector_without_biases_keeps_those_of_its_norms():
  head = heads.Projector(layers=2, norm="batch", bias=False)
  params = jax.eval_shape(lambda: head.init(jax.random.key(0), rows())["params"])
  assert {name: set(part) for name, part in params.items()} == {
    "fc1": {"kernel"},
    "norm1": {"scale", "bias"},
    "fc2": {"kernel"},
  }


def test_bfloat16_projector_returns_float32_unit_rows():
  head = heads.Projector(hidden=32, bottleneck=8, dtype=jnp.bfloat16)
  params = head.init(jax.random.key(0), rows())["params"]
  z = head.apply({"params": params}, rows())
  assert z.dtype == jnp.float32 and params["fc1"]["kernel"].dtype == jnp.float32
  np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1.0, atol=1e-6)


def test_normalising_zero_is_zero_with_a_finite_gradient():
  zero = jnp.zeros((1, 4))
  np.testing.assert_array_equal(losses.l2_normalize(zero), 0.0)
  grad = jax.grad(lambda x: losses.l2_normalize(x).sum())(zero)
  assert np.isfinite(grad).all()


def test_prototypes_start_uniform():
  prototypes = weight_norm.init(jax.random.key(0), 2048, 64, trainable_norm=True)
  v = np.asarray(prototypes["v"])
  assert v.shape == (2048, 64) and np.abs(v).max() <= 1 / 8
  np.testing.assert_allclose(v.std(), 1 / 8 / np.sqrt(3), rtol=0.01)
  np.testing.assert_allclose(v.mean(), 0.0, atol=1e-3)
  np.testing.assert_array_equal(prototypes["g"], np.ones((2048, 1)))
  assert set(weight_norm.init(jax.random.key(0), 4, 8)) == {"v"}


def test_rows_and_scores_equal_a_float64_reference():
  v, g = rows(7, 12), rows(7, 1, seed=1)
  z = rows(6, 12, seed=2).reshape(2, 3, 12)
  expected = np.asarray(v, np.float64)
  expected = np.asarray(g, np.float64) * expected / np.linalg.norm(expected, axis=1, keepdims=True)
  actual = weight_norm.rows({"v": v, "g": g})
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(weight_norm.rows({"v": v}), axis=1), 1.0, atol=1e-6)
  scores = weight_norm.scores(actual, z.astype(jnp.bfloat16))
  assert scores.shape == (2, 3, 7) and scores.dtype == jnp.float32
  np.testing.assert_allclose(weight_norm.scores(actual, z), np.asarray(z) @ expected.T, atol=1e-5)


def test_scores_ask_for_the_highest_precision():
  jaxpr = str(jax.make_jaxpr(weight_norm.scores)(rows(), rows()))
  assert jaxpr.count("Precision.HIGHEST") >= 1


def test_gradient_of_v_is_orthogonal_to_v():
  prototypes = {"v": 3.0 * rows(7, 12), "g": rows(7, 1, seed=1)}

  def loss(prototypes):
    scores = weight_norm.scores(weight_norm.rows(prototypes), rows(5, 12, seed=3))
    return jnp.sum(jax.nn.log_softmax(scores)[:, 0])

  grad = np.asarray(jax.grad(loss)(prototypes)["v"])
  assert np.linalg.norm(grad, axis=1).min() > 1e-2
  np.testing.assert_allclose((grad * np.asarray(prototypes["v"])).sum(axis=1), 0.0, atol=1e-5)
