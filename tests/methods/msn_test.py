"""MSN: golden values of the published code, what student and teacher see, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from protojax import errors, losses
from protojax.data import masking
from protojax.methods import msn
from protojax.methods.networks import student_teacher
from protojax.models import vit
from protojax.prototypes import soft
from protojax.training import train_step

_HEAD = {"head__norm": "batch"}


def _unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def _sin(rows, columns, a=0.7, b=1.3):
  return np.sin(a * np.arange(rows)[:, None] + b * np.arange(columns)[None, :])


@pytest.mark.parametrize(
  ("kind", "golden"),
  [
    ("sharpened", 1.681466654262005),
    ("sinkhorn", 4.3488250941899995),
  ],
)
def test_golden_values_of_the_published_code(kind, golden):
  with jax.enable_x64(True):
    rows = _unit(_sin(4, 3, 1.1, 0.5))
    # View after view of two images -> [B, V, K].
    anchors = jnp.asarray((_unit(_sin(4, 3)) @ rows.T).reshape(2, 2, 4).swapaxes(0, 1))
    seen = np.cos(0.4 * np.arange(2)[:, None] + 0.9 * np.arange(3)[None, :])
    options = tiny.config("msn", "learned", method__targets=kind).method
    q = msn.targets(tiny.scores(jnp.asarray(_unit(seen) @ rows.T)[:, None]), options)
    beside, prior = msn.terms(tiny.scores(anchors), q, 0.1)
    cross_entropy = beside.cross_entropy.mean()
    mean_entropy = losses.entropy(jax.nn.softmax(anchors / 0.1)).mean()
  # Sinkhorn is float32.
  np.testing.assert_allclose(cross_entropy, golden, rtol=1e-12 if kind == "sharpened" else 1e-5)
  np.testing.assert_allclose(prior, 0.16535728323248144, rtol=1e-12)
  np.testing.assert_allclose(mean_entropy, 0.45998756914061817, rtol=1e-12)


def _reference(scores, q, temperature):
  """Cross entropy and prior of scores [B, V, K] against q [B, K]."""
  log_p = scipy.special.log_softmax(scores / temperature, axis=-1)
  mean = np.exp(log_p).mean(axis=(0, 1))
  cross_entropy = np.mean([-(q * log_p[:, v]).sum(-1) for v in range(scores.shape[1])])
  return cross_entropy, np.log(len(mean)) + (mean * np.log(mean)).sum()


@pytest.mark.parametrize("which", [0, 1], ids=["cross_entropy", "prior"])
def test_terms_match_numpy_in_value_and_gradient(which):
  rng = np.random.default_rng(0)
  scores, q = 0.3 * rng.normal(size=(4, 3, 5)), rng.dirichlet(np.ones(5), 4)
  with jax.enable_x64(True):
    targets = soft.Assignments(tiny.scores(jnp.log(q)[:, None]), log_p=jnp.log(q)[:, None])

    def term(x):
      beside, prior = msn.terms(tiny.scores(x), targets, 0.1)
      return (beside.cross_entropy.mean(), prior)[which]

    value, gradient = jax.jit(jax.value_and_grad(term))(jnp.asarray(scores))
  np.testing.assert_allclose(value, _reference(scores, q, 0.1)[which], rtol=1e-12)
  numeric = np.zeros_like(scores)
  for index in np.ndindex(*scores.shape):
    step = np.zeros_like(scores)
    step[index] = 1e-6
    up, down = (_reference(scores + s, q, 0.1)[which] for s in (step, -step))
    numeric[index] = (up - down) / 2e-6
  assert np.linalg.norm(numeric) > 0.1
  assert np.linalg.norm(np.asarray(gradient) - numeric) < 1e-7 * np.linalg.norm(numeric)


def _seen(config, monkeypatch):
  """(method, the views that it gives its student and teacher, once its loss has run)."""
  views = {}
  build = student_teacher.build_with_prototypes

  def fake_build(config, **options):
    assert options == {"average": False}
    networks = build(config, **options)

    def scores(trained, frozen, given, key):
      views.update(given)
      return networks.scores(trained, frozen, given, key)

    return networks._replace(scores=scores)

  monkeypatch.setattr(student_teacher, "build_with_prototypes", fake_build)
  return msn.make(config), views


def test_student_sees_part_of_one_view_and_the_teacher_all_of_the_other(monkeypatch):
  c = tiny.config(
    "msn",
    "learned",
    **_HEAD,
    model__patch_size=4,
    method__drop_patches=0.3,
    method__prior_weight=0.5,
  )
  method, seen = _seen(c, monkeypatch)
  variables = jax.jit(method.init)(jax.random.key(0))
  assert set(variables.teacher) == {"encoder"}
  trained, frozen = train_step.split(variables, True)
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape), tiny.abstract_views(c)
  )
  (value, out), grads = jax.value_and_grad(method.loss, has_aux=True)(
    trained, frozen, views, jax.random.key(2), jnp.int32(0)
  )
  np.testing.assert_array_equal(seen["global"], views["global"][:, :1])
  np.testing.assert_array_equal(seen["target"], views["global"][:, 1:])
  assert seen["keep"].shape == (16, 1, 11)  # floor(.7 x 16) stay
  np.testing.assert_allclose(
    value, out.metrics["cross_entropy"] + 0.5 * out.metrics["prior"], rtol=1e-6
  )
  assert np.abs(grads["prototypes"]["v"]).max() > 0


def test_kept_patches_differ_by_view_and_come_from_all():
  keep = np.asarray(masking.keep(jax.random.key(0), 50, 2, dropped=0.5, num_patches=9))
  assert keep.shape == (50, 2, 4) and keep.dtype == np.int32
  assert all(len(set(row)) == 4 for row in keep.reshape(-1, 4))
  np.testing.assert_array_equal(np.unique(keep), np.arange(9))
  assert len({tuple(sorted(row)) for row in keep.reshape(-1, 4)}) > 30
  again = masking.keep(jax.random.key(0), 3, 2, dropped=0.5, num_patches=9)
  np.testing.assert_array_equal(again, keep[:3])  # whatever the batch


@pytest.mark.parametrize(
  ("dropped", "patches", "kept"), [(0.15, 196, 166), (0.3, 10, 7), (0.95, 10, 1), (0.0, 16, 16)]
)
def test_as_many_patches_stay_as_in_the_published_code(dropped, patches, kept):
  keep = masking.keep(jax.random.key(0), 1, 1, dropped=dropped, num_patches=patches)
  assert keep.shape == (1, 1, kept)


def test_patches_left_out_have_no_influence_and_order_has_none():
  net = vit.make("vit_tiny", width=24, depth=2, num_heads=2, patch_size=4, image_size=16)
  images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
  params = jax.jit(net.init)(jax.random.key(1), images)
  keep = jnp.asarray([[0, 5, 7, 10], [1, 2, 3, 4], [15, 0, 8, 9]])
  apply = jax.jit(lambda x, k: net.apply(params, x, keep=k, patches=True))
  cls, tokens = apply(images, keep)
  assert tokens.shape == (3, 4, 24)
  stays = np.zeros((3, 16), bool)
  np.put_along_axis(stays, np.asarray(keep), True, axis=1)
  stays = stays.reshape(3, 4, 1, 4, 1, 1)
  blocks = images.reshape(3, 4, 4, 4, 4, 3)
  other = jnp.where(stays, blocks, 50.0).reshape(images.shape)
  np.testing.assert_allclose(apply(other, keep)[0], cls, atol=1e-6)
  flipped_cls, flipped = apply(images, keep[:, ::-1])
  np.testing.assert_allclose(flipped_cls, cls, atol=1e-5)
  np.testing.assert_allclose(flipped, tokens[:, ::-1], atol=1e-5)
  every = jnp.broadcast_to(jnp.arange(16)[None, :], (3, 16))
  np.testing.assert_allclose(apply(images, every)[0], net.apply(params, images), atol=1e-5)
  assert np.abs(apply(images, every)[0] - cls).max() > 1e-3


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"method__targets": "center"}, "method.targets='center' is unknown: choose sinkhorn or"),
    ({"method__drop_patches": 1.0}, "method.drop_patches=1.0 of model.name='vit_small': choose"),
    ({"model__name": "resnet18"}, "of model.name='resnet18': choose .* a transformer"),
    ({"method__sharpening": 0.0}, "method.sharpening=0.0 must be above 0"),
    ({"head__l2": False}, "head.l2=False: msn compares directions; set config.head.l2=True"),
  ],
)
def test_bad_settings_are_one_line(changes, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    msn.make(tiny.config("msn", "learned", **changes))
  assert "\n" not in str(caught.value)
