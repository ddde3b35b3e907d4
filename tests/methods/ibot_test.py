"""iBOT: golden values of the published code, its patch loss in float64, masks, two sets."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from protojax import errors, losses
from protojax.data import masking, sources
from protojax.methods import ibot
from protojax.methods.networks import student_teacher
from protojax.models import encoder as encoders
from protojax.prototypes import assignment, prototype_set
from protojax.training import evaluation, export, programs, train_step

_MASKS = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0]], bool)


def _sin(rows, columns, o=0.0):
  return np.sin(0.7 * np.arange(rows)[:, None] + 1.3 * np.arange(columns)[None, :] + o)


def _cos(rows, columns):
  return np.cos(0.4 * np.arange(rows)[:, None] + 0.9 * np.arange(columns)[None, :])


def _views(crop_major):
  """[V B, ...] with B = 2, crop after crop, as the published code lays it out -> [B, V, ...]."""
  return jnp.asarray(crop_major.reshape(-1, 2, *crop_major.shape[1:]).swapaxes(0, 1), jnp.float32)


def _golden(config, monkeypatch):
  """The method of `config` over the golden scores and masks."""
  n = np.arange(80).reshape(4, 4, 5)
  scores = student_teacher.Scores(
    student=tiny.scores(_views(np.concatenate([_sin(4, 5), _sin(2, 5, 2.0)]))),
    teacher=tiny.scores(_views(_cos(4, 5))),
    stats={},
    features=None,
    student_patches=tiny.scores(_views(np.sin(0.3 * n))),
    teacher_patches=tiny.scores(_views(np.cos(0.2 * n))),
  )
  seen = {}

  def fake_scores(trained, frozen, views, key):
    seen.update(views)

    def hidden(x):
      return tiny.scores(jnp.take_along_axis(x.rows, views["hidden"][..., None], axis=2))

    student, teacher = scores.student_patches, scores.teacher_patches
    return scores._replace(
      student_patches=hidden(student),
      teacher_patches=hidden(teacher),
      teacher_patch_mean=teacher.mean(),
    )

  build = student_teacher.build_with_prototypes

  def fake_build(*args, **kwargs):
    method = build(*args, **kwargs).method
    method = method._replace(update=lambda variables, stats, step: variables)
    return student_teacher.PrototypeStudentTeacher(method, fake_scores)

  def fake_masks(*args):
    return lambda key, batch, views: jnp.asarray(_MASKS.reshape(2, 2, 4).swapaxes(0, 1))

  monkeypatch.setattr(ibot.student_teacher, "build_with_prototypes", fake_build)
  monkeypatch.setattr(ibot.masking, "make", fake_masks)
  config.method.update({"mask_ratios": (0.75,), "mask_spreads": (0.0,)})
  return ibot.make(config), seen


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_golden_values_of_the_published_code(monkeypatch, weights):
  c = tiny.config(
    "ibot",
    method__num_prototypes=5,
    method__teacher_temp=0.04,
    method__patch_temp=0.07,
    method__teacher_temp_warmup_epochs=0,
    method__class_weight=weights[0],
    method__patch_weight=weights[1],
  )
  method, seen = _golden(c, monkeypatch)
  zeros = {"prototypes": jnp.zeros(5), "patch": jnp.zeros(5)}
  variables = ibot.base.Variables((), (), (), {"center": zeros})
  views = {"global": jnp.zeros((2, 2, 16, 16, 3))}
  value, out = method.loss({}, variables, views, jax.random.key(0), jnp.int32(0))
  np.testing.assert_allclose(out.metrics["cross_entropy"], 3.1243953591595024, rtol=1e-6)
  np.testing.assert_allclose(out.metrics["patch_loss"], 3.1526651222030813, rtol=1e-6)
  expected = 3.1243953591595024 * weights[0] + 3.1526651222030813 * weights[1]
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(out.metrics["masked"], 6 / 16)
  np.testing.assert_allclose(out.metrics["ln_k"], np.log(5), rtol=1e-6)
  # What no student can beat: the entropy of the hidden patches' targets, view by view.
  p = scipy.special.softmax(np.cos(0.2 * np.arange(80).reshape(4, 4, 5)) / 0.07, axis=-1)
  of_patch = -(p * np.log(p)).sum(axis=-1)
  views_of_masks = [of_patch[v, _MASKS[v]].mean() if _MASKS[v].any() else 0.0 for v in range(4)]
  floor = np.mean(views_of_masks)
  np.testing.assert_allclose(out.metrics["patch_target_entropy"], floor, rtol=1e-5)
  hidden = _MASKS.reshape(2, 2, 4).swapaxes(0, 1)  # from the student, and counted by the loss
  np.testing.assert_array_equal(seen["mask"], hidden)
  center = method.update(variables, out.stats, jnp.int32(0)).carry["center"]
  np.testing.assert_allclose(
    center["patch"],
    [
      0.004470799981649034,
      0.0019781707872902616,
      -0.0005933218338788562,
      -0.0031411605858665433,
      -0.005563771177801176,
    ],
    atol=1e-8,
  )
  np.testing.assert_allclose(
    center["prototypes"],
    [
      0.07450313644566808,
      0.006385454949996731,
      -0.06656461154794563,
      -0.0891399070945319,
      -0.04425589809341827,
    ],
    atol=1e-7,
  )


def test_each_kind_of_token_has_its_centre_and_its_warm_up(monkeypatch):
  c = tiny.config(
    "ibot",
    method__num_prototypes=5,
    method__teacher_temp_start=0.04,
    method__teacher_temp=0.08,
    method__patch_temp_start=0.05,
    method__patch_temp=0.09,
    method__teacher_temp_warmup_epochs=3,
  )
  method, _ = _golden(c, monkeypatch)
  center = {"prototypes": np.linspace(0, 0.4, 5), "patch": np.linspace(0.3, -0.3, 5)}
  given = {kind: jnp.asarray(x, jnp.float32) for kind, x in center.items()}
  variables = ibot.base.Variables((), (), (), {"center": given})
  views = {"global": jnp.zeros((2, 2, 16, 16, 3))}
  # Four steps an epoch: this is the second of three.
  _, out = method.loss({}, variables, views, jax.random.key(0), jnp.int32(5))
  np.testing.assert_allclose(out.metrics["teacher_temp"], 0.06, rtol=1e-6)
  np.testing.assert_allclose(out.metrics["patch_temp"], 0.07, rtol=1e-6)

  def log_softmax(x):
    return x - scipy.special.logsumexp(x, axis=-1, keepdims=True)

  student = log_softmax(np.concatenate([_sin(4, 5), _sin(2, 5, 2.0)]) / 0.1).reshape(3, 2, 5)
  q = scipy.special.softmax((_cos(4, 5) - center["prototypes"]) / 0.06, axis=-1).reshape(2, 2, 5)
  pairs = [-(q[t] * student[v]).sum(-1).mean() for t in range(2) for v in range(3) if v != t]
  np.testing.assert_allclose(out.metrics["cross_entropy"], np.mean(pairs), rtol=1e-5)
  n = np.arange(80).reshape(4, 4, 5)
  q = scipy.special.softmax((np.cos(0.2 * n) - center["patch"]) / 0.07, axis=-1)
  expected = _reference(np.sin(0.3 * n)[None], q[None], _MASKS[None], 0.1)
  np.testing.assert_allclose(out.metrics["patch_loss"], expected, rtol=1e-5)


def test_sinkhorn_balances_the_hidden_patches_and_no_others(monkeypatch):
  c = tiny.config(
    "ibot",
    method__num_prototypes=5,
    method__targets="sinkhorn",
    method__patch_temp_start=0.07,
    method__patch_temp=0.07,
  )
  method, _ = _golden(c, monkeypatch)
  zeros = {"prototypes": jnp.zeros(5), "patch": jnp.zeros(5)}
  views = {"global": jnp.zeros((2, 2, 16, 16, 3))}
  variables = ibot.base.Variables((), (), (), {"center": zeros})
  _, out = method.loss({}, variables, views, jax.random.key(0), jnp.int32(0))
  n = np.arange(80).reshape(4, 4, 5)
  q = np.exp(np.cos(0.2 * n[_MASKS]) / 0.07)
  for _ in range(3):
    q /= q.sum(axis=0)
    q /= q.sum(axis=1, keepdims=True)
  of_all = np.zeros(n.shape)
  of_all[_MASKS] = q
  expected = _reference(np.sin(0.3 * n)[None], of_all[None], _MASKS[None], 0.1)
  np.testing.assert_allclose(out.metrics["patch_loss"], expected, rtol=1e-5)
  mean = q.mean(axis=0)
  entropy = -(mean * np.log(mean)).sum()
  np.testing.assert_allclose(out.metrics["patch_mean_entropy"], entropy, rtol=1e-5)


def _reference(student, q, mask, temperature):
  """Hidden patches of a view, one after the other, in float64."""
  total = 0.0
  for view in np.ndindex(mask.shape[:2]):
    hidden = np.flatnonzero(mask[view])
    for n in hidden:
      logits = student[view][n] / temperature
      log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
      total -= (q[view][n] * log_p).sum() / len(hidden)
  return total / (mask.shape[0] * mask.shape[1])


def _example(seed=0):
  rng = np.random.default_rng(seed)
  q = np.exp(rng.normal(size=(2, 2, 3, 4)))
  mask = np.array([[[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [0, 1, 0]]], bool)
  return rng.normal(size=(2, 2, 3, 4)), q / q.sum(axis=-1, keepdims=True), mask


def test_patch_loss_and_its_gradient_match_numpy_in_float64():
  with jax.enable_x64(True):
    student, q, mask = _example()
    loss = functools.partial(losses.masked_patch_entropy, mask=jnp.asarray(mask), temperature=0.3)
    both = jnp.asarray(student), jnp.asarray(q)
    value, gradients = jax.device_get(jax.value_and_grad(loss, argnums=(0, 1))(*both))
  np.testing.assert_allclose(value, _reference(student, q, mask, 0.3), rtol=1e-12)
  numeric = np.zeros_like(student)
  for index in np.ndindex(*student.shape):
    step = np.zeros_like(student)
    step[index] = 1e-6
    up, down = (_reference(student + s * step, q, mask, 0.3) for s in (1, -1))
    numeric[index] = (up - down) / 2e-6
  error = np.linalg.norm(gradients[0] - numeric)
  assert error < 1e-5 * np.linalg.norm(numeric)
  np.testing.assert_array_equal(gradients[0][~mask], 0.0)  # patches that were seen
  np.testing.assert_array_equal(gradients[1], 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_patch_loss_is_finite_where_nothing_is_hidden_and_where_scores_saturate(dtype):
  student, q, mask = _example()
  student = jnp.asarray(1e4 * student, dtype)
  one_hot = jnp.eye(4)[np.argmin(q, axis=-1)]
  for hidden in (jnp.zeros_like(mask), jnp.asarray(mask)):
    value, gradient = jax.value_and_grad(
      lambda s, h=hidden: losses.masked_patch_entropy(s, one_hot, h, temperature=0.1)
    )(student)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert np.isfinite(gradient.astype(jnp.float32)).all()
    assert (value > 0) == bool(hidden.any())


def test_shapes_that_do_not_fit_are_refused():
  s, q, mask = _example()
  for wrong in ((s[:, :1], q, mask), (s, q[..., :3], mask), (s, q, mask[..., :2])):
    with pytest.raises(ValueError, match="student, teacher and mask"):
      losses.masked_patch_entropy(*map(jnp.asarray, wrong), temperature=0.1)


@functools.cache
def _start(prototypes, **changes):
  """(config, method, variables at the start) of a net without drop path."""
  c = tiny.config("ibot", prototypes, **changes)
  method = ibot.make(c)
  return c, method, jax.jit(method.init)(jax.random.key(0))


def _some_views(c):
  return jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape), tiny.abstract_views(c)
  )


def test_teacher_sees_every_patch_and_the_student_learns_a_mask_token():
  c, method, variables = _start("mixture")
  trained, frozen = train_step.split(variables, method.learns_prototypes)
  loss = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  ((one, a), grads), ((two, b), _) = (
    loss(trained, frozen, _some_views(c), jax.random.key(seed), jnp.int32(0)) for seed in (2, 3)
  )
  assert abs(one - two) > 1e-4 and a.metrics["masked"] > 0  # other masks
  chex.assert_trees_all_equal(a.stats, b.stats)
  assert a.stats["prototypes"]["patch"].shape == (16, 2, 4, 16)
  assert np.abs(grads["encoder"]["backbone"]["mask_token"]).max() > 0
  np.testing.assert_array_equal(variables.encoder["backbone"]["mask_token"], 0.0)


_UP_TO_THREE = (
  ("method__mask_shape", "rand"),
  ("method__mask_ratios", (0.0, 0.5)),
  ("method__mask_spreads", (0.0, 0.25)),
)


@pytest.mark.parametrize("kind", ["learned", "mixture"])
def test_value_gradient_and_centre_are_those_of_scoring_every_patch(kind):
  """The dense form: all patches pass the student's head, all are scored, the loss masks them."""
  c, method, variables = _start(kind, mixture__center_features=True, **dict(_UP_TO_THREE))
  center = {"prototypes": jnp.linspace(0.0, 0.1, 32), "patch": jnp.linspace(0.1, -0.1, 32)}
  teacher = jax.tree.map(lambda x: 1.2 * x + 0.01, variables.teacher)
  state = variables.prototypes
  if kind == "mixture":
    mean = jnp.linspace(-0.2, 0.2, 16)
    state = {name: one._replace(feature_mean=mean) for name, one in state.items()}
  carry = {**variables.carry, "center": center}
  variables = variables.replace(prototypes=state, teacher=teacher, carry=carry)
  trained, frozen = train_step.split(variables, method.learns_prototypes)
  net, one = encoders.build(c, mask_token=True), prototype_set.build(c)
  views, key = _some_views(c), jax.random.key(5)
  draw = masking.make(c.method.mask_ratios, c.method.mask_spreads, c.method.mask_shape, (2, 2))
  mask = draw(jax.random.split(key)[1], 16, 2)
  assert set(np.unique(mask.sum(axis=-1))) >= {0, 1, 2}

  def dense(trained):
    def scores(encoder, state, views):
      out, _ = encoders.embed(net, encoder, {}, views, train=True, patches=True)
      z = {"prototypes": out.z, "patch": out.patches}
      return {k: one.align(state[k], z[k]) @ one.rows(state[k]).T for k in z}

    student = scores(trained["encoder"], trained.get("prototypes", state), {**views, "mask": mask})
    of_teacher = frozen.teacher.get("prototypes", state)
    teacher = scores(frozen.teacher["encoder"], of_teacher, {"global": views["global"]})
    q = {k: assignment.sharpen(teacher[k], center[k], 0.04) for k in teacher}
    by_class = losses.cross_view_entropy(student["prototypes"], q["prototypes"], temperature=0.1)
    by_patch = losses.masked_patch_entropy(student["patch"], q["patch"], mask, temperature=0.1)
    new = {k: assignment.center_update(center[k], teacher[k]) for k in center}
    return by_class + by_patch, (
      by_patch,
      losses.masked_mean(losses.entropy(q["patch"]), mask),
      new,
    )

  @jax.jit
  def sparse(trained):
    (value, out), grads = jax.value_and_grad(method.loss, has_aux=True)(
      trained, frozen, views, key, jnp.int32(0)
    )
    new = method.update(variables, out.stats, jnp.int32(0)).carry["center"]
    return (value, (out.metrics["patch_loss"], out.metrics["patch_target_entropy"], new)), grads

  expected = jax.jit(jax.value_and_grad(dense, has_aux=True))(trained)
  (values, grads), (values_before, grads_before) = sparse(trained), expected
  chex.assert_trees_all_close(values, values_before, rtol=1e-5, atol=1e-6)
  for new, old in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_before), strict=True):
    assert np.linalg.norm(new - old) <= 1e-5 * np.linalg.norm(old)


def test_hidden_patches_alone_are_scored():
  c, method, variables = _start("learned")
  net = student_teacher.build_with_prototypes(c, patches=True, shared=False)
  trained, frozen = train_step.split(variables, method.learns_prototypes)
  views = {**tiny.abstract_views(c), "hidden": jax.ShapeDtypeStruct((16, 2, 3), jnp.int32)}
  scores = jax.eval_shape(net.scores, trained, frozen, views, jax.random.key(0))
  assert scores.student_patches.rows.shape == (16, 2, 3, 16)
  assert scores.teacher_patches.rows.shape == (16, 2, 3, 16)
  assert scores.teacher_patch_mean.shape == (32,)
  traced = jax.make_jaxpr(method.loss)(trained, frozen, _some_views(c), jax.random.key(0), 0)
  assert "16,2,2,32]" in str(traced) and "16,2,4,32]" not in str(traced)  # at most half of four


def test_a_batch_without_a_hidden_patch_has_no_patch_loss():
  _, _, variables = _start("learned")
  never = {"method__mask_ratios": (0.0,), "method__mask_spreads": (0.0,)}
  c = tiny.config("ibot", "learned", method__targets="sinkhorn", **never)
  method = ibot.make(c)
  trained, frozen = train_step.split(variables, method.learns_prototypes)
  value, out = jax.jit(method.loss)(trained, frozen, _some_views(c), jax.random.key(0), 0)
  assert np.isfinite(value) and all(np.isfinite(x) for x in out.metrics.values())
  assert out.metrics["patch_loss"] == out.metrics["patch_mean_entropy"] == 0.0


@pytest.mark.parametrize("shared", [False, True])
def test_codes_of_an_image_in_every_set(shared):
  c, method, variables = _start("mixture", method__shared_head=shared)
  images = jax.random.normal(jax.random.key(4), (3, 16, 16, 3))
  names = {"prototypes"} if shared else {"prototypes", "patch"}
  codes, z = jax.jit(lambda v: (method.codes(v, images), method.embeddings(v, images)))(variables)
  rows = method.prototype_matrices(variables)
  assert set(codes) == set(z) == set(rows) == names
  for name in names:
    assert z[name].shape == (3, 16) and rows[name].shape == (32, 16)
    np.testing.assert_allclose(codes[name], z[name] @ rows[name].T, atol=1e-5)
  if shared:
    assert set(variables.prototypes._fields) >= {"means"}
  else:
    assert np.abs(rows["prototypes"] - rows["patch"]).max() > 0.1
    assert np.linalg.norm(z["patch"], axis=-1).max() < 1.0  # a mean of unit rows


@pytest.mark.parametrize("shared", [False, True])
def test_mixtures_move_on_the_teacher_s_tokens_in_either_order(shared):
  """After one step the mixtures are the same in both orders; only the first loss differs."""
  after, before = (
    tiny.run_steps(
      tiny.config("ibot", "mixture", method__em_order=order, method__shared_head=shared),
      1,
      jax.devices()[:1],
    )
    for order in ("after_step", "before_loss")
  )
  chex.assert_trees_all_close(after[1].prototypes, before[1].prototypes, atol=1e-6)
  assert abs(after[2][0]["train/loss"] - before[2][0]["train/loss"]) > 1e-5


def test_one_mixture_for_all_tokens_is_fed_without_a_gather():
  c = tiny.config("ibot", "mixture", method__shared_head=True)
  text = programs.Program(c).lower().compile().as_text()
  assert "all-reduce" in text
  assert not any(op in text for op in ("all-gather", "all-to-all", "collective-permute"))


def test_snapshot_measures_both_sets_and_draws_the_class_set():
  program = programs.Program(tiny.config("ibot", "mixture"))
  state, bank = program.init(0), sources.build("digits", split="test")
  twins = state.prototypes["patch"].means.at[8:].set(state.prototypes["patch"].means[0])
  sets = {**state.prototypes, "patch": state.prototypes["patch"]._replace(means=twins)}
  state = state.replace(prototypes=sets)
  view = evaluation.Snapshot(program, bank=bank)
  measures = view.monitor(state)
  assert measures["collapse/unique_0.025"] == 1.0
  assert measures["collapse/patch_unique_0.025"] == 8 / 32
  nearest = view.final(state)[1]["nearest"]
  assert nearest.shape == (32,) and nearest.min() > 0.025


def test_exported_encoder_loads_again_and_others_have_no_mask_token(tmp_path):
  _, _, variables = _start("mixture")
  params = jax.device_get(variables.teacher["encoder"])
  export.write(tmp_path, {"params": params, "batch_stats": {}}, {"step": 0})
  chex.assert_trees_all_equal(export.load(tmp_path, params), params)
  other = programs.Program(tiny.config("dino")).abstract.encoder
  assert "mask_token" not in other["backbone"]
  with pytest.raises(errors.UserError, match="mask_token has shape .* there and none here"):
    export.load(tmp_path, other)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"head__norm": "batch"}, "masked patches need a transformer"),
    ({"model__name": "resnet18"}, "masked patches need a transformer"),
    ({"method__mask_shape": "blocks"}, "method.mask_shape='blocks'"),
    ({"method__mask_ratios": (0.1, 0.3)}, "method.mask_ratios"),
    ({"method__prototypes": "none"}, "method.prototypes='none' is unknown"),
  ],
)
def test_options_that_make_no_sense_are_one_line(changes, words):
  if "method__mask_ratios" in changes:
    changes = {**changes, "method__mask_spreads": (0.2, 0.2)}
  with pytest.raises(errors.UserError, match=words) as caught:
    ibot.make(tiny.config("ibot", **changes))
  assert "\n" not in str(caught.value)


def test_unknown_targets_are_one_line():
  c = tiny.config("ibot", method__targets="softmax")
  with pytest.raises(errors.UserError, match="method.targets='softmax' is unknown") as caught:
    programs.Program(c).lower()
  assert "\n" not in str(caught.value)
