"""Assignments by blocks of prototypes: the numbers of the matrix, in the memory of a block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import errors
from protojax.methods import self_classifier
from protojax.prototypes import dictionary, mixture, scoring, soft, streaming
from protojax.training import sharding

_K, _DIM = 48, 8


def _random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _losses(rows, prototypes, teacher, teacher_prototypes, bias, *, block):
  """Everything that a loss may ask for, as numbers by name."""
  counted = jnp.arange(teacher[..., 0].size).reshape(teacher.shape[:-1]) % 3 > 0
  student = soft.Scores(rows, prototypes, 0.1 * bias, block=block).over(0.3)
  scores = soft.Scores(teacher, teacher_prototypes, block=block).over(0.2)
  p = soft.softmax(student)
  out = {"log_mean": soft.log_mean(p), "mean": soft.mean(p) ** 2, "linear": student.mean()}
  kinds = {
    "centre": soft.targets(scores, bias, kind="center"),
    "sinkhorn": soft.targets(scores, bias, kind="sinkhorn"),
    "some": soft.targets(scores, bias, kind="sinkhorn", counted=counted),
    "normalized": soft.balanced(scores, num_steps=2, normalized=True),
  }
  for name, q in kinds.items():
    first = soft.softmax(soft.Scores(rows[:, :2], prototypes, 0.1 * bias, block=block).over(0.3))
    for kind, found in (
      ("views", soft.compare_views(p, q)),
      ("rows", soft.compare_rows(first, q, counted)),
      ("first", soft.compare_views(p, soft.first(q))),
    ):
      out |= {f"{name}/{kind}/{k}": v for k, v in found._asdict().items()}
    out[f"{name}/mean"] = soft.mean(q)
  agreement = soft.agreement(p)
  agreement = agreement._replace(log_mean=agreement.log_mean / _K)
  readings = self_classifier.compare(
    soft.Scores(rows, prototypes, block=block), row_temp=0.3, column_temp=0.5, eps=1e-3
  )
  codes = jnp.where(prototypes > 0, 1, -1).T.astype(jnp.int8)
  falcon = dictionary.compare(codes, rows, scale=5.0, block=block)
  for kind, found in (("agreement", agreement), ("readings", readings), ("codes", falcon)):
    out |= {f"{kind}/{k}": v for k, v in found._asdict().items()}
  out["log_partition"] = soft.log_partition(student)
  return out


def _values_and_gradients(block, mesh=None):
  arguments = (
    0.4 * _random(16, 3, _DIM),
    _random(_K, _DIM, seed=1),
    0.4 * _random(16, 2, _DIM, seed=2),
    _random(_K, _DIM, seed=3),
    _random(_K, seed=4),
  )

  def total(*arguments):
    out = _losses(*arguments, block=block)
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in out.values()), out

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True))
  if mesh is None:
    return jax.device_get(run(*arguments))
  with jax.set_mesh(mesh):
    return jax.device_get(run(*arguments))


def _close(actual, expected):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mesh", [None, (8, 1), (4, 2), (2, 4), (1, 8)])
def test_values_and_gradients_are_those_of_all_prototypes_at_once(mesh):
  """On every mesh; the gradient of a teacher is 0 but for what its mean may have."""
  placed = None if mesh is None else sharding.make_mesh(*mesh)
  _close(_values_and_gradients(3, placed), _values_and_gradients(0))


@pytest.mark.parametrize("mesh", [(1, 1), (8, 1), (2, 4)])
def test_the_best_prototype_by_blocks_is_that_of_all_at_once(mesh):
  """Of equal scores the first: here every prototype is there twice."""
  rows, prototypes = _random(16, 3, _DIM), jnp.tile(_random(_K // 2, _DIM, seed=1), (2, 1))
  scores = soft.Scores(rows, prototypes, _random(_K // 2, seed=2)[jnp.arange(_K) % (_K // 2)])
  with jax.set_mesh(sharding.make_mesh(*mesh, jax.devices()[: mesh[0] * mesh[1]])):
    found = jax.jit(lambda s: soft.best(dataclasses.replace(s, block=3)))(scores)
  np.testing.assert_array_equal(found, scores.dense().argmax(axis=-1))
  assert found.dtype == jnp.int32 and (found < _K // 2).all()


def test_codes_of_images_need_no_scores_over_all_prototypes(monkeypatch):
  rows, bias = _random(_K, _DIM), _random(_K, seed=1)

  class Method:
    scoring = staticmethod(
      lambda variables: {
        "a": scoring.Scoring(rows, bias=bias, scale=0.5),
        "b": scoring.Scoring(rows),
      }
    )
    embeddings = staticmethod(lambda variables, images: {"a": images, "b": -images})
    codes = staticmethod(
      lambda variables, images: {"a": 0.5 * images @ rows.T + bias[None], "b": -images @ rows.T}
    )

  images = _random(16, _DIM, seed=2)
  at_once = scoring.codes(Method, (), images)
  monkeypatch.setattr(streaming, "DENSE", 100)
  monkeypatch.setattr(Method, "codes", None)
  for name, by_blocks in scoring.codes(Method, (), images).items():
    np.testing.assert_array_equal(by_blocks, at_once[name])


_FORMS = {
  "balanced": ({"balanced": True, "center_features": True}, {}),
  "plain": ({}, {"normalize": False, "mass": "ema"}),
  "diagonal": ({}, {"covariance": "diagonal", "beta": 0.5}),
  "kappa": ({"balanced": True}, {"learn_kappa": True, "reseed": True}),
}


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_a_mixture_moves_by_blocks_as_all_at_once(form, mesh):
  more, options = _FORMS[form]

  def moved(block):
    options_now = mixture.Options(**options, block=block)
    em = mixture.online_em(_K, _DIM, horizon_steps=5.0, options=options_now, **more)
    state, update = em.init(jax.random.key(0)), jax.jit(em.update)
    for seed in range(3):
      state, aux = update(state, 0.3 + _random(32, _DIM, seed=seed))
    state = state._replace(key=None if state.key is None else jax.random.key_data(state.key))
    return jax.device_get((state, aux))

  dense = moved(0)
  if mesh is None:
    _close(moved(6), dense)
    return
  with jax.set_mesh(sharding.make_mesh(*mesh)):
    _close(moved(6), dense)


def test_blocks_are_as_all_at_once_where_no_sample_counts():
  rows, prototypes = _random(6, 2, 8), _random(16, 8, seed=1)

  def mean(block):
    scores = soft.Scores(rows, prototypes, block=block).over(0.2)
    return soft.mean(soft.balanced(scores, counted=jnp.zeros((6, 2), bool)))

  np.testing.assert_allclose(mean(4), mean(0), rtol=1e-5)
  np.testing.assert_allclose(mean(0).sum(), 1.0, rtol=1e-5)


def test_memory_does_not_grow_with_the_number_of_prototypes():
  """Without the prototypes and their gradient; all at once it would be 64 MiB and 512."""

  def temporary(num):
    def loss(rows, prototypes):
      p = soft.softmax(soft.Scores(rows, prototypes, block=256))
      q = soft.targets(soft.Scores(rows[:, :2], prototypes, block=256), 0.0, kind="sinkhorn")
      beside = soft.compare_views(p, q)
      return beside.cross_entropy.sum() + beside.entropy.sum() + beside.mean.sum()

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 4, 16), (num, 16)))
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = temporary(16_384), temporary(131_072)
  assert many < few + 6 * 4 * 131_072  # bias, totals, offsets of two steps of prototypes
  assert few < 8 * 4 * 1024 * 256


def test_blocks_are_chosen_by_memory_or_asked_for():
  assert streaming.block_size(None, 1024, 131_072) == 0  # 2^27 scores
  assert streaming.block_size(None, 2560, 65_536) == 128
  assert streaming.block_size(None, 2560, 1_000_000) == 200  # a divisor
  assert streaming.block_size(0, 2560, 1_000_000) == 0
  assert streaming.block_size(500, 10, 1_000_000) == 500
  with pytest.raises(
    errors.UserError, match="block=7 .method.block of a run. .* 48 .* divisor, 6 say"
  ):
    streaming.block_size(7, 10, 48)
  with jax.set_mesh(sharding.make_mesh(2, 4)):  # what a device has
    assert streaming.block_size(None, 1024, 131_072) == 0
    assert streaming.block_size(12, 10, 48) == 12
    with pytest.raises(errors.UserError, match="block=24 .* does not cut the 12 prototypes"):
      streaming.block_size(24, 10, 48)


def test_a_number_of_prototypes_that_cuts_into_slivers_is_said_once(caplog):
  for _ in range(2):
    assert streaming.block_size(None, 5120, 65_537) == 1  # a prime
  assert caplog.text.count("65537 prototypes of a device cut into equal blocks of 1 only") == 1
  streaming.block_size(None, 5120, 65_536)
  assert "65536" not in caplog.text
