"""GEDI against a NumPy transcription in float64 and, in full, against its own definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax import errors, placement
from protojax.methods import gedi
from protojax.prototypes import soft
from protojax.training import programs, train_step

_FULL = {
  "method__generative": True,
  "method__buffer_size": 55,
  "method__sgld_steps": 3,
  "method__sgld_rate": 0.1,
}


def _log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _uniformity(logits):
  return -np.log(np.exp(_log_softmax(logits)).mean(axis=0)).mean(axis=-1)  # [V]


def _cross_entropy(logits, v, t):
  return -(np.exp(_log_softmax(logits[:, t])) * _log_softmax(logits[:, v])).sum(-1).mean()


def _loss(logits, weight_uniformity=0.5, weight_invariance=0.05, legacy=False):
  """Of logits [B, V, K], views 0 and 1 global."""
  if legacy:  # ours 0 is view 1 of the source: predicted from view 2
    return weight_uniformity * logits.shape[-1] * _uniformity(logits)[
      0
    ] + weight_invariance * _cross_entropy(logits, 0, 1)
  pairs = [(v, t) for v in range(logits.shape[1]) for t in range(2) if v != t]
  invariance = np.mean([_cross_entropy(logits, v, t) for v, t in pairs])
  return weight_uniformity * _uniformity(logits[:, :2]).mean() + weight_invariance * invariance


def _agreement(logits):
  return soft.agreement(soft.Assignments(None, log_p=jax.nn.log_softmax(logits)))


def _even(logits):
  return -_agreement(logits).log_mean.mean(axis=-1)


def _pairs(logits):
  return _agreement(logits).cross_entropy


def _numeric(function, x):
  out = np.zeros_like(x)
  for index in np.ndindex(*x.shape):
    d = np.zeros_like(x)
    d[index] = 1e-5
    out[index] = (function(x + d) - function(x - d)) / 2e-5
  return out


@functools.cache
def _parts(kind="learned", **changes):
  """(config, method, variables, views, jitted loss of (variables, key))."""
  c = tiny.config("gedi", kind, **changes)
  method = gedi.make(c)
  variables = jax.jit(method.init)(jax.random.key(0))
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape), tiny.abstract_views(c)
  )

  @jax.jit
  def loss(variables, key):
    trained, frozen = train_step.split(variables, method.learns_prototypes)
    grad_fn = jax.value_and_grad(method.loss, has_aux=True)
    (value, out), grads = grad_fn(trained, frozen, views, key, 0)
    return value, out, grads

  return c, method, variables, views, loss


def test_terms_match_numpy_in_value_and_gradient():
  x = 2.0 * np.random.default_rng(0).normal(size=(5, 3, 4))
  weight_v, weight_p = np.array([0.3, -0.7]), np.random.default_rng(1).normal(size=(3, 2))
  with jax.enable_x64(True):
    logits = jnp.asarray(x)
    np.testing.assert_allclose(_even(logits), _uniformity(x)[:2], rtol=1e-12)
    np.testing.assert_allclose(
      _pairs(logits),
      [[_cross_entropy(x, v, t) for t in range(2)] for v in range(3)],
      rtol=1e-12,
    )
    by_uniformity = np.asarray(jax.grad(lambda y: _even(y) @ weight_v)(logits))
    by_pairs = np.asarray(jax.grad(lambda y: (_pairs(y) * weight_p).sum())(logits))
  for got, expected in (
    (by_uniformity, _numeric(lambda y: _uniformity(y)[:2] @ weight_v, x)),
    (
      by_pairs,
      _numeric(
        lambda y: sum(weight_p[v, t] * _cross_entropy(y, v, t) for v in range(3) for t in range(2)),
        x,
      ),
    ),
  ):
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)


def test_uniform_assignments_cost_ln_k_and_in_the_released_form_k_ln_k():
  logits = jnp.zeros((2, 2, 2048))
  np.testing.assert_allclose(_even(logits), np.log(2048), rtol=1e-6)
  np.testing.assert_allclose(_pairs(logits), np.log(2048), rtol=2e-5)
  np.testing.assert_allclose(2048 * _even(logits)[0], 15_616, atol=1.0)


def test_saturated_logits_stay_finite_where_probabilities_underflow():
  """All images certain of one cluster: the others' mean probability is exp(-400), 0 in float32."""
  logits = jnp.zeros((2, 2, 5)).at[..., 0].set(400.0)
  value, gradient = jax.value_and_grad(lambda x: _even(x).mean())(logits)
  np.testing.assert_allclose(value, 400.0 * 4 / 5, rtol=1e-6)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.1
  opposite = logits.at[:, 1].set(logits[:, 1, ::-1])
  value, gradient = jax.value_and_grad(lambda x: _pairs(x)[0, 1])(opposite)
  np.testing.assert_allclose(value, 400.0, rtol=1e-6)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_loss_is_the_weighted_sum_and_legacy_the_released_one(legacy):
  c, method, variables, views, loss = _parts(method__legacy=legacy)
  value, out, grads = loss(variables, jax.random.key(2))
  # Without batch norm and drop path, training and evaluation mode are one.
  embed = jax.jit(lambda x: method.embeddings(variables, x)["prototypes"])
  crops = (*views["global"].swapaxes(0, 1), *views["local"].swapaxes(0, 1))
  z = np.stack([embed(x) for x in crops], axis=1).astype(np.float64)

  def of_rows(v):
    rows = v / np.linalg.norm(v, axis=1, keepdims=True)
    return _loss(z @ rows.T / c.method.temperature, legacy=legacy)

  v = np.asarray(variables.prototypes["v"], np.float64)
  np.testing.assert_allclose(value, of_rows(v), rtol=1e-5)
  numeric = _numeric(of_rows, v)
  error = np.linalg.norm(grads["prototypes"]["v"] - numeric)
  assert error < 1e-5 * np.linalg.norm(numeric)
  assert variables.teacher == () and set(variables.carry) == {"batch_stats"}
  assert "generative" not in out.metrics
  # What the monitor compares: the cross entropy alone, of which uniform assignments cost ln K.
  p = z @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T / c.method.temperature
  pairs = [(0, 1)] if legacy else [(i, t) for i in range(p.shape[1]) for t in range(2) if i != t]
  expected = np.mean([_cross_entropy(p, i, t) for i, t in pairs])
  np.testing.assert_allclose(out.metrics["cross_entropy"], expected, rtol=1e-5)
  np.testing.assert_allclose(out.metrics["ln_k"], np.log(32), rtol=1e-6)


def test_generative_gradient_is_the_difference_of_mean_energy_gradients():
  only = {
    "method__weight_uniformity": 0.0,
    "method__weight_invariance": 0.0,
    "method__input_noise": 0.0,
  }
  c, method, variables, views, loss = _parts(**_FULL, **only)
  value, out, grads = loss(variables, jax.random.key(2))
  _, samples = out.stats["chains"]

  @jax.jit
  def mean_density(trained, images):
    scores = method.codes(variables.replace(**trained), images)["prototypes"]
    return jax.nn.logsumexp(scores / c.method.temperature, axis=-1).mean()

  trained = {"encoder": variables.encoder, "prototypes": variables.prototypes}
  at_samples = jax.value_and_grad(mean_density)(trained, samples)
  at_data = jax.value_and_grad(mean_density)(trained, views["global"][:, 0])
  np.testing.assert_allclose(value, at_samples[0] - at_data[0], rtol=1e-4)
  got, expected = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    for tree in (grads, jax.tree.map(jnp.subtract, at_samples[1], at_data[1]))
  )
  assert np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected)
  assert np.linalg.norm(expected) > 1e-3


def test_data_get_noise_and_the_term_its_weight():
  """Same key, so the same chains."""
  only = {"method__weight_uniformity": 0.0, "method__weight_invariance": 0.0}
  loss_of = {}
  for noise, weight in ((0.0, 1.0), (0.0, 2.0), (3.0, 1.0)):
    changes = {"method__input_noise": noise, "method__weight_generative": weight}
    _, _, variables, _, loss = _parts(**_FULL, **only, **changes)
    loss_of[noise, weight] = float(loss(variables, jax.random.key(2))[0])
  np.testing.assert_allclose(loss_of[0.0, 2.0], 2 * loss_of[0.0, 1.0], rtol=1e-6)
  assert abs(loss_of[3.0, 1.0] - loss_of[0.0, 1.0]) > 1e-3


def test_chains_climb_the_density_and_go_back_to_their_slot():
  changes = {"method__sgld_noise": 0.0, "method__sgld_restart": 0.0, "method__sgld_rate": 0.02}
  c, method, variables, _, loss = _parts(**{**_FULL, **changes})
  replay = variables.carry["replay"]
  assert replay.shape == (16, 3, 16, 16, 3)  # 55 images are three batches of 16
  v = np.asarray(variables.prototypes["v"]).ravel()
  assert abs(np.corrcoef(v, np.asarray(replay).ravel()[: v.size])[0, 1]) < 0.3  # other draws
  _, out, _ = loss(variables, jax.random.key(2))
  slot, samples = out.stats["chains"]

  @jax.jit
  def density(images):
    scores = method.codes(variables, images)["prototypes"]
    return jax.nn.logsumexp(scores / c.method.temperature, axis=-1)

  assert (density(samples) > density(replay[:, slot])).all()
  moved = method.update(variables, out.stats, jnp.int32(0)).carry["replay"]
  np.testing.assert_array_equal(moved, replay.at[:, slot].set(samples))
  assert programs.Program(c).shardings.carry["replay"].spec == placement.ENCODED


def test_sampling_uses_batch_norm_in_evaluation_mode():
  """A chain must not change when another row of its batch does."""
  _, _, variables, _, loss = _parts(**_FULL, head__norm="batch")
  replay = variables.carry["replay"]
  samples = []
  for start in (replay, replay.at[0].add(1.0)):
    carry = {**variables.carry, "replay": start}
    samples.append(loss(variables.replace(carry=carry), jax.random.key(2))[1].stats["chains"][1])
  np.testing.assert_allclose(samples[0][1:], samples[1][1:], atol=1e-5)
  assert np.abs(samples[0][0] - samples[1][0]).max() > 0.1


@pytest.mark.parametrize("kind", ["mixture", "frozen"])
def test_prototypes_without_a_gradient_leave_one_to_the_encoder(kind):
  _, _, variables, _, loss = _parts(kind, **_FULL)
  value, _, grads = loss(variables, jax.random.key(2))
  assert np.isfinite(value) and set(grads) == {"encoder"}
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0.0


def test_two_images_in_bfloat16_stay_finite():
  changes = {"batch_size": 2, "precision": "bfloat16", "method__temperature": 1e-3}
  _, _, variables, _, loss = _parts(**{**_FULL, **changes})
  value, out, grads = loss(variables, jax.random.key(2))
  for leaf in jax.tree.leaves((value, out.metrics, out.stats["chains"], grads)):
    assert np.isfinite(np.asarray(leaf, np.float64)).all()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"method__temperature": 0.0}, "method.temperature=0.0"),
    ({**_FULL, "method__buffer_size": 15}, "method.buffer_size=15.*batch of 16"),
    ({**_FULL, "method__sgld_steps": 0}, "method.sgld_steps=0"),
    ({"method__prototypes": "none"}, "method.prototypes='none' is unknown"),
  ],
)
def test_bad_settings_are_one_line(changes, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    gedi.make(tiny.config("gedi", "learned", **changes))
  assert "\n" not in str(caught.value)
