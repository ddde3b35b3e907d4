"""FALCON's loss against NumPy in float64, its codes through training, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax import errors
from protojax.methods import base, falcon
from protojax.methods.networks import student
from protojax.prototypes import dictionary
from protojax.training import programs

_HEAD = {
  "head__layers": 1,
  "head__norm_output": True,
  "head__init": "uniform",
  "head__l2": False,
}


def _config(**changes):
  return tiny.config("falcon", "dictionary", **_HEAD | changes)


@pytest.fixture
def bare(monkeypatch):
  """make(config) without an encoder: what the student would embed is given as its parameters."""

  def build(config):
    del config
    return student.Student(
      method=base.Method(False, *[None] * 7),
      embed=lambda trained, frozen, views, key: (trained["encoder"], {}),
      project=lambda variables, images: images,
    )

  monkeypatch.setattr(student, "build", build)
  return falcon.make


def _loss(method):
  """Compiled (z [B, V, D], codes [D, K]) -> ((value, LossOut), gradient in z)."""

  def value(z, codes):
    frozen = base.Variables((), {"dictionary": codes}, (), {})
    return method.loss({"encoder": z}, frozen, None, None, None)

  return jax.jit(jax.value_and_grad(value, has_aux=True))


def _codes(dim=16, num=32):
  return dictionary.init(jax.random.key(0), dim, num)


def _reference(z, codes, *, eps, assign, prior, beta, tau_batch):
  """The paper's sums over probabilities, [B, V, D] with views 0 and 1 global."""
  (dim, num), views = codes.shape, z.shape[1]
  scale = np.log((1 - eps * (num - 1)) / eps)
  if assign == "tanh":
    x, scale = np.tanh(z), np.sqrt(tau_batch) * scale
  else:
    x = np.sqrt(dim) * z / np.linalg.norm(z, axis=-1, keepdims=True)
  p = np.exp(scale / dim * x @ codes)
  p /= p.sum(axis=-1, keepdims=True)
  agreement = [
    -(p[:, t] * np.log(p[:, v])).sum(axis=-1).mean() for t in (0, 1) for v in range(views) if v != t
  ]
  spread = []
  for mean in p[:, :2].mean(axis=0):
    reverse = (mean * np.log(num * mean)).sum()
    spread.append(reverse if prior == "reverse" else -np.log(mean).mean())
  return np.mean(spread) + beta * np.mean(agreement)


@pytest.mark.parametrize(
  ("assign", "prior", "block"),
  [("l2", "reverse", 0), ("l2", "forward", 4), ("tanh", "reverse", 4), ("tanh", "forward", 0)],
)
def test_loss_and_gradient_match_numpy_in_float64(bare, assign, prior, block):
  options = {"eps": 0.01, "assign": assign, "prior": prior, "beta": 0.5, "tau_batch": 3}
  config = _config(
    head__bottleneck=5,
    method__num_prototypes=12,
    method__block=block,
    **{f"method__{k}": v for k, v in options.items()},
  )
  rng = np.random.default_rng(0)
  z, codes = rng.normal(size=(4, 3, 5)), rng.choice((-1, 1), size=(5, 12))
  with jax.enable_x64(True):
    (value, _), gradient = _loss(bare(config))(jnp.asarray(z), jnp.int8(codes))
    value, gradient = jax.device_get((value, gradient))
  np.testing.assert_allclose(value, _reference(z, codes, **options), rtol=1e-6)
  numeric = np.zeros(z.shape)
  for index in np.ndindex(*z.shape):
    step = np.zeros(z.shape)
    step[index] = 1e-5
    ends = (_reference(z + s * step, codes, **options) for s in (1, -1))
    numeric[index] = np.subtract(*ends) / 2e-5
  assert np.linalg.norm(gradient - numeric) < 1e-5 * np.linalg.norm(numeric)


def test_uniform_and_collapsed_assignments_cost_ln_k_and_spread_ones_less(bare):
  loss, codes = _loss(bare(_config())), _codes()["dictionary"]
  spread = np.stack([codes.T[:8]] * 2, axis=1)
  states = np.zeros((8, 2, 16)), np.broadcast_to(spread[:1], spread.shape), spread
  costs = []
  for z in states:
    (value, out), gradient = loss(z.astype(np.float32), codes)
    np.testing.assert_allclose(out.metrics["ln_k"], np.log(32), rtol=1e-6)
    costs.append(float(value))
    assert np.isfinite(gradient).all()
  np.testing.assert_allclose(costs, [np.log(32), np.log(32), np.log(32 / 8)], atol=0.1)


@pytest.mark.parametrize("changes", [{"method__prior": "forward"}, {"method__beta": 2.0}])
def test_ln_k_is_left_out_where_a_uniform_prediction_costs_something_else(bare, changes):
  (_, out), _ = _loss(bare(_config(**changes)))(jnp.ones((2, 2, 16)), jnp.ones((16, 32), jnp.int8))
  assert "ln_k" not in out.metrics and float(out.metrics["target_entropy"]) > 3.4


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_saturated_tanh_is_finite(bare, prior):
  """Views that are certain of opposite corners, with gradients through the tanh."""
  loss = _loss(bare(_config(method__assign="tanh", method__prior=prior)))
  codes = _codes()["dictionary"]
  corners = np.asarray(codes.T[:2], np.float32)
  for size in (4.0, 100.0):
    (value, _), gradient = loss(size * np.stack([corners, -corners], axis=1), codes)
    assert np.isfinite(value) and float(value) > 20.0 and np.isfinite(gradient).all()


@pytest.mark.parametrize(("assign", "best"), [("l2", 18.4207), ("tanh", 8 * 18.4207)])
def test_scores_do_not_depend_on_the_batch(bare, assign, best):
  method, codes = bare(_config(method__assign=assign)), _codes()
  variables = base.Variables((), codes, (), {})
  z = 20.0 * codes["dictionary"].T[:8].astype(jnp.float32)
  scores = np.asarray(method.codes(variables, z)["prototypes"])
  np.testing.assert_allclose(np.diag(scores), best, rtol=1e-5)
  np.testing.assert_allclose(method.codes(variables, z[:2])["prototypes"], scores[:2], rtol=1e-6)
  unit = method.prototype_matrices(variables)["prototypes"]
  x = method.embeddings(variables, z)["prototypes"]
  np.testing.assert_allclose(scores, best * np.asarray(x) @ np.asarray(unit).T / 4.0, rtol=1e-4)


def test_codes_stand_still_and_their_key_draws_them_again():
  program, state, _ = tiny.run_steps(_config(), 2)
  start, codes = program.init(program.config.seed).prototypes, state.prototypes["dictionary"]
  np.testing.assert_array_equal(codes, start["dictionary"])
  assert codes.dtype == jnp.int8
  again = dictionary.init(state.prototypes["key"], 16, 32)["dictionary"]
  np.testing.assert_array_equal(codes, again)


def test_codes_split_over_the_model_axis_agree_with_one_device():
  _, _, one = tiny.run_steps(_config(), 2, jax.devices()[:1])
  program, _, many = tiny.run_steps(_config(mesh__model=4), 2)
  split = jax.sharding.PartitionSpec(None, "model")
  assert program.shardings.prototypes["dictionary"].spec == split
  for a, b in zip(one, many, strict=True):
    np.testing.assert_allclose(a["train/loss"], b["train/loss"], rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"method__prototypes": "learned"}, "method.prototypes=dictionary"),
    ({"method__assign": "softmax"}, "method.assign='softmax' is unknown: choose l2 or tanh"),
    ({"method__prior": "none"}, "method.prior='none' is unknown: choose reverse or forward"),
    ({"method__eps": 1 / 32}, "method.eps=.*method.num_prototypes=32"),
    ({"method__eps": 0.0}, "method.eps=0.0"),
    ({"method__tau_batch": 0}, "method.tau_batch=0"),
    ({"method__num_prototypes": 1}, "method.num_prototypes=1"),
    ({"head__bottleneck": 4}, "head.bottleneck=4"),
    ({"head__l2": True}, "head.l2=False"),
  ],
)
def test_impossible_settings_are_refused_in_one_line(changes, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    programs.Program(_config(**changes))
  assert "\n" not in str(caught.value)
