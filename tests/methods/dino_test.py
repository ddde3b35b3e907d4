"""KoLeo on features and prototypes, and DINO-vMF: golden values, NumPy, edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from protojax import errors, losses, methods
from protojax.methods import base
from protojax.methods.networks import student_teacher
from protojax.training import train_step


def _sin(rows, columns, a=0.7, b=1.3):
  return np.sin(a * np.arange(rows)[:, None] + b * np.arange(columns)[None, :])


def _reference_koleo(rows, picked=None):
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  distance = np.linalg.norm(unit[:, None] - unit[None], axis=-1)
  np.fill_diagonal(distance, np.inf)
  nearest = np.maximum(distance.min(axis=1), 1e-4)
  return -np.log(nearest[slice(None) if picked is None else picked]).mean()


def test_koleo_golden_value():
  np.testing.assert_allclose(losses.koleo(jnp.asarray(_sin(4, 3))), 0.43859925171630226, rtol=1e-6)


@pytest.mark.parametrize(("num", "expected"), [(4096, -0.219), (8192, -0.2125)])
def test_koleo_of_untrained_prototypes_is_the_published_one(num, expected):
  rows = np.random.default_rng(0).normal(size=(num, 256))
  np.testing.assert_allclose(losses.koleo(jnp.asarray(rows)), expected, atol=1e-3)


@pytest.mark.parametrize("picked", [None, np.array([4, 0, 7], np.int32)])
def test_koleo_value_and_gradient_match_numpy(picked):
  rows = np.random.default_rng(0).normal(size=(9, 4))
  with jax.enable_x64(True):
    value, gradient = jax.value_and_grad(losses.koleo)(jnp.asarray(rows), picked)
  np.testing.assert_allclose(value, _reference_koleo(rows, picked), rtol=1e-12)
  numeric = np.zeros_like(rows)
  for index in np.ndindex(*rows.shape):
    step = np.zeros_like(rows)
    step[index] = 1e-6
    numeric[index] = (
      _reference_koleo(rows + step, picked) - _reference_koleo(rows - step, picked)
    ) / 2e-6
  np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-5 * np.linalg.norm(numeric))


def test_koleo_in_chunks_is_the_same(monkeypatch):
  rows = jnp.asarray(_sin(11, 5), jnp.float32)
  whole = jax.value_and_grad(losses.koleo)(rows)
  monkeypatch.setattr(losses, "_PAIRS", 3 * 11)  # three rows at a time, then two
  for a, b in zip(whole, jax.value_and_grad(losses.koleo)(rows), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_koleo_of_copies_pairs_zeros_and_single_rows_is_finite(dtype):
  copies = jnp.tile(jnp.asarray(_sin(1, 6), dtype), (4, 1))
  value, gradient = jax.value_and_grad(losses.koleo)(copies)
  np.testing.assert_allclose(value, -np.log(1e-4), rtol=1e-6)
  np.testing.assert_array_equal(gradient.astype(jnp.float32), 0.0)
  near = copies.at[1, 0].add(0.01).astype(dtype)
  for rows in (copies[:2], copies[:1], near, jnp.zeros((3, 4), dtype)):
    value, gradient = jax.value_and_grad(losses.koleo)(rows)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert np.isfinite(gradient.astype(jnp.float32)).all()


def test_koleo_of_random_prototypes_has_the_known_value():
  rows = jax.random.normal(jax.random.key(0), (4096, 256))
  np.testing.assert_allclose(losses.koleo(rows), -0.219, atol=1.5e-3)


def _crops(rows):
  """[V 2, ...], crop after crop, as the published code lays it out -> [2, V, ...]."""
  return jnp.asarray(rows.reshape(-1, 2, 5).swapaxes(0, 1), jnp.float32)


def test_golden_losses_with_the_centre_of_the_step_before(monkeypatch):
  n = np.arange(4)[:, None]
  cosines = np.cos(0.4 * n + 0.9 * np.arange(5)[None, :])
  scores = student_teacher.Scores(
    tiny.scores(_crops(_sin(6, 5))), tiny.scores(_crops(cosines)), {}, None
  )
  build = student_teacher.build_with_prototypes

  def build_golden(config):
    method = build(config).method._replace(update=lambda variables, stats, step: variables)
    return student_teacher.PrototypeStudentTeacher(method, scores=lambda *args: scores)

  monkeypatch.setattr(student_teacher, "build_with_prototypes", build_golden)
  config = tiny.config(
    "dino",
    method__num_prototypes=5,
    method__teacher_temp=0.04,
    method__teacher_temp_warmup_epochs=0,
  )
  method = methods.load("dino").make(config)
  variables = base.Variables((), (), {}, {"center": jnp.zeros(5)})
  inputs = {}, jax.random.key(0), jnp.int32(0)
  value, out = method.loss({}, variables, *inputs)
  np.testing.assert_allclose(value, 6.408802805645531, rtol=1e-6)
  variables = method.update(variables, out.stats, jnp.int32(0))
  np.testing.assert_allclose(
    variables.carry["center"],
    [
      0.07450313644566808,
      0.006385454949996731,
      -0.06656461154794563,
      -0.0891399070945319,
      -0.04425589809341827,
    ],
    atol=1e-7,
  )
  value, out = method.loss({}, variables, *inputs)
  np.testing.assert_allclose(value, 6.409653500540364, rtol=1e-6)


def test_teacher_temperature_warms_up_by_epochs():
  """Four steps an epoch; the targets change with it."""
  warming = {
    "method__teacher_temp_start": 0.04,
    "method__teacher_temp": 0.08,
    "method__teacher_temp_warmup_epochs": 3,
  }
  method = methods.load("dino").make(tiny.config("dino", "learned", **warming))
  variables = jax.jit(method.init)(jax.random.key(0))
  trained, frozen = train_step.split(variables, True)
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape),
    tiny.abstract_views(tiny.config("dino")),
  )
  loss = jax.jit(method.loss)
  start, later = (
    loss(trained, frozen, views, jax.random.key(2), jnp.int32(step))[1].metrics for step in (3, 4)
  )
  np.testing.assert_allclose(start["teacher_temp"], 0.04, rtol=1e-6)
  np.testing.assert_allclose(later["teacher_temp"], 0.06, rtol=1e-6)
  assert later["target_entropy"] > start["target_entropy"] + 0.01


def _loss(config, g=None):
  """(value, LossOut, Scores, method, variables) of step 0 on random views."""
  method = methods.load("dino").make(config)
  variables = jax.jit(method.init)(jax.random.key(0))
  if g is not None:
    state = {**variables.prototypes, "g": g[0]}
    teacher = {**variables.teacher, "prototypes": {**state, "g": g[1]}}
    variables = variables.replace(prototypes=state, teacher=teacher)
  trained, frozen = train_step.split(variables, True)
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape), tiny.abstract_views(config)
  )
  networks = student_teacher.build_with_prototypes(config)
  inputs = trained, frozen, views, jax.random.key(2)
  value, out = jax.jit(method.loss)(*inputs, jnp.int32(0))
  return value, out, jax.jit(networks.scores)(*inputs), method, variables


def test_weighted_koleo_terms_join_the_cross_entropy():
  plain, out, scores, _, variables = _loss(tiny.config("dino", "learned"))
  assert "cross_entropy" not in out.metrics and "koleo" not in out.metrics
  config = tiny.config("dino", "learned", method__koleo=0.3, method__koleo_proto=0.7)
  value, out, _, _, _ = _loss(config)
  features = np.asarray(scores.features, np.float64)
  assert features.shape[-1] == config.model.width
  koleo = _reference_koleo(features[:, 0]) + _reference_koleo(features[:, 1])
  koleo_proto = _reference_koleo(np.asarray(variables.prototypes["v"], np.float64))
  np.testing.assert_allclose(value, plain + 0.3 * koleo + 0.7 * koleo_proto, rtol=1e-5)
  np.testing.assert_allclose(out.metrics["koleo_proto"], koleo_proto, rtol=1e-5)
  np.testing.assert_allclose(out.metrics["loss"], value)
  np.testing.assert_allclose(out.metrics["cross_entropy"], plain, rtol=1e-5)
  np.testing.assert_allclose(out.metrics["ln_k"], np.log(32), rtol=1e-6)


def test_vmf_loss_centre_and_gradient_in_the_norms_match_numpy():
  """At 64 dimensions, where SciPy's Bessel function and the expansion agree to 6e-7."""
  c = tiny.config(
    "dino", "learned", method__vmf=True, method__train_prototype_norm=True, head__bottleneck=64
  )
  rng = np.random.default_rng(3)
  g = [jnp.asarray(rng.uniform(0.5, 3.0, (32, 1)), jnp.float32) for _ in range(2)]
  value, out, scores, method, variables = _loss(c, g=g)

  def logits(scores, g, temperature):
    nu, kappa = 31.0, np.asarray(g[:, 0], np.float64) / temperature
    log_c = nu * np.log(kappa) - np.log(scipy.special.ive(nu, kappa)) - kappa
    x = np.asarray(scores, np.float64) / temperature + log_c
    return x - scipy.special.logsumexp(x, axis=-1, keepdims=True)

  log_p = logits(scores.student.dense(), g[0], 0.1)
  log_q = logits(scores.teacher.dense(), g[1], 0.04)
  terms = [
    -(np.exp(log_q[:, t]) * log_p[:, v]).sum(-1).mean()
    for v in range(4)
    for t in range(2)
    if v != t
  ]
  np.testing.assert_allclose(value, np.mean(terms), rtol=1e-5)
  mean = scipy.special.logsumexp(log_q, axis=(0, 1)) - np.log(2 * c.batch_size)
  moved = method.update(variables, out.stats, jnp.int32(0)).carry["center"]
  np.testing.assert_allclose(moved, 0.1 * mean, rtol=1e-5, atol=1e-5)
  # The centre is subtracted from log probabilities, not from scores.
  variables = variables.replace(carry={**variables.carry, "center": jnp.asarray(5 * mean)})
  trained, frozen = train_step.split(variables, True)
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape), tiny.abstract_views(c)
  )
  (centred, _), gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(
    trained, frozen, views, jax.random.key(2), jnp.int32(0)
  )
  q = scipy.special.softmax(log_q - 5 * mean, axis=-1)
  norms = np.asarray(g[0], np.float64)
  cosines = np.asarray(scores.student.dense(), np.float64) / norms[:, 0]

  def of_norms(norms):
    log_p = logits(cosines * norms[:, 0], norms, 0.1)
    return np.mean(
      [-(q[:, t] * log_p[:, v]).sum(-1).mean() for v in range(4) for t in range(2) if v != t]
    )

  np.testing.assert_allclose(centred, of_norms(norms), rtol=1e-5)
  # A norm moves its scores and its concentration.
  steps = 1e-5 * np.eye(32)[..., None]
  numeric = np.array([(of_norms(norms + d) - of_norms(norms - d)) / 2e-5 for d in steps])
  error = np.linalg.norm(gradient["prototypes"]["g"][:, 0] - numeric)
  assert error < 1e-5 * np.linalg.norm(numeric)


def test_vmf_of_equal_norms_is_plain_dino():
  plain = _loss(tiny.config("dino", "learned"))
  vmf = _loss(tiny.config("dino", "learned", method__vmf=True, method__train_prototype_norm=True))
  np.testing.assert_allclose(plain[0], vmf[0], rtol=1e-5)


def test_vmf_codes_carry_the_normaliser():
  c = tiny.config("dino", "learned", method__vmf=True, method__train_prototype_norm=True)
  g = jnp.ones((32, 1)).at[0].set(40.0)
  _, _, _, method, variables = _loss(c, g=(g, g))
  images = jax.random.normal(jax.random.key(5), (3, 16, 16, 3))
  scores = method.codes(variables, images)["prototypes"]
  plain = student_teacher.build_with_prototypes(c).method.codes(variables, images)["prototypes"]
  assert float((plain - scores)[:, 0].min()) > 10.0
  np.testing.assert_allclose((plain - scores)[:, 1:], float((plain - scores)[0, 1]), atol=1e-5)


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"method__prototypes": "mixture", "method__koleo_proto": 0.1}, "koleo_proto=0.1 needs"),
    ({"method__koleo_proto_rows": 33}, "koleo_proto_rows=33 must be 0"),
    ({"method__vmf": True}, "vmf=True changes nothing"),
    (
      {"method__vmf": True, "method__train_prototype_norm": True, "head__l2": False},
      "head.l2=False, head.bottleneck=16: method.vmf=True needs",
    ),
    ({"method__teacher_temp": 0.0}, "method.teacher_temp=0.0 must be above 0"),
    ({"method__sinkhorn_steps": 0}, "method.sinkhorn_steps=0 must be above 0"),
  ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(changes, line):
  with pytest.raises(errors.UserError, match=line) as caught:
    methods.load("dino").make(tiny.config("dino", "learned", **changes))
  assert "\n" not in str(caught.value)
