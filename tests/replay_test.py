"""Steps that are not finite: left out, counted, kept for replay, and the layer that broke named."""

import json
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from protojax import errors, replay
from protojax.data import pipeline
from protojax.training import console, programs, sharding

pytestmark = pytest.mark.xdist_group("train")  # one worker trains `finished_run`


@pytest.fixture(scope="module")
def guarded():
  """(program, a batch) of a config that leaves out what is not finite."""
  c = tiny.config(optim__skip_nonfinite=2)
  program = programs.Program(c)
  with jax.set_mesh(program.mesh):
    return program, sharding.put_batch(tiny.batch(c), program.mesh)


def _broken(state):
  """A state whose head overflows: its third layer's kernel holds an infinity."""
  encoder = jax.tree.map(jnp.copy, state.encoder)
  kernel = encoder["head"]["fc3"]["kernel"]
  encoder["head"]["fc3"]["kernel"] = kernel.at[0, 0].set(jnp.inf)
  return state.replace(encoder=encoder)


def test_an_update_that_is_not_finite_leaves_everything_but_the_step_as_it_was(guarded):
  program, batch = guarded
  with jax.set_mesh(program.mesh):
    state = _broken(program.init(0))
    before = jax.device_get(state.replace(key=()))
    after, metrics = program.step(state, batch, None)
  assert metrics["train/skipped"] == 1.0 and not np.isfinite(metrics["train/grad_norm"])
  chex.assert_trees_all_equal(jax.device_get(after.replace(key=())), before.replace(step=1))


def test_a_finite_update_is_the_one_without_the_guard(guarded):
  program, batch = guarded
  plain = programs.Program(tiny.config())
  with jax.set_mesh(program.mesh):
    kept, metrics = program.step(program.init(0), batch, None)
    expected, _ = plain.step(plain.init(0), batch, None)
  assert metrics["train/skipped"] == 0.0
  chex.assert_trees_all_close(kept.replace(key=()), expected.replace(key=()), atol=1e-6)


def _for_log(**changes):
  config = tiny.config(**changes)
  config.data.num_records = 64
  return config


def _log(folder, losses, **changes):
  config = _for_log(num_steps=len(losses), **changes)
  skipped = np.full(2, -1, np.int32)
  with console.RunLog(folder, config, start=0, describe=str) as log:
    for step, loss in enumerate(losses):
      out = float(not math.isfinite(loss))
      metrics = {"train/loss": loss, "train/grad_norm": 1.0, "train/skipped": out}
      metrics = {k: jnp.float32(v) for k, v in metrics.items()}
      log.step(step, metrics, skipped=skipped, waited=0.0)
    log.flush()
  return log


@pytest.mark.survives(
  "updates that are not finite, with optim.skip_nonfinite",
  "more in a row than are allowed",
  "each left out and written down; then one line",
)
def test_so_many_in_a_row_are_left_out_each_with_its_rows_and_then_the_run_ends(tmp_path):
  nan = math.nan
  log = _log(tmp_path, [1.0, nan, nan, 2.0, nan, 3.0], optim__skip_nonfinite=2, log_every=6)
  assert log.result["train/loss"] == pytest.approx(2.5)  # of those since the first line
  bad = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
  assert [record["step"] for record in bad] == [2, 3, 5]
  order = pipeline.shuffled(64, 0)
  assert bad[1]["index"] == [int(order[2 * 16 + row]) for row in range(16)]
  said = (tmp_path / "train.log").read_text()
  assert "step 3 left out: the loss is nan (2 in a row, 2 allowed); protojax replay --work" in said
  with pytest.raises(errors.UserError, match="after step 4, 3 updates in a row: lower"):
    _log(tmp_path, [1.0, nan, nan, nan, 2.0], optim__skip_nonfinite=2)


def test_a_gradient_that_is_not_finite_ends_the_run_though_the_loss_is(tmp_path):
  norm = {"train/loss": jnp.float32(1.0), "train/grad_norm": jnp.float32(math.inf)}
  with (
    pytest.raises(errors.UserError, match="the gradient's norm is inf after step 1: lower"),
    console.RunLog(tmp_path, _for_log(), start=0, describe=str) as log,
  ):
    log.step(0, norm, skipped=np.full(2, -1, np.int32), waited=0.0)
    log.sync()
  assert json.loads((tmp_path / "bad_steps.jsonl").read_text())["step"] == 1


def test_a_loss_far_above_the_hundred_before_it_is_said_once(tmp_path):
  rng = np.random.default_rng(0)
  losses = [*(5.0 + 0.1 * rng.standard_normal(120)), 9.0, 9.0, *([5.0] * 20)]
  _log(tmp_path, losses, log_every=1000)
  jumps = re.findall(r"step (\d+): the loss jumped to (\S+);", (tmp_path / "train.log").read_text())
  assert jumps == [("121", "9.000")]


@pytest.fixture(scope="module")
def of_the_sixth(finished_run):
  """(config, state 5, batch 5) as replay makes them from checkpoint 4 of a run of 6 steps."""
  said = []
  config, state, batch = replay.state_before(str(finished_run), 6, said.append)
  assert said == ["from checkpoint 4, 1 updates before it"]
  return config, state, batch


def test_replay_makes_the_very_step_again(finished_run, of_the_sixth):
  """Its loss is the one in the log, from another checkpoint on."""
  config, state, batch = of_the_sixth
  assert int(state.step) == 5
  found = replay.look(config, state, batch)
  lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
  losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
  norms = {line["step"]: line["train/grad_norm"] for line in lines if "train/loss" in line}
  assert found.loss == pytest.approx(losses[6], rel=1e-5)
  assert np.linalg.norm(list(found.gradients.values())) == pytest.approx(norms[6], rel=1e-4)
  assert replay.first_broken(found) == "finite throughout"


@pytest.mark.survives(
  "which layer broke",
  "a replayed step",
  "its name, in the run's precision and in float32",
)
def test_the_first_layer_that_breaks_is_named(of_the_sixth):
  config, state, batch = of_the_sixth
  said = replay.first_broken(replay.look(config, _broken(state), batch))
  assert said == "the output of Projector/fc3 is the first that is not finite"
  encoder = jax.tree.map(jnp.copy, state.encoder)
  qkv = encoder["backbone"]["blocks_1"]["attn"]["qkv"]
  qkv["kernel"] = qkv["kernel"].at[0, 0].set(jnp.nan)
  found = replay.look(config, state.replace(encoder=encoder), batch)
  assert "ViT/blocks_1/attn/qkv" in replay.first_broken(found)
  prototypes = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.prototypes)
  found = replay.look(config, state.replace(prototypes=prototypes), batch)
  assert "every layer's output is finite, the loss is not" in replay.first_broken(found)


def test_what_replay_cannot_make_again_is_one_line(finished_run, tmp_path):
  for workdir, step, line in [
    (tmp_path, 3, "config.json cannot be read"),
    (finished_run, 7, "give one of 1 to 6"),
    (finished_run, 2, r"no checkpoint before step 2 is left in .* \(there: 4, 6\)"),
  ]:
    with pytest.raises(errors.UserError, match=line):
      replay.state_before(str(workdir), step, print)
