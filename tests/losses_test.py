"""Losses against published golden values, NumPy in float64 and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import losses


def _sin(rows, columns, a=0.7, b=1.3):
  return np.sin(a * np.arange(rows)[:, None] + b * np.arange(columns)[None, :])


def _cos(rows, columns, a=0.4, b=0.9):
  return np.cos(a * np.arange(rows)[:, None] + b * np.arange(columns)[None, :])


def _views(crop_major, images):
  """[V B, ...], crop after crop, as the published code lays it out -> [B, V, ...]."""
  return crop_major.reshape(-1, images, *crop_major.shape[1:]).swapaxes(0, 1)


def _softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def _pairs(num_views, num_targets):
  return [(v, t) for v in range(num_views) for t in range(num_targets) if v != t]


def _reference_entropy_of_views(student, q, temperature):
  terms = [
    -(q[:, t] * np.log(_softmax(student[:, v] / temperature))).sum(-1).mean()
    for v, t in _pairs(student.shape[1], q.shape[1])
  ]
  return np.mean(terms)


def _reference_consistency(student, teacher):
  p, q = _softmax(student), _softmax(teacher)
  eps = np.finfo(np.float64).eps
  terms = [
    -np.log(np.clip((p[:, v] * q[:, t]).sum(-1), eps, 1 - eps)).mean()
    for v, t in _pairs(student.shape[1], teacher.shape[1])
  ]
  return np.mean(terms)


def _reference_carp_entropy(student, teacher):
  n = student.shape[-1]
  rows = [_softmax(x).reshape(-1, *x.shape[2:]) for x in (student, teacher)]
  mean = np.concatenate(rows).mean(axis=0)
  return np.mean(np.log(n) + (mean * np.log(mean)).sum(-1))


def _random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def test_dino_golden_values_with_the_centre_of_the_step_before():
  student, teacher = _views(_sin(6, 5), 2), _views(_cos(4, 5), 2)
  center = np.zeros(5)
  for expected in (6.408802805645531, 6.409653500540364):
    q = _softmax((teacher - center) / 0.04)
    with jax.enable_x64(True):
      value = losses.cross_view_entropy(jnp.asarray(student), jnp.asarray(q), temperature=0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    center = 0.9 * center + 0.1 * teacher.reshape(-1, 5).mean(axis=0)
    if expected < 6.409:
      np.testing.assert_allclose(
        center,
        [
          0.07450313644566808,
          0.006385454949996731,
          -0.06656461154794563,
          -0.0891399070945319,
          -0.04425589809341827,
        ],
        rtol=1e-12,
      )


def test_carp_golden_values():
  with jax.enable_x64(True):
    student = jnp.asarray(_views(_sin(6, 6), 2).reshape(2, 3, 2, 3))
    teacher = jnp.asarray(_views(_cos(4, 6), 2).reshape(2, 2, 2, 3))
    agree, spread = (f(student, teacher) for f in (losses.carp_consistency, losses.carp_entropy))
  np.testing.assert_allclose(agree, 1.0344875525554293, rtol=1e-12)
  np.testing.assert_allclose(spread, 0.06871696147656592, rtol=1e-12)


@pytest.mark.parametrize("num_targets", [1, 2, 4])
def test_losses_match_numpy_in_float64(num_targets):
  student, teacher = 3 * _random(0, 3, 4, 12), 3 * _random(1, 3, num_targets, 12)
  q = _softmax(teacher)
  blocks = student.reshape(3, 4, 3, 4), teacher.reshape(3, num_targets, 3, 4)
  with jax.enable_x64(True):
    value = losses.cross_view_entropy(jnp.asarray(student), jnp.asarray(q), temperature=0.2)
    pair = [jnp.asarray(x) for x in blocks]
    agree, spread = losses.carp_consistency(*pair), losses.carp_entropy(*pair)
  np.testing.assert_allclose(value, _reference_entropy_of_views(student, q, 0.2), rtol=1e-12)
  np.testing.assert_allclose(agree, _reference_consistency(*blocks), rtol=1e-12)
  np.testing.assert_allclose(spread, _reference_carp_entropy(*blocks), rtol=1e-12)


def _entropy_of_views(student, teacher):
  q = jax.nn.softmax(teacher)
  return losses.cross_view_entropy(student, q, temperature=0.3)


def _in_blocks(function):
  return lambda student, teacher: function(
    student.reshape(*student.shape[:2], 2, 3), teacher.reshape(*teacher.shape[:2], 2, 3)
  )


every_loss = pytest.mark.parametrize(
  "loss",
  [_entropy_of_views, _in_blocks(losses.carp_consistency), _in_blocks(losses.carp_entropy)],
  ids=["cross_view_entropy", "carp_consistency", "carp_entropy"],
)


@pytest.mark.parametrize(
  ("loss", "reference"),
  [
    (_entropy_of_views, lambda s, t: _reference_entropy_of_views(s, _softmax(t), 0.3)),
    (_in_blocks(losses.carp_consistency), _in_blocks(_reference_consistency)),
    (_in_blocks(losses.carp_entropy), _in_blocks(_reference_carp_entropy)),
  ],
  ids=["cross_view_entropy", "carp_consistency", "carp_entropy"],
)
def test_gradient_matches_finite_differences_of_numpy(loss, reference):
  student, teacher = _random(2, 2, 3, 6), _random(3, 2, 2, 6)
  with jax.enable_x64(True):
    gradient = jax.jit(jax.grad(loss))(student, teacher)
  numeric = np.zeros_like(student)
  for index in np.ndindex(*student.shape):
    step = np.zeros_like(student)
    step[index] = 1e-5
    up, down = (reference(student + s, teacher) for s in (step, -step))
    numeric[index] = (up - down) / 2e-5
  assert np.linalg.norm(numeric) > 1e-2
  assert np.linalg.norm(np.asarray(gradient) - numeric) < 1e-7 * np.linalg.norm(numeric)


@every_loss
def test_teacher_gets_no_gradient(loss):
  student, teacher = jnp.asarray(_random(2, 2, 3, 6)), jnp.asarray(_random(3, 2, 2, 6))
  np.testing.assert_array_equal(jax.grad(loss, argnums=1)(student, teacher), 0.0)


@every_loss
def test_order_of_global_views_does_not_matter(loss):
  student, teacher = jnp.asarray(_random(2, 2, 3, 6)), jnp.asarray(_random(3, 2, 2, 6))
  swapped = loss(student[:, jnp.array([1, 0, 2])], teacher[:, ::-1])
  np.testing.assert_allclose(loss(student, teacher), swapped, rtol=1e-6, atol=2e-7)


@every_loss
def test_bfloat16_scores_are_computed_in_float32(loss):
  student, teacher = (jnp.asarray(_random(s, 2, 3, 6), jnp.bfloat16) for s in (2, 3))
  value = loss(student, teacher)
  assert value.dtype == jnp.float32
  wide = loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
  np.testing.assert_allclose(value, wide, rtol=5e-3)


def test_a_view_is_not_compared_with_its_own_crop():
  """Views of student and teacher that agree with each other's crop only."""
  one_hot = jnp.eye(2)[None]  # image 0: view 0 says 0, view 1 says 1
  student = 20.0 * one_hot
  same = losses.cross_view_entropy(student, one_hot, temperature=1.0)
  other = losses.cross_view_entropy(student[:, ::-1], one_hot, temperature=1.0)
  np.testing.assert_allclose([same, other], [20.0, 0.0], atol=1e-6)


def test_carp_consistency_of_opposite_views_is_the_clip_and_its_gradient_finite():
  student = jnp.array([[[[200.0, 0.0]], [[0.0, 200.0]]]])
  value, gradient = jax.value_and_grad(losses.carp_consistency)(student, student)
  np.testing.assert_allclose(value, -np.log(np.finfo(np.float32).eps), rtol=1e-6)
  assert np.isfinite(gradient).all()


def test_carp_entropy_is_zero_for_even_use_and_ln_n_for_one_prototype():
  even = 500.0 * jnp.eye(4).reshape(2, 2, 1, 4)
  one = jnp.zeros((2, 2, 1, 4)).at[..., 0].set(500.0)
  np.testing.assert_allclose(losses.carp_entropy(even, even), 0.0, atol=1e-6)
  value, gradient = jax.value_and_grad(losses.carp_entropy)(one, one)
  np.testing.assert_allclose(value, np.log(4), rtol=1e-6)
  assert np.isfinite(gradient).all()


def test_cross_entropy_minus_target_entropy_is_the_divergence():
  student, q = _random(4, 3, 4, 7), _softmax(_random(5, 3, 2, 7))
  value = losses.cross_view_entropy(jnp.asarray(student), jnp.asarray(q), temperature=0.5)
  p = _softmax(student / 0.5)
  expected = np.mean(
    [(q[:, t] * np.log(q[:, t] / p[:, v])).sum(-1).mean() for v, t in _pairs(4, 2)]
  )
  np.testing.assert_allclose(value - losses.entropy(jnp.asarray(q)).mean(), expected, rtol=1e-5)


def test_entropy_of_uniform_and_of_certain_rows():
  rows = jnp.stack([jnp.full(8, 1 / 8), jnp.eye(8)[0]])
  np.testing.assert_allclose(losses.entropy(rows), [np.log(8), 0.0], atol=1e-6)
  assert np.isfinite(jax.grad(lambda x: losses.entropy(x).sum())(rows)).all()


@pytest.mark.parametrize(
  ("student", "teacher"),
  [((2, 3, 5), (2, 2, 6)), ((2, 3, 5), (3, 2, 5)), ((2, 2, 5), (2, 3, 5)), ((2, 1, 5), (2, 1, 5))],
)
def test_shapes_that_do_not_fit_are_refused(student, teacher):
  with pytest.raises(ValueError, match="student"):
    losses.cross_view_entropy(jnp.ones(student), jnp.ones(teacher), temperature=1.0)


class _Foreign:
  """An array as other libraries have it: it speaks DLPack and nothing else."""

  def __init__(self, x):
    x = np.ascontiguousarray(x)
    self.__dlpack__, self.__dlpack_device__ = x.__dlpack__, x.__dlpack_device__


@pytest.mark.parametrize("convert", [np.asarray, _Foreign], ids=["numpy", "dlpack"])
def test_arrays_of_other_libraries_give_the_values_of_jax(convert):
  scores, q = (_random(i, 6, 2, 5).astype(np.float32) for i in (0, 1))
  blocks = scores.reshape(6, 2, 1, 5)
  patches, mask = scores.reshape(3, 2, 2, 5), _random(2, 3, 2, 2) > 0
  rows, phi, clusters = scores[:, 0], np.ones(6, np.float32), np.arange(6, dtype=np.int32)
  for loss, *arrays in (
    (losses.l2_normalize, rows),
    (losses.entropy, np.abs(q)),
    (losses.koleo, rows),
    (lambda *x: losses.cross_view_entropy(*x, temperature=0.1), scores, np.abs(q)),
    (losses.carp_consistency, blocks, -blocks),
    (losses.carp_entropy, blocks, -blocks),
    (lambda *x: losses.masked_patch_entropy(*x, temperature=0.1), patches, patches, mask),
    (lambda *x: losses.info_nce(*x, temperature=0.2), rows, -rows, rows),
    (losses.proto_nce, rows, rows, phi, clusters),
  ):
    expected = loss(*map(jnp.asarray, arrays))
    assert expected.dtype == jnp.float32 and np.isfinite(expected).all()
    # Not to the bit: memory that is taken over as it lies may be aligned otherwise.
    np.testing.assert_allclose(loss(*map(convert, arrays)), expected, rtol=1e-5, atol=1e-6)
