"""CARP's loss over its partitions against NumPy, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from protojax import errors
from protojax.methods import carp
from protojax.methods.networks import student_teacher
from protojax.prototypes import assignment
from protojax.training import train_step

_HEAD = {"head__l2": False, "head__norm": "batch"}


def _config(**changes):
  return tiny.config("carp", "learned", **{**_HEAD, "method__partition_size": 8, **changes})


def _reference(student, teacher, order, size):
  """Blocks, pairs of views and means one after the other: student [B, V, K], teacher [B, 2, K]."""
  agree, spread = [], []
  for block in np.split(order, len(order) // size):
    p = scipy.special.softmax(student[:, :, block], axis=-1)
    q = scipy.special.softmax(teacher[:, :, block], axis=-1)
    for v in range(p.shape[1]):
      for t in range(2):
        if v != t:
          agree.append(-np.log((p[:, v] * q[:, t]).sum(-1)).mean())
    mean = np.concatenate([p, q], axis=1).mean(axis=(0, 1))
    spread.append(np.log(size) + (mean * np.log(mean)).sum())
  return np.mean(agree), np.mean(spread)


def test_loss_is_that_of_the_blocks_its_key_draws():
  c = _config(method__train_prototype_norm=True)
  method, networks = carp.make(c), student_teacher.build_with_prototypes(c)
  variables = jax.jit(method.init)(jax.random.key(0))
  # Long prototypes, or every assignment would be nearly uniform.
  sharp = {**variables.prototypes, "g": jnp.full((32, 1), 30.0)}
  teacher = {**variables.teacher, "prototypes": sharp}
  variables = variables.replace(prototypes=sharp, teacher=teacher)
  trained, frozen = train_step.split(variables, True)
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape), tiny.abstract_views(c)
  )
  loss, values = jax.jit(method.loss), []
  for seed in (2, 3):
    key = jax.random.key(seed)
    value, out = loss(trained, frozen, views, key, jnp.int32(0))
    net_key, order_key = jax.random.split(key)
    scores = jax.jit(networks.scores)(trained, frozen, views, net_key)
    student, teacher = (np.asarray(x.dense(), np.float64) for x in (scores.student, scores.teacher))
    order = np.asarray(assignment.random_partition(order_key, 32))
    agree, spread = _reference(student, teacher, order, 8)
    assert agree > 0.1 and spread > 1e-3
    np.testing.assert_allclose(value, agree + spread, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["consistency"], agree, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["entropy_gap"], spread, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["ln_k"], np.log(8), rtol=1e-6)
    values.append(float(value))
  assert values[0] != values[1]  # other blocks


def test_embeddings_of_length_one_are_said_to_learn_nothing(caplog):
  carp.make(_config())
  assert not caplog.text
  carp.make(_config(head__l2=True))
  assert "assignments stay uniform: set config.head.l2=False" in caplog.text


@pytest.mark.parametrize("size", [1, 5, 64])
def test_blocks_that_do_not_fit_are_refused_in_one_line(size):
  words = f"method.partition_size={size} does not cut"
  with pytest.raises(errors.UserError, match=words) as caught:
    carp.make(_config(method__partition_size=size))
  assert "\n" not in str(caught.value)
