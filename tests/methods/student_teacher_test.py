"""The moving average and whose prototypes score whom, by value."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax.methods.networks import student_teacher
from protojax.models import encoder as encoders
from protojax.training import train_step


def _other(tree, seed):
  """A tree like `tree` of random leaves."""
  leaves, treedef = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    treedef, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
  )


def _networks(prototypes, **changes):
  """(config, networks, variables) whose student and teacher differ in every leaf."""
  c = tiny.config("dino", prototypes, teacher__momentum=0.9, **changes)
  networks = student_teacher.build_with_prototypes(c)
  variables = jax.jit(networks.method.init)(jax.random.key(0))
  return c, networks, variables.replace(teacher=_other(variables.teacher, 1))


@pytest.mark.parametrize(
  ("step", "momentum", "changes"),
  [
    (0, 0.9, {}),
    (3, 0.95, {}),
    (2, 1.0 - 0.1 * (4 / 6), {"teacher__schedule": "linear"}),
    (3, 1.0 - 0.1 * (9 / 12), {"teacher__schedule": "linear", "optim__schedule_scale": 2.0}),
  ],
)
def test_teacher_keeps_a_cosine_of_its_momentum_over_the_run(step, momentum, changes):
  """Half way through a run of six steps, the momentum is half way to one."""
  _, networks, variables = _networks("learned", method__train_prototype_norm=True, **changes)
  stats = {"prototypes": (), "batch_stats": variables.carry["batch_stats"]}
  moved = jax.jit(networks.method.update)(variables, stats, jnp.int32(step))
  student = {"encoder": variables.encoder, "prototypes": variables.prototypes}
  assert {"v", "g"} <= set(student["prototypes"])
  expected = jax.tree.map(
    lambda old, new: momentum * old + (1.0 - momentum) * new, variables.teacher, student
  )
  chex.assert_trees_all_close(moved.teacher, expected, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal(moved.encoder, variables.encoder)


def test_each_side_is_scored_by_its_own_learned_prototypes():
  c, networks, variables = _networks("learned")
  trained, frozen = train_step.split(variables, True)
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(2), s.shape), tiny.abstract_views(c)
  )
  scores = jax.jit(networks.scores)(trained, frozen, views, jax.random.key(3))
  net = encoders.build(c)
  teacher_views = {"global": views["global"]}
  for params, v, seen, actual in (
    (variables.encoder, variables.prototypes["v"], views, scores.student.dense()),
    (
      variables.teacher["encoder"],
      variables.teacher["prototypes"]["v"],
      teacher_views,
      scores.teacher.dense(),
    ),
  ):
    out, _ = encoders.embed(net, params, {}, seen, train=True)
    rows = np.asarray(v, np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(actual, np.asarray(out.z) @ rows.T, atol=2e-5)


@pytest.mark.parametrize("kind", ["mixture", "frozen"])
def test_a_set_without_a_gradient_serves_both_sides(kind):
  c, networks, variables = _networks(kind)
  assert set(variables.teacher) == {"encoder"}
  same = variables.replace(teacher={"encoder": variables.encoder})
  trained, frozen = train_step.split(same, False)
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(2), s.shape), tiny.abstract_views(c)
  )
  scores = jax.jit(networks.scores)(trained, frozen, views, jax.random.key(3))
  np.testing.assert_allclose(scores.teacher.dense(), scores.student.dense()[:, :2], atol=1e-5)


def test_a_network_says_that_it_lacks_a_loss():
  _, networks, _ = _networks("frozen")
  with pytest.raises(NotImplementedError, match=r"method._replace\(loss=...\)"):
    networks.method.loss({}, None, {}, None, None)
