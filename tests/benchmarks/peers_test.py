"""The PyTorch steps that ours are timed against compute the same, with as much work."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend import core

from benchmarks import flops
from protojax import recipes, resolving, schedules
from protojax.data import augment
from protojax.training import optim, programs, train_step

pytestmark = pytest.mark.xdist_group("peers")  # one worker: its tests share a costly fixture

_CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
_STEP = 3  # of six, in the second epoch: schedules have left their start


@pytest.fixture(scope="module")
def peers():
  pytest.importorskip("torch")
  from benchmarks import peers

  return peers


# Operations of a JAX function.


def _shape(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _matmul(a, b):
  return a @ b


_ONE = 2 * 4 * 5 * 4  # [4, 5] @ [5, 4]


def _scanned(a, b):
  return jax.lax.scan(lambda carry, _: (carry, _matmul(a, b)), 0, None, length=7)[1]


def _counted(a, b):
  return jax.lax.fori_loop(0, 3, lambda i, x: x + _matmul(a, b), jnp.zeros((4, 4)))


def _while(a, b):
  return jax.lax.while_loop(jnp.all, lambda x: x + _matmul(a, b), jnp.zeros((4, 4)))


def _branches(a, b):
  dear = lambda: _matmul(a, b) @ _matmul(a, b)  # noqa: E731
  return jax.lax.cond(a[0, 0] > 0, dear, lambda: _matmul(a, b))


def _gradient(f):
  return lambda *args: jax.value_and_grad(lambda *x: f(*x).sum(), argnums=(0, 1))(*args)


@pytest.mark.parametrize(
  "fn, expected",
  [
    (_matmul, _ONE),
    (jax.jit(_matmul), _ONE),
    (_scanned, 7 * _ONE),
    (_counted, 3 * _ONE),
    (_while, _ONE),
    (_branches, 2 * _ONE + 2 * 4 * 4 * 4),
    (_gradient(_matmul), 3 * _ONE),
    (_gradient(jax.checkpoint(lambda a, b: jnp.sin(_matmul(a, b)))), 4 * _ONE),
  ],
)
def test_operations_of_products_are_counted_as_often_as_they_run(fn, expected):
  assert flops.of_function(fn, _shape(4, 5), _shape(5, 4)) == expected


def test_a_batched_product_counts_for_every_row_of_its_batch():
  assert flops.of_function(_matmul, _shape(6, 4, 5), _shape(5, 4)) == 6 * _ONE
  assert flops.of_function(_matmul, _shape(6, 4, 5), _shape(6, 5, 4)) == 6 * _ONE


def test_a_fused_attention_is_refused_as_it_would_count_for_nothing():
  fused = core.Primitive("dot_product_attention_fwd_wrapper")
  fused.def_abstract_eval(lambda x: x)
  with pytest.raises(ValueError, match="model.attention=xla"):
    flops.of_function(jax.jit(lambda a: fused.bind(a)), _shape(4, 5))


def _conv(x, w, **options):
  return jax.lax.conv_general_dilated(
    x,
    w,
    **{"window_strides": (1, 1), "padding": "VALID", **options},
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def test_a_patch_embedding_and_its_gradients_cost_what_the_product_of_its_patches_costs():
  x, w = _shape(2, 8, 8, 3), _shape(4, 4, 3, 5)
  once = 2 * (2 * 2 * 2) * (4 * 4 * 3) * 5
  patches = functools.partial(_conv, window_strides=(4, 4))
  assert flops.of_function(patches, x, w) == once
  assert flops.of_function(_gradient(patches), x, w) == 3 * once


@pytest.mark.parametrize(
  "groups, options",
  [
    (1, {"window_strides": (2, 1), "padding": "SAME"}),
    (3, {"padding": ((2, 0), (1, 1))}),
    (1, {"rhs_dilation": (2, 3), "padding": "SAME"}),
    (1, {"lhs_dilation": (2, 2), "padding": ((1, 2), (2, 2))}),
  ],
)
def test_operations_of_convolutions_and_their_gradients_are_those_xla_counts(groups, options):
  x, w = _shape(2, 9, 8, 6), _shape(3, 2, 6 // groups, 9)
  conv = functools.partial(_conv, **options, feature_group_count=groups)
  cotangent = jax.eval_shape(conv, x, w)

  def all_of_it(x, w, cotangent):
    y, pull = jax.vjp(conv, x, w)
    return y, pull(cotangent)

  theirs = jax.jit(all_of_it).lower(x, w, cotangent).cost_analysis()["flops"]
  assert flops.of_function(all_of_it, x, w, cotangent) == theirs > 0


# The peers at the sizes of the recipes; nothing is computed.


def _imagenet(name):
  if name == "dino":
    config = recipes.load(str(_CONFIGS / "dino_vit_s.py"))
  else:
    config = recipes.load(str(_CONFIGS / "barlow_twins_resnet50.py"))
    config.model.name, config.optim.name = "vit_small", "adamw"
  config.batch_size = 64
  return resolving.resolve(config, 1_281_167)


@pytest.mark.parametrize(
  "name, millions, gigas", [("dino", 43.95, 113.43), ("barlow_twins", 159.06, 57.00)]
)
def test_a_peer_has_as_many_parameters_and_operations_as_ours(peers, name, millions, gigas):
  import torch

  config = _imagenet(name)
  program = programs.Program(config, devices=jax.devices()[:1])
  peer = peers.build(config, "meta")
  trained = (program.abstract.encoder, program.abstract.prototypes)
  ours = sum(x.size for x in jax.tree.leaves(trained))
  assert peers.parameter_count(peer) == ours == pytest.approx(1e6 * millions, rel=1e-3)

  views = {k: torch.empty(v.shape, device="meta") for k, v in tiny.abstract_views(config).items()}
  ours = flops.of_step(program, augment=False)
  assert ours == pytest.approx(config.batch_size * 1e9 * gigas, rel=1e-3)
  assert peers.flops(peer, views) == pytest.approx(ours, rel=0.03)


def test_operations_of_a_step_hold_those_of_its_augmentation_unless_views_are_ready():
  config = tiny.config()
  program = programs.Program(config, devices=jax.devices()[:1])
  batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.batch(config).items()}
  views = flops.of_function(lambda b: augment.make(config.augment)(jax.random.key(0), b), batch)
  assert flops.of_step(program) - flops.of_step(program, augment=False) == views > 0


# One step of both from one state.

_BARLOW = {
  "augment__num_local": 0,
  "head__l2": False,
  "head__norm": "batch",
  "head__activation": "relu",
  "head__bias": False,
  "head__init": "uniform",
  "method__scale": 0.1,
}
_ROWS = {
  "dino": ("dino", "learned", {"optim__clip": 0.02}),
  # The head's batch norm sees four views of the student and two of the teacher.
  "dino_frozen": (
    "dino",
    "learned",
    {
      "optim__freeze_prototypes_steps": 4,
      "head__norm": "batch",
      "head__norm_output": True,
      "head__activation": "leaky_relu",
      "optim__clip": 0.1,
      "optim__clip_mode": "global",
      "optim__decay_prototypes": False,
      "optim__decay_embeddings": False,
    },
  ),
  "barlow_twins": ("barlow_twins", "none", _BARLOW),
}


def _config(row):
  name, prototypes, changes = _ROWS[row]
  if name == "dino":
    changes = {"method__teacher_temp_warmup_epochs": 4, "teacher__momentum": 0.8, **changes}
  return tiny.config(
    name,
    prototypes,
    augment__global_size=32,
    augment__local_size=24,
    steps_per_epoch=2,
    **{"optim__weight_decay": 0.3, **changes},
  )


def _random(tree, rng):
  """No leaf at its start and no two alike; scales are near one, as norms need it."""

  def leaf(path, x):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    x = rng.normal(size=x.shape, scale=0.2).astype(np.float32)
    return x + (name in ("scale", "var"))

  return jax.tree_util.tree_map_with_path(leaf, tree)


def _step_of_ours(config, views):
  """(state 3, with a teacher that is no student and a centre, state 4, loss)."""
  program = programs.Program(config, devices=jax.devices()[:1])
  rng, empty = np.random.default_rng(0), program.abstract
  optimizer = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty.opt_state)
  state = train_step.TrainState(
    step=jnp.int32(_STEP),
    encoder=_random(empty.encoder, rng),
    prototypes=_random(empty.prototypes, rng),
    teacher=_random(empty.teacher, rng),
    carry=_random(empty.carry, rng),
    opt_state=optimizer._replace(step=jnp.int32(_STEP)),
    key=jax.random.key(0),
  )
  step = functools.partial(
    train_step.train_step,
    method=program.method,
    tx=program.tx,
    augment=lambda key, batch: batch["views"],
    evaluation=None,
  )
  batch = {"views": views, "index": np.arange(config.batch_size, dtype=np.int32)}
  after, metrics = jax.jit(step)(state, batch)
  return state, after, metrics["train/loss"]


@pytest.fixture(scope="module", params=_ROWS)
def stepped(request, peers):
  """(config, state before, ours after, our loss, peer after, its loss, parameters before)."""
  import torch

  config = _config(request.param)
  rng = np.random.default_rng(1)
  views = {
    name: rng.normal(size=x.shape).astype(np.float32)
    for name, x in tiny.abstract_views(config).items()
  }
  before, after, ours = _step_of_ours(config, views)
  peer = peers.build(config)
  peers.load(peer, before)
  named = {k: p.detach().numpy().copy() for k, p in peer.student.named_parameters()}
  tensors = {k: torch.from_numpy(v) for k, v in views.items()}
  value = peers.loss(peer, tensors)
  peers.load(peer, before)  # the loss has moved the running statistics
  again = peers.make_step(peer, compiled=False)(tensors)
  assert value.item() == again.item() and peer.step == _STEP + 1
  return config, before, after, float(ours), peer, value.item(), named


def test_loss_of_a_peer_is_ours(stepped):
  *_, ours, _, theirs, _ = stepped
  assert theirs == pytest.approx(ours, rel=1e-4)


def test_a_peer_moves_its_parameters_as_ours(stepped, peers):
  config, before, after, _, peer, _, start = stepped
  rates = peers.rates(config, _STEP)
  moments = peers.arrays(after.opt_state.parts["encoder"][0].mu)
  end = peers.arrays(after.encoder)
  if "prototypes" in after.opt_state.parts:
    moments |= peers.arrays(after.opt_state.parts["prototypes"][0].mu)
    end |= peers.arrays(after.prototypes)
  assert set(end) == set(start)
  frozen = _STEP < config.optim.freeze_prototypes_steps
  # What has no gradient but rounding, as a bias before batch norm, is far below everything else.
  noise = 1e-6 * max(np.abs(x).max() for x in moments.values())
  checked = 0
  for name, parameter in peer.student.named_parameters():
    ours = end[name] - start[name]
    theirs = parameter.detach().numpy() - start[name]
    if name == "v" and frozen:
      assert not ours.any() and not theirs.any()
      continue
    mu = peer.optimizer.state[parameter]["exp_avg"].numpy()
    largest = np.abs(mu).max()
    np.testing.assert_allclose(mu, moments[name], rtol=0, atol=2e-4 * largest + noise, err_msg=name)
    # Adam's first step is a sign: it is only as certain as the gradient is away from 0.
    sure = np.abs(mu) > np.maximum(1e-3 * largest, 10 * noise)
    atol = 2e-3 * rates["lr"]
    np.testing.assert_allclose(ours[sure], theirs[sure], rtol=1e-3, atol=atol, err_msg=name)
    checked += sure.sum()
  assert checked > 0.7 * sum(x.size for x in end.values())


def test_a_peer_moves_its_teacher_centre_and_statistics_as_ours(stepped, peers):
  config, before, after, _, peer, *_ = stepped
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  networks = {"student": peer.student, "teacher": peer.teacher}
  for which, moved in after.carry["batch_stats"].items():
    buffers = dict(networks[which].named_buffers())
    for name, ours in peers.arrays(moved).items():
      close(buffers[name].numpy().reshape(-1, ours.size).mean(axis=0), ours, err_msg=name)
      assert not np.allclose(ours, peers.arrays(before.carry["batch_stats"][which])[name])
  if config.method.name == "barlow_twins":
    assert peer.teacher is None and peer.center is None
    return
  close(peer.center.numpy(), after.carry["center"])
  assert np.abs(after.carry["center"] - before.carry["center"]).mean() > 1e-3
  ours = peers.arrays(after.teacher["encoder"]) | peers.arrays(after.teacher["prototypes"])
  theirs = {k: p.numpy() for k, p in peer.teacher.named_parameters()}
  assert set(ours) == set(theirs)
  for name in ours:
    # A fifth of the way to parameters that the test above compares, up to signs of no gradient.
    close(theirs[name], ours[name], atol=1.1 * peers.rates(config, _STEP)["lr"], err_msg=name)


def test_drop_path_leaves_out_whole_rows_and_ever_more_of_them(peers):
  import torch

  config = tiny.config(prototypes="learned", model__depth=3, model__drop_path=0.5)
  peer = peers.build(config)
  rates = [
    [getattr(net.backbone, f"blocks_{i}").drop_path for i in range(3)]
    for net in (peer.student, peer.teacher)
  ]
  assert rates == [[0.0, 0.25, 0.5], [0.0] * 3]
  torch.manual_seed(0)
  rows = peer.student.backbone.blocks_2._dropped(torch.ones(400, 2, 3)).flatten(1)
  assert (rows == rows[:, :1]).all() and set(rows[:, 0].tolist()) == {0.0, 2.0}
  assert 0.9 < rows.mean() < 1.1


def test_schedules_of_a_peer_are_ours(peers):
  config = tiny.config(
    prototypes="learned",
    num_steps=40,
    optim__warmup_steps=5,
    optim__final_lr=1e-4,
    method__teacher_temp_warmup_epochs=4,
    steps_per_epoch=3,
  )
  options = config.method
  length = {"num_steps": config.num_steps}
  ours = {
    "lr": optim.learning_rate(config, batch_size=config.batch_size, **length),
    "decay": optim.weight_decay(config, **length),
    "pace": schedules.cosine(1 - config.teacher.momentum, 0.0, config.num_steps),
    "temperature": schedules.per_epoch_linear(
      options.teacher_temp_start,
      options.teacher_temp,
      steps_per_epoch=3,
      warmup_epochs=options.teacher_temp_warmup_epochs,
    ),
  }
  steps = jnp.arange(45)
  theirs = [peers.rates(config, step) for step in range(45)]
  for name, schedule in ours.items():
    values = [rate[name] for rate in theirs]
    np.testing.assert_allclose(values, schedule(steps), rtol=1e-5, atol=1e-9, err_msg=name)


def test_a_peer_computes_attention_itself_whoever_does_in_ours(peers):
  config = tiny.config(prototypes="learned", precision="bfloat16", model__attention="cudnn")
  assert peers.parameter_count(peers.build(config, "meta")) > 0


@pytest.mark.parametrize(
  "name, prototypes, change, said",
  [
    ("swav", "learned", {}, "method.name='swav'"),
    ("dino", "mixture", {}, "method.prototypes='mixture'"),
    ("dino", "learned", {"method__targets": "sinkhorn"}, "method.targets='sinkhorn'"),
    ("dino", "learned", {"model__registers": 4}, "model.registers=4"),
    ("dino", "learned", {"method__koleo": 0.1}, "method.koleo=0.1"),
    ("dino", "learned", {"optim__name": "lars"}, "optim.name='lars'"),
    ("barlow_twins", "none", {**_BARLOW, "model__name": "resnet18"}, "model.name='resnet18'"),
  ],
)
def test_a_config_without_a_peer_is_refused_in_one_line(peers, name, prototypes, change, said):
  with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refused:
    peers.build(tiny.config(name, prototypes, **change))
  assert said in str(refused.value)
