"""Encoder: building from a config, multi-crop, microbatches, batch statistics, sharding."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protojax import errors
from protojax.models import encoder as encoder_lib
from protojax.models import heads, resnet

VIT = {"name": "vit_tiny", "patch_size": 4, "image_size": 16, "width": 24, "depth": 2, "heads": 3}


def make_config(model, head=None, **rest):
  head = {"layers": 2, "hidden": 16, "bottleneck": 6, "norm": "none", "l2": True} | (head or {})
  return ml_collections.ConfigDict({"model": model, "head": head, **rest})


def build(model=None, head=None, mask_token=False, **rest):
  return encoder_lib.build(make_config(VIT | (model or {}), head, **rest), mask_token=mask_token)


def small_resnet(head_norm="none"):
  head = heads.Projector(layers=2, hidden=16, bottleneck=6, norm=head_norm)
  return encoder_lib.Encoder(resnet.ResNet((1, 1), False, "cifar"), head)


@functools.cache
def init(encoder):
  """Parameters and statistics in the shapes of `encoder_lib.init`, with values of our own."""
  params, stats = jax.eval_shape(lambda: encoder_lib.init(encoder, jax.random.key(0), 16))
  rng = np.random.default_rng(0)

  def value(path, leaf):
    around = path[-1].key in ("scale", "var")
    return jnp.asarray(around + 0.1 * rng.uniform(-1, 1, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(value, (params, stats))


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_views(batch=4, size=16, local=8):
  return {
    "global": random(batch, 2, size, size, 3),
    "local": random(batch, 3, local, local, 3, seed=1),
  }


embed = jax.jit(encoder_lib.embed, static_argnames=("encoder", "train", "accum_steps", "patches"))
features = jax.jit(encoder_lib.features, static_argnames="encoder")


def assert_close(a, b, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=atol), a, b)


@pytest.mark.parametrize(
  "name, feature_dim, has_batch_norm",
  [
    ("vit_tiny", 192, False),
    ("vit_small", 384, False),
    ("vit_base", 768, False),
    ("resnet8", 128, False),
    ("resnet18", 512, True),
    ("resnet50", 2048, True),
  ],
)
def test_a_name_is_enough(name, feature_dim, has_batch_norm):
  config = ml_collections.ConfigDict({"model": {"name": name, "width": None}})
  encoder = encoder_lib.build(config)
  assert encoder_lib.feature_dim(encoder) == feature_dim
  assert encoder_lib.has_batch_norm(encoder) == has_batch_norm
  params, stats = jax.eval_shape(lambda: encoder_lib.init(encoder, jax.random.key(0), 32))
  assert set(params) == {"backbone", "head"}
  assert set(stats) == ({"backbone"} if has_batch_norm else set())
  assert params["head"]["fc3"]["kernel"].shape == (2048, 256)


def test_every_field_reaches_its_module():
  encoder = build(
    {"drop_path": 0.2, "registers": 2, "layer_scale": 1e-4, "remat": True, "scan": True},
    {"layers": 4, "norm": "batch", "l2": False},
    precision="bfloat16",
  )
  net, head = encoder
  assert (net.width, net.depth, net.num_heads, net.patch_size, net.image_size) == (24, 2, 3, 4, 16)
  assert (net.drop_path, net.registers, net.layer_scale) == (0.2, 2, 1e-4)
  assert net.remat and net.scan and net.attention == "auto"
  assert (head.layers, head.hidden, head.bottleneck, head.norm, head.l2) == (4, 16, 6, "batch", 0)
  assert net.dtype == head.dtype == jnp.bfloat16
  assert build({"layer_scale": 0.0}).backbone.layer_scale is None
  net = build(
    {
      "name": "resnet18",
      "stem": "cifar",
      "zero_init_residual": True,
      "joint_norm": True,
      "remat": True,
    }
  ).backbone
  assert (net.stem, net.zero_init_residual, net.joint_norm, net.remat) == ("cifar", 1, 1, 1)


@pytest.mark.parametrize(
  "model, head, rest, words",
  [
    ({"name": "vit_huge"}, {}, {}, "model.name='vit_huge'.*vit_tiny, vit_small.*resnet50"),
    ({"name": "resnet18", "stem": "mnist"}, {}, {}, "model.stem='mnist'.*cifar, cifar_pad2"),
    ({}, {"norm": "layer"}, {}, "head.norm='layer'.*none, batch"),
    ({}, {"layers": 0}, {}, "head.layers=0"),
    ({}, {}, {"precision": "float16"}, "precision='float16'.*float32, bfloat16"),
    ({"attention": "flash"}, {}, {}, "model.attention='flash'.*auto, xla, cudnn, pallas"),
    ({"attention": "cudnn"}, {}, {"precision": "bfloat16"}, "an NVIDIA GPU .* not cpu and bf"),
  ],
)
def test_unknown_names_are_refused_with_those_available(model, head, rest, words):
  with pytest.raises(errors.UserError, match=words):
    build(model, head, **rest)


def test_views_come_back_in_order_whatever_their_resolution():
  encoder = build()
  params, stats = init(encoder)
  views = make_views()
  (z, y, patches), _ = embed(encoder, params, stats, views, train=False)
  assert z.shape == (4, 5, 6) and z.dtype == jnp.float32 and patches is None
  for b, v in ((0, 0), (3, 1), (2, 2), (1, 4)):
    crop = views["global"][b, v] if v < 2 else views["local"][b, v - 2]
    feature = features(encoder, params, stats, crop[None])
    np.testing.assert_allclose(y[b, v], feature[0], atol=1e-5)
    expected = encoder.head.apply({"params": params["head"]}, feature)[0]
    np.testing.assert_allclose(z[b, v], expected, atol=1e-5)
  (only_global, *_), _ = embed(encoder, params, stats, {"global": views["global"]}, train=False)
  np.testing.assert_allclose(only_global, z[:, :2], atol=1e-6)


def masked_views(batch=4):
  mask = np.random.default_rng(3).uniform(size=(batch, 2, 16)) < 0.4
  return make_views(batch) | {"mask": jnp.asarray(mask)}


def test_patch_tokens_of_global_views_pass_the_same_head():
  encoder = build(mask_token=True)
  params, stats = init(encoder)
  views = masked_views()
  (z, _, patches), _ = embed(encoder, params, stats, views, train=False, patches=True)
  assert z.shape == (4, 5, 6) and patches.shape == (4, 2, 16, 6)
  for b, v in ((0, 0), (3, 1)):
    tokens = encoder.backbone.apply(
      {"params": params["backbone"]},
      views["global"][b, v][None],
      mask=views["mask"][b, v][None],
      patches=True,
    )
    for actual, token in zip((z[b, v], patches[b, v]), tokens, strict=True):
      expected = encoder.head.apply({"params": params["head"]}, token[0].reshape(-1, 24))
      np.testing.assert_allclose(actual.reshape(expected.shape), expected, atol=1e-5)
  (alone, *_), _ = embed(encoder, params, stats, views, train=False)
  np.testing.assert_allclose(alone, z, atol=1e-6)
  some = views | {"hidden": jnp.asarray(np.random.default_rng(4).integers(0, 16, (4, 2, 3)))}
  (_, _, few), _ = embed(encoder, params, stats, some, train=False, patches=True)
  expected = np.take_along_axis(np.asarray(patches), np.asarray(some["hidden"])[..., None], 2)
  np.testing.assert_allclose(few, expected, atol=1e-6)


def test_hidden_patches_are_not_seen_and_local_views_are_not_masked():
  encoder = build(mask_token=True)
  params, stats = init(encoder)
  views = masked_views()
  hidden = views["mask"].reshape(4, 2, 4, 1, 4, 1, 1)
  blocks = views["global"].reshape(4, 2, 4, 4, 4, 4, 3)
  other = jnp.where(hidden, 100.0, blocks).reshape(views["global"].shape)
  a, b = (
    embed(encoder, params, stats, v, train=False, patches=True)[0]
    for v in (views, views | {"global": other})
  )
  assert_close(a, b, atol=0)
  bare = {name: views[name] for name in ("global", "local")}
  (z, *_), _ = embed(encoder, params, stats, bare, train=False, patches=True)
  np.testing.assert_allclose(a.z[:, 2:], z[:, 2:], atol=1e-6)
  assert np.abs(a.z[:, :2] - z[:, :2]).max() > 1e-3


@pytest.mark.parametrize(
  "model, head",
  [
    ({"name": "resnet18"}, {}),
    ({"name": "resnet8"}, {}),
    ({}, {"norm": "batch"}),
    ({}, {"norm_output": True}),
  ],
)
def test_masks_need_a_transformer_without_batch_norm(model, head):
  with pytest.raises(errors.UserError, match="masked patches need a transformer and .* set model."):
    build(model, head, mask_token=True)


def test_each_resolution_drops_other_paths():
  encoder = build({"drop_path": 0.5})
  params, stats = init(encoder)
  same = random(8, 1, 16, 16, 3)
  views = {"global": same, "local": same}
  (z, *_), _ = embed(encoder, params, stats, views, train=True, key=jax.random.key(0))
  assert np.abs(z[:, 0] - z[:, 1]).max() > 1e-2
  (z, *_), _ = embed(encoder, params, stats, views, train=False)
  np.testing.assert_allclose(z[:, 0], z[:, 1], atol=1e-6)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_microbatches_drop_other_paths_and_else_change_nothing(drop_path):
  encoder = build({"drop_path": drop_path})
  params, stats = init(encoder)
  views = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (4, *x.shape[1:])), make_views())
  (z, *_), _ = embed(
    encoder, params, stats, views, train=True, key=jax.random.key(0), accum_steps=4
  )
  assert (np.ptp(z, axis=0).max() > 1e-2) == (drop_path > 0)


@pytest.mark.parametrize("patches", [False, True])
def test_microbatches_equal_the_whole_batch_in_values_and_gradients(patches):
  encoder = build({"depth": 1}, mask_token=patches)
  params, stats = init(encoder)
  views, weights = masked_views(8) if patches else make_views(8), random(8, 15, 6, seed=5)
  if patches:
    views["hidden"] = jnp.argsort(~views["mask"], axis=-1)[..., :5]

  def loss(params, k):
    out, new = embed(encoder, params, stats, views, train=True, accum_steps=k, patches=patches)
    assert new == {}
    tokens = [out.z, out.patches] if patches else [out.z]
    rows = jnp.concatenate([x.reshape(8, -1, 6) for x in tokens], axis=1)
    return jnp.mean(rows * weights[:, : rows.shape[1]]) + jnp.mean(jnp.sin(out.features)), out

  step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  assert_close(step(params, 4), step(params, 1))


@pytest.mark.parametrize("encoder", [small_resnet(), build(head={"norm": "batch"})])
def test_microbatches_refuse_batch_norm(encoder):
  views = {"global": jnp.zeros((4, 2, 16, 16, 3))}
  params, stats = init(encoder)
  with pytest.raises(errors.UserError, match="batch norm the statistics of a microbatch"):
    embed(encoder, params, stats, views, train=True, accum_steps=2)


def test_microbatches_refuse_a_batch_they_do_not_divide():
  encoder = build()
  params, stats = init(encoder)
  with pytest.raises(errors.UserError, match="accum_steps=3 does not divide the batch of 4"):
    embed(encoder, params, stats, make_views(), train=True, accum_steps=3)


def test_batch_statistics_move_in_training_only_and_are_read_by_features():
  encoder = small_resnet("batch")
  params, stats = init(encoder)
  assert set(stats) == {"backbone", "head"}
  views = make_views()
  _, new = embed(encoder, params, stats, views, train=True)
  assert jax.tree.structure(new) == jax.tree.structure(stats)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), new, stats)
  assert min(jax.tree.leaves(moved)) > 0.0
  _, same = embed(encoder, params, new, views, train=False)
  assert_close(same, new, atol=0)
  images = views["global"][:, 0]
  one = features(encoder, params, new, images[:1])
  np.testing.assert_allclose(one, features(encoder, params, new, images)[:1], rtol=1e-4, atol=1e-5)
  assert np.abs(one - features(encoder, params, stats, images[:1])).max() > 1e-3


def test_batch_norm_sees_each_view_alone():
  encoder = small_resnet("batch")
  params, stats = init(encoder)
  views = make_views(6)
  other = {"global": views["global"].at[0, 1].multiply(3.0), "local": views["local"]}
  (z, *_), _ = embed(encoder, params, stats, views, train=True)
  (changed, *_), _ = embed(encoder, params, stats, other, train=True)
  rest = np.array([0, 2, 3, 4])
  np.testing.assert_allclose(changed[:, rest], z[:, rest], atol=1e-5)
  assert np.abs(changed[1:, 1] - z[1:, 1]).max() > 1e-3  # other images, the same view


@pytest.mark.parametrize(
  "encoder, accum_steps",
  [
    (build({"drop_path": 0.3, "registers": 1}), 1),
    (build({"depth": 1, "remat": True}), 2),
    (small_resnet("batch"), 1),
  ],
)
def test_eight_devices_equal_one_and_gather_nothing(encoder, accum_steps):
  params, stats = init(encoder)
  views = make_views(16, size=8, local=4) if stats else make_views(16)
  weights = random(16, 5, 6, seed=5)

  def loss(params, views):
    (z, *_), new = embed(
      encoder, params, stats, views, train=True, key=jax.random.key(7), accum_steps=accum_steps
    )
    return jnp.mean(z * weights), (z, new)

  step = jax.value_and_grad(loss, has_aux=True)
  mesh = jax.make_mesh((8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  data, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
  compiled = jax.jit(step, in_shardings=(replicated, data)).lower(params, views).compile()
  hlo = compiled.as_text()
  assert "all-reduce" in hlo
  for op in ("all-gather", "all-to-all", "collective-permute"):
    assert op not in hlo
  sharded = compiled(jax.device_put(params, replicated), jax.device_put(views, data))
  ((value, (z, new)), grads), ((value_1, (z_1, new_1)), grads_1) = (
    sharded,
    jax.jit(step)(params, views),
  )
  assert_close((value, z, new), (value_1, z_1, new_1), atol=1e-5)
  assert_close(grads, grads_1, atol=1e-4)


def test_an_encoder_for_evaluation_differs_in_nothing_else():
  config = make_config(VIT | {"drop_path": 0.3, "remat": True, "attention": "cudnn"})
  before = config.to_dict()
  teacher, evaluated = encoder_lib.without_drop_path(config), encoder_lib.for_evaluation(config)
  assert config.to_dict() == before
  assert teacher.to_dict() == before | {"model": before["model"] | {"drop_path": 0.0}}
  changed = {"drop_path": 0.0, "remat": False, "attention": "xla"}
  assert evaluated.to_dict() == before | {"model": before["model"] | changed}
