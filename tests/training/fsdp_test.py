"""`mesh.fsdp`: kernels stored split over the devices, and what that must not change."""

import os
import re

import chex
import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from protojax import errors, placement
from protojax.models import encoder as encoders
from protojax.training import checkpoint, programs


@pytest.fixture
def split_small(monkeypatch):
  """Kernels of the tiny config are split as if they were large."""
  monkeypatch.setattr(placement, "_LARGE", 1024)


def _host(state):
  return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


_long = pytest.mark.skipif("PROTOJAX_TEST_ALL" not in os.environ, reason="not without --all")


@pytest.mark.parametrize(
  "changes", [pytest.param({}, marks=_long), {"model__scan": True, "mesh__model": 2}]
)
def test_a_run_is_the_same_and_its_checkpoint_goes_on_either_way(changes, split_small, tmp_path):
  """Blocks one by one, then in a loop and beside split prototypes."""
  whole, expected, losses = tiny.run_steps(tiny.config(**changes), 3)
  split, state, found = tiny.run_steps(tiny.config(**changes, mesh__fsdp=True), 3)
  for step, (one, other) in enumerate(zip(losses, found, strict=True)):
    np.testing.assert_allclose(other["train/loss"], one["train/loss"], rtol=1e-4 if step else 1e-5)
  chex.assert_trees_all_close(
    *(_host(s.replace(opt_state=())) for s in (state, expected)), atol=1e-4
  )

  def of(tree):
    return tree["backbone"]["blocks_0"]["mlp"]["fc1"]["kernel"]

  moments = [m for m in jax.tree.leaves(state.opt_state) if m.shape == (32, 128)]
  for kernel in (of(state.encoder), of(state.teacher["encoder"]), *moments):
    assert kernel.sharding.spec == PartitionSpec(None, "data")
  assert len(moments) >= 2 and of(expected.encoder).sharding.spec == PartitionSpec()

  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(3, state, {})
  saved.close()
  saved = checkpoint.Checkpoints(tmp_path)
  _, restored, _ = saved.restore_latest(whole.restore_target)
  saved.close()
  assert of(restored.encoder).sharding.spec == PartitionSpec()
  chex.assert_trees_all_equal(_host(restored), _host(state))
  chex.assert_trees_all_equal(*(p.exported(s)[0] for p, s in ((split, state), (whole, restored))))


def test_kernels_are_gathered_and_nothing_of_the_images(split_small):
  program = programs.Program(tiny.config(mesh__fsdp=True))
  text = program.lower().compile().as_text()
  found = re.findall(r"= f32\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
  kernels = {leaf.shape for leaf in jax.tree.leaves(program.abstract.encoder) if leaf.size >= 1024}
  shapes = {tuple(map(int, dims.split(","))) for dims in found}
  assert shapes and {tuple(sorted(s)) for s in shapes} <= {tuple(sorted(k)) for k in kernels}
  assert "all-to-all" not in text and "collective-permute" not in text


def test_a_resnet_is_refused():
  with pytest.raises(errors.UserError, match="mesh.fsdp=True splits transformers, .*resnet18"):
    encoders.build(tiny.config(mesh__fsdp=True, model__name="resnet18"))
