"""What every method must satisfy, one row of `METHODS` each."""

import contextlib
import functools
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import chex
import guards
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from method_table import METHODS

from protojax import loading, losses
from protojax.metrics import collapse, rules
from protojax.models import encoder as encoders
from protojax.planning import compiled
from protojax.training import checkpoint, programs, sharding, train_step

every_method = pytest.mark.parametrize(
  "row",
  # One worker a row: its tests share what `_three_steps` keeps.
  [pytest.param(r, marks=pytest.mark.xdist_group(f"row{i}")) for i, r in enumerate(METHODS)],
  ids=[f"{r.name}-{r.prototypes}" for r in METHODS],
)
_IN_GROUPS = next(i for i, row in enumerate(METHODS) if row.model > 1)
# Of each method the first: one is enough for bfloat16. Without --all those that divide by a
# variance or count over the batch.
FIRST_ROWS = [
  row
  for row in {r.name: r for r in reversed(METHODS)}.values()
  if "PROTOJAX_TEST_ALL" in os.environ or row.name in ("barlow_twins", "vicreg", "swav", "falcon")
]


# Of the 60 steps in which a loss has to fall, and of the first three of them.
# Not Adam: of a gradient that is zero but for rounding, a bias before a norm, it makes a step. At a
# rate of .05 losses fall as well, but the features of SwAV bunch.
_LEARNING = {
  "num_steps": 200,
  "optim__warmup_steps": 1,
  "optim__name": "sgd",
  "optim__lr": 0.02,
}


class Run(NamedTuple):
  """Three steps of a row on one batch.

  Attributes:
    program: of the row.
    step: its step as the loop compiles it, the only time here.
    start: state 0 on the host.
    state: state 3.
    metrics: of the three steps.
    traces: how often the step was traced.
    same_types: whether state 3 has the types of state 0, so that a step takes what another returns.
  """

  program: programs.Program
  step: Callable
  start: train_step.TrainState
  state: train_step.TrainState
  metrics: list[dict[str, float]]
  traces: int
  same_types: bool


@functools.cache
def _three_steps(row, devices):
  """Of all eight devices, `row.model` share the prototypes; of fewer, none do."""
  traces, original = [], train_step.train_step

  def counted(*args, **kwargs):
    traces.append(1)
    return original(*args, **kwargs)

  model = row.model if devices == 8 else 1
  config = row.config(**_LEARNING, mesh__model=model)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_step, "train_step", counted)
    program = programs.Program(config, devices=jax.devices()[:devices])
    step = program.lower().compile()
  state, metrics = _start(row, program), []
  start = jax.tree.map(np.array, _on_host(state))  # copies: the first step takes these
  types = _types(state)
  with jax.set_mesh(program.mesh):
    batch = sharding.put_batch(tiny.batch(config), program.mesh)
    for _ in range(3):
      state, out = step(state, batch, None)
      metrics.append({k: float(v) for k, v in out.items()})
  return Run(program, step, start, state, metrics, len(traces), _types(state) == types)


def _start(row, program):
  """State 0. That of one device is taken from eight, and none inside `jax.set_mesh`, where init
  would be compiled once more."""
  if program.mesh.size > 1:
    return program.init(program.config.seed)
  eight = _three_steps(row, 8).program
  return jax.device_put(eight.init(eight.config.seed), program.shardings)


def _types(state):
  """What a jitted function is traced anew for: structure, shapes, dtypes, weak types."""
  return jax.tree.map(jax.typeof, state)


def _on_host(state):
  """NumPy arrays; of typed keys, which have no finite and no difference, their data."""

  def plain(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  return jax.device_get(jax.tree.map(plain, state))


def _size(shape: str) -> int:
  """Bytes of an HLO shape, "f32[8,16]{1,0}" or a tuple of such."""
  width = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
  return sum(
    width[kind] * int(np.prod([int(d) for d in dims.split(",") if d] or [1]))
    for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
  )


@every_method
def test_loss_gradients_and_update_are_finite_and_move(row):
  run = _three_steps(row, 8)
  start, state, metrics = run.start, _on_host(run.state), run.metrics
  chex.assert_tree_all_finite(state)
  assert all(np.isfinite(v) for m in metrics for v in m.values())
  assert metrics[0]["train/grad_norm"] > 0

  def moved(part):
    pairs = zip(
      jax.tree.leaves(getattr(start, part)), jax.tree.leaves(getattr(state, part)), strict=True
    )
    return max((float(np.abs(a.astype(float) - b).max()) for a, b in pairs), default=0.0)

  assert moved("encoder") > 0
  assert (moved("teacher") > 0) == (start.teacher != ())
  assert (moved("prototypes") > 0) == (row.prototypes in ("learned", "mixture"))


@every_method
def test_no_gradient_reaches_what_is_not_trained(row):
  """For any input: in the traced gradient no value leads from an input to these outputs."""
  program = _three_steps(row, 1).program
  variables = train_step.variables_of(program.abstract)
  trained, frozen = train_step.split(variables, program.method.learns_prototypes)
  views = tiny.abstract_views(program.config)
  views["index"] = jax.ShapeDtypeStruct((program.config.batch_size,), jnp.int32)
  leaves, treedef = jax.tree.flatten(frozen)
  floats = {i: leaf for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)}
  others = {i: leaf for i, leaf in enumerate(leaves) if i not in floats}

  def value(trained, floats, others, views):
    whole = jax.tree.unflatten(treedef, [(floats | others)[i] for i in range(len(leaves))])
    value, out = program.method.loss(trained, whole, views, jax.random.key(2), jnp.int32(1))
    return value, out.metrics["loss"]

  grad = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
  traced, shapes = jax.make_jaxpr(grad, return_shape=True)(trained, floats, others, views)
  minimised, logged, *_ = traced.jaxpr.outvars
  assert minimised is logged
  _, (by_trained, by_frozen) = jax.tree.unflatten(
    jax.tree.structure(shapes), _depends_on_input(traced.jaxpr)
  )
  assert not any(by_frozen.values())
  assert all(jax.tree.leaves(by_trained["encoder"]["backbone"]))
  assert ("prototypes" in by_trained) == (row.prototypes == "learned")
  assert any(jax.tree.leaves(by_trained.get("prototypes", True)))


def _depends_on_input(jaxpr) -> list[bool]:
  """Of each output, whether anything leads to it from an input."""

  def reached(variables):
    return [not isinstance(v, jax.extend.core.Literal) and v in found for v in variables]

  found = set(jaxpr.invars)
  for equation in jaxpr.eqns:
    if any(reached(equation.invars)):
      found.update(equation.outvars)
  return reached(jaxpr.outvars)


@every_method
def test_one_two_and_eight_devices_agree(row):
  first = _three_steps(row, 1)
  # Without the optimizer's traces: those of a bias before a norm are rounding and nothing else.
  start, one = (
    jax.tree.leaves(_on_host(s.replace(opt_state=()))) for s in (first.start, first.state)
  )
  # Eight say nearly all that two would: those with one mixture and one queue. Groups of one here.
  both = (row.name, row.prototypes) in (("dino", "mixture"), ("pcl", "kmeans"))
  for devices in (2, 8) if both else (8,):
    run = _three_steps(row, devices)
    for key, later in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
      np.testing.assert_allclose(run.metrics[0][key], first.metrics[0][key], rtol=1e-5)
      np.testing.assert_allclose(run.metrics[2][key], first.metrics[2][key], rtol=later)
    paths = jax.tree_util.tree_leaves_with_path(_on_host(run.state.replace(opt_state=())))
    for (path, a), b, begun in zip(paths, one, start, strict=True):
      name = jax.tree_util.keystr(path)
      if not jnp.issubdtype(a.dtype, jnp.floating):
        np.testing.assert_array_equal(a, b, err_msg=name)
        continue
      apart, moved = np.linalg.norm(a - b), np.linalg.norm(b - begun)
      # 3e-4 at most, but where all the gradient is rounding: that moves a bias by 1e-7.
      assert apart <= 1e-3 * moved + 5e-7, f"{name} on {devices}: {apart} apart, {moved} moved"


@pytest.mark.skipif("PROTOJAX_TEST_ALL" not in os.environ, reason="not without --all")
@every_method
def test_every_mesh_gives_the_same_loss_and_gradient(row):
  changes = dict(_LEARNING)
  if row.name == "pcl":
    changes["method__num_prototypes"] = 40  # what 8 divides
  one, *meshes = (
    tiny.run_steps(row.config(**changes, mesh__model=model), 1, jax.devices()[:devices])[2][0]
    for devices, model in ((1, 1), (8, 1), (8, 2), (8, 4), (8, 8))
  )
  for out in meshes:
    np.testing.assert_allclose(out["train/loss"], one["train/loss"], rtol=1e-5)
    np.testing.assert_allclose(out["train/grad_norm"], one["train/grad_norm"], rtol=1e-3)


@every_method
def test_devices_exchange_sums_and_the_embeddings_that_prototypes_meet(row):
  """In groups of one device, sums alone. In a larger one z is gathered, and nothing of all K: of
  its part, K / `row.model`, there are sums over the batch."""
  run = _three_steps(row, 8)
  text = run.step.as_text()
  assert "all-reduce" in text
  ops = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
  allowed = {op: most for op, most, _ in row.collectives}
  config = run.program.config
  if row.model > 1:
    views = 2 + config.augment.num_local + 2 * 4 * (row.name == "ibot")  # four patches each
    gathered = 4 * config.batch_size // (8 // row.model) * views * config.head.bottleneck
    allowed["all-gather"] = max(gathered, allowed.get("all-gather", 0))
  for shape, op in re.findall(rf"= (\S.*?) ({ops})(?:-start)?\(", text):
    assert op == "all-reduce" or _size(shape) <= allowed.get(op, 0), f"{op} of {shape}"
    if row.model > 1:
      plain = re.sub(r"{.*?}", "", shape)  # without layouts
      sizes = {int(size) for size in re.findall(r"(?<=[\[,])\d+(?=[\],])", plain)}
      of_k = [size for size in sizes if size % 11 == 0]
      part = config.method.num_prototypes // row.model
      assert max(of_k, default=0) <= part, f"{op} of {shape}"
      assert op == "all-reduce" or not of_k, f"{op} of {shape}"


@pytest.mark.xdist_group(f"row{_IN_GROUPS}")
def test_devices_of_a_group_repeat_no_work():
  one, eight = (
    _three_steps(METHODS[_IN_GROUPS], devices).step.cost_analysis()["flops"] for devices in (1, 8)
  )
  assert eight < one / 6  # an eighth, but for the optimizer


@every_method
def test_work_memory_messages_and_placement_are_as_stored(row):
  """Placement over both axes, the rest of the step of eight devices; see tests/guards.py."""
  run = _three_steps(row, 8)
  over_both = sharding.make_mesh(2, 4)
  places = compiled.places(sharding.state_shardings(run.program.abstract, over_both))
  found = guards.numbers(*compiled.measure(run.step)) | {"split": guards.split(places)}
  same = [r for r in METHODS if (r.name, r.prototypes) == (row.name, row.prototypes)]
  guards.check(f"{row.name}-{row.prototypes}-{same.index(row)}", found, "jax")


def test_a_step_holds_no_copy_of_many_prototypes():
  """They move in place, after the loss has read them: 64 MiB of means, as much of sums."""
  num, dim = 2**18, 64
  config = tiny.config(
    "dino", "mixture", head__bottleneck=dim, method__num_prototypes=num, method__block=2**12
  )
  step = programs.Program(config, devices=jax.devices()[:1]).lower().compile()
  assert step.memory_analysis().temp_size_in_bytes < 4 * num * dim


@every_method
def test_exported_arrays_score_images_as_the_method_does(row):
  """Embeddings up to a positive factor, scores up to rounding, codes but for ties."""
  run = _three_steps(row, 8)
  method = run.program.method
  net = encoders.build(run.program.config, mask_token=row.name == "ibot")

  @jax.jit
  def both(state, images):
    variables, (_, tree) = train_step.variables_of(state), train_step.encoder_of(state)
    sets = method.scoring(variables) if method.scoring else {}
    mine = loading.Sets(net), (tree["params"], tree["batch_stats"], sets)
    return [
      (one.embeddings(rest, images), one.codes(rest, images), matrices)
      for one, rest, matrices in (
        (method, variables, method.prototype_matrices(variables)),
        (*mine, {k: losses.l2_normalize(v.rows.astype(jnp.float32)) for k, v in sets.items()}),
      )
    ]

  images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
  theirs, ours = jax.device_get(both(jax.device_get(run.state), images))
  assert ours[1].keys() == theirs[1].keys() == ours[2].keys()
  for name, scores in theirs[1].items():
    np.testing.assert_allclose(ours[1][name], scores, rtol=1e-4, atol=1e-4 * np.abs(scores).max())
    np.testing.assert_allclose(ours[2][name], theirs[2][name], atol=1e-5)
    cosines = [losses.l2_normalize(jnp.asarray(x[0][name])) for x in (theirs, ours)]
    np.testing.assert_allclose(*cosines, atol=1e-5)
  assert bool(ours[1]) == (row.prototypes != "none")


@every_method
def test_three_steps_trace_once(row):
  run = _three_steps(row, 8)
  assert run.traces == 1 and run.same_types


@every_method
def test_restart_is_the_same_to_the_bit(row, tmp_path):
  """Two steps, a checkpoint, a third from what is read back: state 3 of the run in one go."""
  run = _three_steps(row, 8)
  program = run.program
  state = _start(row, program)
  with jax.set_mesh(program.mesh):
    batch = sharding.put_batch(tiny.batch(program.config), program.mesh)
    for _ in range(2):
      state, _ = run.step(state, batch, None)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
      saved.save(2, state, {})
      target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        program.abstract,
        program.shardings,
      )
      step, restored, _ = saved.restore_latest(target)
    assert step == 2
    state, out = run.step(restored, batch, None)
  chex.assert_trees_all_equal(_on_host(state), _on_host(run.state))
  assert float(out["train/loss"]) == run.metrics[2]["train/loss"]


@pytest.mark.parametrize("row", FIRST_ROWS, ids=lambda row: row.name)
def test_two_images_a_batch_in_bfloat16_stay_finite(row):
  config = row.config(batch_size=2, precision="bfloat16")
  _, state, metrics = tiny.run_steps(config, 2, jax.devices()[:1])
  chex.assert_tree_all_finite(_on_host(state))
  assert all(np.isfinite(v) for m in metrics for v in m.values())


@every_method
def test_loss_falls_on_real_images_whose_features_stay_apart(row):
  if row.learns:
    config = row.config(**{**_LEARNING, **dict(row.learns)})
    program = programs.Program(config, devices=jax.devices()[:1])
    step, state = program.step, program.init(config.seed)
  else:
    program, step, *_ = _three_steps(row, 1)
    config, state = program.config, _start(row, program)
  metrics = []
  with jax.set_mesh(program.mesh):
    for i in range(60):
      batch = sharding.put_batch(tiny.digits(config, i), program.mesh)
      state, out = step(state, batch, None)
      metrics.append(out)
  losses = [float(m["train/loss"]) for m in metrics]
  assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.01
  encode = jax.jit(lambda v, batch: program.method.features(v, program.evaluation(batch)))
  features = encode(train_step.variables_of(state), tiny.digits(config, 0))
  assert collapse.feature_std(features) > rules.LIMITS["feature_std"]


@pytest.mark.parametrize(
  ("text", "size"),
  [("f32[8,16]{1,0}", 512), ("(s32[4]{0}, bf16[2,3]{1,0})", 28), ("f32[]", 4)],
)
def test_sizes_of_hlo_shapes(text, size):
  assert _size(text) == size


def test_every_step_draws_new_views():
  """Nothing is learned and the batch is the same: only the views can change the loss."""
  fixed = {"optim__lr": 0.0, "optim__final_lr": 0.0, "method__targets": "sinkhorn"}
  c = tiny.config("dino", "frozen", teacher__momentum=1.0, **fixed)
  _, _, metrics = tiny.run_steps(c, 2, jax.devices()[:1])
  assert abs(metrics[0]["train/loss"] - metrics[1]["train/loss"]) > 1e-4


def test_teacher_does_not_share_buffers_with_the_student():
  program = programs.Program(tiny.config("dino", "learned"))
  state = program.init(0)
  students = {
    leaf.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves(state.encoder)
    if len(leaf.sharding.device_set) == 1
  }
  for leaf in jax.tree.leaves(state.encoder) + jax.tree.leaves(state.teacher):
    students.add(leaf.addressable_shards[0].data.unsafe_buffer_pointer())
  assert len(students) == len(jax.tree.leaves(state.encoder)) + len(jax.tree.leaves(state.teacher))


@functools.cache
def _mixture_steps():
  """([state 1, 2, 3], [metrics]) of `tiny.config()` on eight devices, states on the host."""
  program = programs.Program(tiny.config())
  states, metrics = [], []
  with jax.set_mesh(program.mesh):
    batch = sharding.put_batch(tiny.batch(program.config), program.mesh)
    state = program.init(program.config.seed)
    for _ in range(3):
      state, out = program.step(state, batch, None)
      states.append(jax.tree.map(np.array, _on_host(state)))  # copies: the next step takes these
      metrics.append({k: float(v) for k, v in out.items()})
  return states, metrics


@pytest.mark.xdist_group("mixture_steps")
def test_gradient_accumulation_is_the_same_step():
  _, one_part = _mixture_steps()
  _, _, parts = tiny.run_steps(tiny.config(accum_steps=2), 2)
  for a, b in zip(one_part[:2], parts, strict=True):
    np.testing.assert_allclose(a["train/loss"], b["train/loss"], rtol=1e-5)
    np.testing.assert_allclose(a["train/grad_norm"], b["train/grad_norm"], rtol=1e-4)


@pytest.mark.xdist_group("mixture_steps")
def test_em_before_the_loss_uses_the_moved_mixture():
  """After one step the mixture is the same in both orders; only the first loss differs."""
  states, metrics = _mixture_steps()
  before = tiny.run_steps(tiny.config("dino", "mixture", method__em_order="before_loss"), 1)
  chex.assert_trees_all_close(states[0].prototypes, before[1].prototypes, atol=1e-6)
  assert abs(metrics[0]["train/loss"] - before[2][0]["train/loss"]) > 1e-5


@pytest.mark.xdist_group("mixture_steps")
def test_bfloat16_encoder_stays_close_and_keeps_float32_state():
  _, state, low = tiny.run_steps(tiny.config(precision="bfloat16"), 1)
  _, full = _mixture_steps()
  np.testing.assert_allclose(low[0]["train/loss"], full[0]["train/loss"], rtol=0.02)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.teacher)} == {jnp.dtype("float32")}


@pytest.mark.xdist_group("mixture_steps")
def test_online_probe_gets_no_hold_of_the_encoder():
  """The encoder after three steps is the same to the bit with the probe and without."""
  states, _ = _mixture_steps()
  _, with_probe, metrics = tiny.run_steps(tiny.config(), 3, num_classes=10)
  chex.assert_trees_all_equal(states[2].encoder, _on_host(with_probe.encoder))
  assert "probe" in with_probe.carry
  assert any(k.startswith("probe/") for k in metrics[0])


def test_online_probe_learns_from_every_nth_image_of_the_batch_on_any_number_of_devices():
  c = tiny.config(probe__batch_size=8)
  for devices in (8, 1):
    program, state, metrics = tiny.run_steps(c, 1, jax.devices()[:devices], num_classes=10)
    assert program.probe_rows == 8 and not program.probe_apart
    assert program.keys == ("image", "size", "index", "label")
    rows = {k: v[::2] for k, v in tiny.batch(c).items()}
    labels = np.arange(16, dtype=np.int32)[::2] % 10
    features = program.method.features(train_step.variables_of(state), program.evaluation(rows))
    start = program.probe.init(jax.random.key(0))
    expected, said = program.probe.update(start, features, labels)
    for name in ("mean", "var"):  # Adam's first step makes a sign of any gradient
      np.testing.assert_allclose(state.carry["probe"][name], expected[name], atol=1e-4)
    bias = state.carry["probe"]["params"]["bias"]
    np.testing.assert_allclose(bias, expected["params"]["bias"], atol=1e-6)
    for name, value in said.items():
      np.testing.assert_allclose(metrics[0][name], value, atol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [
    {"probe__batch_size": 32},  # more than a batch
    {"probe__train_split": "test"},
    {"probe__name": "cifar10"},
    {"data__imbalance": 10.0},  # whose bank is the whole set
  ],
)
def test_online_probe_has_batches_of_its_own_where_its_images_are_not_those_of_the_batch(changes):
  program = programs.Program(tiny.config(**changes), 10)
  assert program.probe_apart and program.probe_rows == 0 and "label" not in program.keys


def test_batch_norm_statistics_are_carried_for_student_and_teacher():
  c = tiny.config(head__norm="batch")
  program = programs.Program(c)
  start = jax.device_get(program.init(0).carry["batch_stats"])
  _, state, _ = tiny.run_steps(c, 1)
  for side in ("student", "teacher"):
    assert not np.allclose(
      jax.tree.leaves(start[side])[0], jax.tree.leaves(state.carry["batch_stats"][side])[0]
    )
