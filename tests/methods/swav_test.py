"""SwAV against golden Sinkhorn rows and a NumPy transcription in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from protojax import errors
from protojax.methods import swav
from protojax.models import encoder as encoders
from protojax.prototypes import mixture, streaming
from protojax.training import programs, train_step

_QUEUE = {"method__queue_length": 40, "method__queue_start_epoch": 0.0}  # two batches of 16


def _cos(rows, columns, a=0.4, b=0.9):
  return np.cos(a * np.arange(rows)[:, None] + b * np.arange(columns)[None, :])


def _sinkhorn(scores, epsilon, num_steps):
  """Arrays [N, K] of one view; probabilities, as published: prototypes first, then samples."""
  q = np.exp(scores / epsilon).T
  q /= q.sum()
  for _ in range(num_steps):
    q /= q.sum(axis=1, keepdims=True) * q.shape[0]
    q /= q.sum(axis=0, keepdims=True) * q.shape[1]
  return (q * q.shape[1]).T


def _log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _rows(v):
  return v / np.linalg.norm(v, axis=1, keepdims=True)


def _targets(z, v, queue, epsilon=0.05):
  """Of features z [B, V, D], v [K, D] and queued features [N, 2, D]: q [B, 2, K]."""
  scores = np.concatenate([z[:, :2], queue]) @ _rows(v).T
  return np.stack([_sinkhorn(scores[:, t], epsilon, 3)[: len(z)] for t in range(2)], axis=1)


def _swapped(z, v, q, temperature=0.1):
  log_p = _log_softmax(z @ _rows(v).T / temperature)
  pairs = [(p, t) for t in range(2) for p in range(z.shape[1]) if p != t]
  return np.mean([-(q[:, t] * log_p[:, p]).sum(-1).mean() for p, t in pairs])


@functools.cache
def _parts(kind="learned", **changes):
  """(config, method, variables, views, jitted loss)."""
  c = tiny.config("swav", kind, **{**_QUEUE, **changes})
  method = swav.make(c)
  variables = jax.jit(method.init)(jax.random.key(0))
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape), tiny.abstract_views(c)
  )

  @jax.jit
  def loss(variables, step):
    trained, frozen = train_step.split(variables, method.learns_prototypes)
    grad_fn = jax.value_and_grad(method.loss, has_aux=True)
    (value, out), grads = grad_fn(trained, frozen, views, jax.random.key(2), step)
    return value, out, grads

  return c, method, variables, views, loss


def _features(c, variables, views):
  net = encoders.build(c)
  embed = jax.jit(lambda params, views: encoders.embed(net, params, {}, views, train=True)[0].z)
  return np.asarray(embed(variables.encoder, views), np.float64)


def _queue(seed=0):
  """Unit features [16, 2, 2, 16]: of each row two earlier batches, two views."""
  queue = np.random.default_rng(seed).normal(size=(16, 2, 2, 16)) + 0.5
  return queue / np.linalg.norm(queue, axis=-1, keepdims=True)


def _balanced(scores, epsilon):
  """`swav.targets` of scores [B, 1 + S, T, K]: [B, T, K]."""
  views = swav.targets(tiny.scores(jnp.asarray(scores)), epsilon=epsilon)
  return np.exp(np.concatenate([view.log_p for view in views], axis=1))


def test_targets_have_the_golden_rows_whether_a_sample_is_queued_or_not():
  scores = _cos(6, 4)
  whole = _balanced(scores[:, None, None], 0.07)[:, 0]
  first = [0.0226851907, 0.6466299891, 0.3306846619, 1.0684e-7]
  last = [1.0e-9, 2.3e-9, 0.00288075977, 0.99711924791]
  np.testing.assert_allclose(whole[0], first, rtol=1e-5, atol=1e-10)
  np.testing.assert_allclose(whole[5], last, rtol=1e-5, atol=1e-10)
  queued = scores[[0, 1, 2, 5, 4, 3]].reshape(2, 3, 1, 4)
  q = _balanced(queued, 0.07)
  assert q.shape == (2, 1, 4)
  np.testing.assert_allclose(q[:, 0], [first, last], rtol=1e-5, atol=1e-10)


def test_views_are_balanced_apart():
  scores = np.stack([_cos(6, 4), _cos(6, 4, b=0.2)], axis=1)[:, None]
  q = _balanced(scores, 0.07)
  alone = _balanced(scores[:, :, :1], 0.07)
  np.testing.assert_allclose(q[:, :1], alone, rtol=1e-6)


@pytest.mark.parametrize("step", [1, 2])
def test_loss_and_gradient_are_those_of_the_transcription_with_and_without_queue(step):
  """The queue holds two batches: step 1 must not look at its zeros, step 2 must use it."""
  c, _, variables, views, loss = _parts()
  queue = _queue()
  variables = variables.replace(carry={**variables.carry, "queue": jnp.asarray(queue, jnp.float32)})
  value, out, grads = loss(variables, step)
  z = _features(c, variables, views)
  v = np.asarray(variables.prototypes["v"], np.float64)
  rows = queue.reshape(32, 2, 16)
  q = _targets(z, v, rows if step == 2 else rows[:0])
  np.testing.assert_allclose(value, _swapped(z, v, q), rtol=1e-5)
  entropy = -(q * np.log(np.maximum(q, 1e-300))).sum(-1).mean()
  np.testing.assert_allclose(out.metrics["target_entropy"], entropy, rtol=1e-4)
  numeric = np.zeros_like(v)
  for index in np.ndindex(*v.shape):
    d = np.zeros_like(v)
    d[index] = 1e-5
    numeric[index] = (_swapped(z, v + d, q) - _swapped(z, v - d, q)) / 2e-5
  error = np.linalg.norm(grads["prototypes"]["v"] - numeric)
  assert error < 1e-5 * np.linalg.norm(numeric)


def test_a_queue_that_alone_needs_blocks_gives_the_same_loss(monkeypatch):
  c, _, variables, _, at_once = _parts()
  variables = variables.replace(carry={**variables.carry, "queue": jnp.asarray(_queue())})
  k = c.method.num_prototypes
  # Up to the views of the batch all at once; with two batches queued a quarter of K at a time.
  monkeypatch.setattr(streaming, "DENSE", 16 * (2 + c.augment.num_local) * k)
  monkeypatch.setattr(streaming, "_AT_ONCE_ON_CPU", 96 * k // 4)
  in_blocks = _parts.__wrapped__()[-1]
  for step in (1, 2):
    (one, _, g), (other, _, h) = at_once(variables, step), in_blocks(variables, step)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(g["prototypes"]["v"], h["prototypes"]["v"], atol=1e-6)


def test_queue_changes_targets_and_gets_no_gradient():
  _, method, variables, views, loss = _parts()
  values = []
  for seed in (0, 1):
    queue = jnp.asarray(_queue(seed), jnp.float32)
    variables = variables.replace(carry={**variables.carry, "queue": queue})
    values.append(loss(variables, 2)[0])
  assert abs(values[0] - values[1]) > 1e-5
  trained, frozen = train_step.split(variables, True)

  def of_queue(queue):
    carry = {**frozen.carry, "queue": queue}
    return method.loss(trained, frozen.replace(carry=carry), views, jax.random.key(2), 2)[0]

  np.testing.assert_array_equal(jax.jit(jax.grad(of_queue))(frozen.carry["queue"]), 0.0)


def test_queue_is_a_ring_of_global_batches():
  c, method, variables, _, _ = _parts()
  assert variables.carry["queue"].shape == (16, 2, 2, 16)
  batches = [jnp.full((16, 1, 2, 16), i + 1.0) for i in range(3)]
  for step, queued in enumerate(batches):
    stats = {"batch_stats": {}, "prototypes": (), "queued": queued}
    variables = method.update(variables, stats, jnp.int32(step))
  np.testing.assert_array_equal(variables.carry["queue"][:, :, 0, 0], [[3.0, 2.0]] * 16)
  placed = programs.Program(c).shardings.carry["queue"]
  assert placed.spec == PartitionSpec("data")


def test_what_is_queued_are_the_features_of_the_two_global_views():
  c, _, variables, views, loss = _parts()
  queued = loss(variables, 0)[1].stats["queued"]
  np.testing.assert_allclose(queued[:, 0], _features(c, variables, views)[:, :2], atol=1e-5)


def test_no_queue_leaves_no_trace_and_the_first_steps_with_one_are_the_same():
  _, _, variables, _, loss = _parts(method__queue_length=0)
  assert set(variables.carry) == {"batch_stats"} and variables.teacher == ()
  np.testing.assert_allclose(loss(variables, 5)[0], _parts()[-1](_parts()[2], 0)[0], rtol=1e-6)


@pytest.mark.parametrize("order", ["after_step", "before_loss"])
def test_mixture_moves_on_the_student_s_global_features_in_both_orders(order):
  changes = {"method__em_order": order, "mixture__center_features": False}
  c, method, variables, views, loss = _parts("mixture", **changes)
  _, out, _ = loss(variables, 0)
  z = _features(c, variables, views)
  tx = mixture.online_em(
    32, 16, horizon_steps=20.0, kappa=c.mixture.kappa, balanced=c.mixture.balanced
  )
  expected, _ = tx.update(variables.prototypes, jnp.asarray(z[:, :2], jnp.float32))
  moved = method.update(variables, out.stats, jnp.int32(0)).prototypes
  np.testing.assert_allclose(moved.means, expected.means, atol=1e-5)
  means = expected.means if order == "before_loss" else variables.prototypes.means
  v = np.asarray(means, np.float64)
  q = _targets(z, v, np.zeros((0, 2, 16)))
  np.testing.assert_allclose(out.metrics["loss"], _swapped(z, v, q), rtol=1e-4)


@pytest.mark.parametrize(
  "changes",
  [
    {"batch_size": 2, "precision": "bfloat16", "method__queue_length": 4},
    {"method__epsilon": 1e-3, "method__temperature": 1e-3},
  ],
  ids=["two images in bfloat16", "saturated scores"],
)
def test_extreme_settings_stay_finite(changes):
  _, _, variables, _, loss = _parts(**changes)
  for leaf in jax.tree.leaves(loss(variables, 3)):
    assert np.isfinite(np.asarray(leaf, np.float64)).all()


def test_identical_features_get_even_targets():
  q = _balanced(jnp.full((8, 1, 2, 4), 0.3), 0.05)
  np.testing.assert_allclose(q, 0.25, rtol=1e-6)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"method__queue_length": 15}, "queue_length=15 does not hold a batch of 16"),
    ({"method__epsilon": 0.0}, "method.epsilon=0.0"),
    ({"method__sinkhorn_steps": 0}, "method.sinkhorn_steps=0"),
    ({"method__prototypes": "none"}, "method.prototypes='none' is unknown"),
    ({"method__em_order": "never"}, "method.em_order='never' is unknown"),
  ],
)
def test_bad_settings_are_one_line(changes, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    swav.make(tiny.config("swav", "learned", **changes))
  assert "\n" not in str(caught.value)
