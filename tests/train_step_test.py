"""What every method must satisfy, one row of `METHODS` each."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax import train, train_step

# A new method adds its row here.
METHODS = (
  ("dino", "learned"),
  ("dino", "mixture"),
  ("dino", "frozen"),
  ("carp", "learned"),
  ("carp", "mixture"),
  ("carp", "frozen"),
)
every_method = pytest.mark.parametrize(("name", "prototypes"), METHODS)


@every_method
def test_loss_gradients_and_update_are_finite_and_move(name, prototypes):
  c = tiny.config(name, prototypes)
  program = train.Program(c)
  start = jax.device_get(program.init(c.seed).replace(key=()))
  _, state, metrics = tiny.run_steps(c, 2)
  chex.assert_tree_all_finite(jax.device_get(state.replace(key=())))
  assert all(np.isfinite(v) for m in metrics for v in m.values())
  assert metrics[0]["train/grad_norm"] > 0
  moved = {
    part: max(
      float(np.abs(np.asarray(a) - np.asarray(b)).max())
      for a, b in zip(
        jax.tree.leaves(getattr(start, part)), jax.tree.leaves(getattr(state, part)), strict=True
      )
    )
    for part in ("encoder", "prototypes", "teacher")
  }
  assert moved["encoder"] > 0 and moved["teacher"] > 0
  assert (moved["prototypes"] > 0) == (prototypes != "frozen")


@every_method
def test_no_gradient_reaches_what_is_not_trained(name, prototypes):
  c = tiny.config(name, prototypes)
  program = train.Program(c)
  variables = train_step.variables_of(program.init(c.seed))
  trained, frozen = train_step.split(variables, program.method.learns_prototypes)
  views = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(1), s.shape), tiny.abstract_views(c)
  )

  def value(trained, floats):
    whole = jax.tree.unflatten(treedef, [floats.get(i, leaf) for i, leaf in enumerate(leaves)])
    return program.method.loss(trained, whole, views, jax.random.key(2), jnp.int32(1))[0]

  leaves, treedef = jax.tree.flatten(frozen)
  floats = {
    i: leaf for i, leaf in enumerate(leaves)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }  # fmt: skip
  by_trained, by_frozen = jax.grad(value, argnums=(0, 1))(trained, floats)
  assert all(float(jnp.abs(g).max()) == 0.0 for g in by_frozen.values())
  assert any(float(jnp.abs(g).max()) > 0.0 for g in jax.tree.leaves(by_trained))
  assert ("prototypes" in by_trained) == (prototypes == "learned")


@every_method
def test_one_two_and_eight_devices_agree(name, prototypes):
  c = tiny.config(name, prototypes)
  runs = [tiny.run_steps(c, 3, jax.devices()[:n]) for n in (1, 2, 8)]
  _, one, metrics = runs[0]
  for _, state, other in runs[1:]:
    for key in ("train/loss", "train/grad_norm"):
      np.testing.assert_allclose(other[0][key], metrics[0][key], rtol=1e-5)
      np.testing.assert_allclose(other[2][key], metrics[2][key], rtol=1e-4)
    for a, b in zip(
      jax.tree.leaves(one.teacher), jax.tree.leaves(state.teacher), strict=True
    ):  # fmt: skip
      np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4)


@every_method
def test_data_parallel_step_only_all_reduces(name, prototypes):
  text = train.Program(tiny.config(name, prototypes)).lower().compile().as_text()
  assert "all-reduce" in text
  found = set(re.findall(r"(all-gather|all-to-all|collective-permute|reduce-scatter)", text))
  assert not found


@every_method
def test_three_steps_trace_once(name, prototypes, monkeypatch):
  calls = []
  original = train_step.train_step

  def counted(*args, **kwargs):
    calls.append(1)
    return original(*args, **kwargs)

  monkeypatch.setattr(train_step, "train_step", counted)
  tiny.run_steps(tiny.config(name, prototypes), 3)
  assert len(calls) == 1


@every_method
def test_loss_falls_on_a_small_set(name, prototypes):
  # Balanced targets: while a centre is still forming, DINO's loss may rise at first.
  changes = {"method__targets": "sinkhorn", "optim__warmup_steps": 1, "optim__lr": 0.1}
  c = tiny.config(name, prototypes, num_steps=200, **changes)
  _, _, metrics = tiny.run_steps(c, 60, jax.devices()[:1])
  losses = [m["train/loss"] for m in metrics]
  assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.01


def test_teacher_does_not_share_buffers_with_the_student():
  program = train.Program(tiny.config("dino", "learned"))
  state = program.init(0)
  students = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.encoder)
              if len(leaf.sharding.device_set) == 1}  # fmt: skip
  for leaf in jax.tree.leaves(state.encoder) + jax.tree.leaves(state.teacher):
    students.add(leaf.addressable_shards[0].data.unsafe_buffer_pointer())
  assert len(students) == len(jax.tree.leaves(state.encoder)) + len(jax.tree.leaves(state.teacher))


def test_gradient_accumulation_is_the_same_step():
  whole = tiny.run_steps(tiny.config(), 2)
  parts = tiny.run_steps(tiny.config(accum_steps=2), 2)
  for a, b in zip(whole[2], parts[2], strict=True):
    np.testing.assert_allclose(a["train/loss"], b["train/loss"], rtol=1e-5)
    np.testing.assert_allclose(a["train/grad_norm"], b["train/grad_norm"], rtol=1e-4)


def test_em_before_the_loss_uses_the_moved_mixture():
  """After one step the mixture is the same in both orders; only the first loss differs."""
  after = tiny.run_steps(tiny.config("dino", "mixture"), 1)
  before = tiny.run_steps(tiny.config("dino", "mixture", method__em_order="before_loss"), 1)
  chex.assert_trees_all_close(after[1].prototypes, before[1].prototypes, atol=1e-6)
  assert abs(after[2][0]["train/loss"] - before[2][0]["train/loss"]) > 1e-5


def test_prototypes_split_over_the_model_axis_agree_with_one_device():
  c = tiny.config("dino", "mixture")
  split = tiny.config("dino", "mixture", mesh__model=4)
  _, one, a = tiny.run_steps(c, 3, jax.devices()[:1])
  program, many, b = tiny.run_steps(split, 3)
  assert program.shardings.prototypes.means.spec == jax.sharding.PartitionSpec("model")
  np.testing.assert_allclose(a[0]["train/loss"], b[0]["train/loss"], rtol=1e-5)
  np.testing.assert_allclose(a[2]["train/loss"], b[2]["train/loss"], rtol=1e-4)
  np.testing.assert_allclose(one.prototypes.means, many.prototypes.means, atol=1e-4)


def test_bfloat16_encoder_stays_close_and_keeps_float32_state():
  _, state, low = tiny.run_steps(tiny.config(precision="bfloat16"), 1)
  _, _, full = tiny.run_steps(tiny.config(), 1)
  np.testing.assert_allclose(low[0]["train/loss"], full[0]["train/loss"], rtol=0.02)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.teacher)} == {jnp.dtype("float32")}


def test_online_probe_gets_no_hold_of_the_encoder():
  """The encoder after three steps is the same to the bit with the probe and without."""
  _, without, _ = tiny.run_steps(tiny.config(), 3)
  _, with_probe, metrics = tiny.run_steps(tiny.config(), 3, num_classes=10)
  chex.assert_trees_all_equal(without.encoder, with_probe.encoder)
  assert "probe" in with_probe.carry
  assert any(k.startswith("probe/") for k in metrics[0])


def test_batch_norm_statistics_are_carried_for_student_and_teacher():
  c = tiny.config(head__norm="batch")
  program = train.Program(c)
  start = jax.device_get(program.init(0).carry["batch_stats"])
  _, state, _ = tiny.run_steps(c, 1)
  for side in ("student", "teacher"):
    assert not np.allclose(
      jax.tree.leaves(start[side])[0], jax.tree.leaves(state.carry["batch_stats"][side])[0]
    )
