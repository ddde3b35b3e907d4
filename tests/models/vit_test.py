"""ViT: golden counts and position weights, a float64 forward, drop path, sizes, precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from scipy import special

from protojax import errors, placement
from protojax.models import blocks, vit
from protojax.training import sharding

GOLDEN_ROWS = (  # first column, non-zero weights of 14 -> 6
  (0, (0.33562, 0.77522, -0.11084)),
  (1, (-0.00233, 0.04773, 0.99283, -0.03824)),
  (4, (-0.1036, 0.88966, 0.24625, -0.0323)),
  (6, (-0.08723, 0.55036, 0.63634, -0.09947)),
  (8, (-0.0184, 0.16717, 0.93971, -0.08848)),
  (11, (-0.07093, 0.96831, 0.10262)),
)


def small(**options):
  options = {"width": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "image_size": 16} | options
  return vit.ViT(**options)


def random_params(net, scale=0.3):
  """Parameters N(0, scale), around 1 for those of norms, without running the initialisers."""
  x = jnp.zeros((1, net.image_size, net.image_size, 3))
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), x))["params"]
  rng = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(
      scale * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), leaf.dtype
    ),
    shapes,
  )


def images(n=2, height=16, width=None):
  shape = (n, height, width or height, 3)
  return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def init(net, size=16):
  return jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]


def apply(net, params, x):
  return jax.jit(net.apply)({"params": params}, x)


def reference_layer_norm(x, p, eps):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def reference_linear(x, p):
  return x @ p["kernel"] + p["bias"]


def reference_vit(params, x, heads, patch, positions, mask=None, eps=1e-6):
  """All tokens in float64, registers last, a loop per patch and per head; positions [1 + n, D]."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  x = np.asarray(x, np.float64)
  width = p["cls_token"].shape[-1]
  tokens = [np.broadcast_to(p["cls_token"][0, 0], (len(x), width))]
  for i in range(0, x.shape[1], patch):
    for j in range(0, x.shape[2], patch):
      window = x[:, i : i + patch, j : j + patch]
      kernel = p["patch_embed"]["kernel"]
      tokens.append(np.einsum("nijc,ijcd->nd", window, kernel) + p["patch_embed"]["bias"])
  x = np.stack(tokens, axis=1)
  if mask is not None:
    x[:, 1:][mask] = p["mask_token"][0, 0]
  x += positions
  if "registers" in p:
    x = np.concatenate([x, np.repeat(p["registers"], len(x), axis=0)], axis=1)
  for i in range(sum(name.startswith("blocks_") for name in p)):
    block = p[f"blocks_{i}"]
    qkv = reference_linear(reference_layer_norm(x, block["norm1"], eps), block["attn"]["qkv"])
    query, key, value = np.split(qkv, 3, axis=-1)
    outputs = []
    for h in np.split(np.arange(width), heads):
      logits = query[..., h] @ key[..., h].swapaxes(1, 2) / np.sqrt(width / heads)
      outputs.append(special.softmax(logits, axis=-1) @ value[..., h])
    y = reference_linear(np.concatenate(outputs, axis=-1), block["attn"]["proj"])
    x = x + y * block.get("ls1", 1.0)
    y = reference_linear(reference_layer_norm(x, block["norm2"], eps), block["mlp"]["fc1"])
    y = y * 0.5 * (1 + special.erf(y / np.sqrt(2)))
    x = x + reference_linear(y, block["mlp"]["fc2"]) * block.get("ls2", 1.0)
  return reference_layer_norm(x, p["norm"], eps)


@pytest.mark.parametrize(
  "name, expected", [("vit_tiny", 5_524_416), ("vit_small", 21_665_664), ("vit_base", 85_798_656)]
)
def test_parameter_counts(name, expected):
  params = jax.eval_shape(lambda: init(vit.make(name), 224))
  assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_position_weights_have_the_golden_rows():
  weights = vit.position_weights(6, 14)
  expected = np.zeros((6, 14))
  for row, (first, values) in enumerate(GOLDEN_ROWS):
    expected[row, first : first + len(values)] = values
  np.testing.assert_allclose(weights, expected, atol=6e-6)
  np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-12)


@pytest.mark.parametrize(
  "options", [{}, {"registers": 3, "layer_scale": 0.5}, {"remat": True}, {"norm_eps": 0.1}]
)
def test_forward_equals_a_float64_reference(options):
  net = small(**options)
  params = random_params(net)
  positions = np.asarray(params["pos_embed"][0], np.float64)
  eps = options.get("norm_eps", 1e-6)
  expected = reference_vit(params, images(), 3, 4, positions, eps=eps)[:, 0]
  actual = apply(net, params, images())
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, atol=5e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
def test_patch_tokens_equal_a_float64_reference(registers, masked):
  net = small(mask_token=True, registers=registers)
  params, x = random_params(net), images()
  mask = np.random.default_rng(2).uniform(size=(2, 16)) < 0.4
  options = {"mask": jnp.asarray(mask)} if masked else {}
  positions = np.asarray(params["pos_embed"][0], np.float64)
  expected = reference_vit(params, x, 3, 4, positions, mask if masked else None)
  both = jax.jit(lambda p: net.apply({"params": p}, x, patches=True, **options))(params)
  alone = jax.jit(lambda p: net.apply({"params": p}, x, **options))(params)
  assert both[1].shape == (2, 16, 24) and both[1].dtype == jnp.float32
  np.testing.assert_allclose(both[0], expected[:, 0], atol=5e-5)
  np.testing.assert_allclose(both[1], expected[:, 1:17], atol=5e-5)
  np.testing.assert_allclose(alone, both[0], atol=1e-6)


def test_mask_token_starts_at_zero_and_exists_only_where_asked_for():
  params = init(small(mask_token=True))
  np.testing.assert_array_equal(params.pop("mask_token"), np.zeros((1, 1, 24)))
  shapes = jax.tree.map(np.shape, params)
  assert shapes == jax.tree.map(np.shape, init(small()))


@pytest.mark.parametrize(
  "height, width, offset",
  [(8, 8, 0.1), (24, 24, 0.1), (8, 20, 0.1), (16, 24, 0.1), (8, 8, 0.0)],
)
def test_any_image_size_interpolates_the_position_embedding(height, width, offset):
  net = small(position_offset=offset)
  params = random_params(net)
  table = np.asarray(params["pos_embed"][0], np.float64)
  grid = table[1:].reshape(4, 4, 24)
  rows, columns = (vit.position_weights(side // 4, 4, offset) for side in (height, width))
  patches = np.einsum("hi,wj,ijd->hwd", rows, columns, grid).reshape(-1, 24)
  x = images(2, height, width)
  expected = reference_vit(params, x, 3, 4, np.concatenate([table[:1], patches]))[:, 0]
  np.testing.assert_allclose(apply(net, params, x), expected, atol=5e-5)


def test_patch_embedding_equals_a_strided_convolution():
  embed = vit.PatchEmbed(4, 24, jnp.float32)
  x = images(2, 16, 24)
  params = embed.init(jax.random.key(0), x)["params"]
  convolved = jax.lax.conv_general_dilated(
    x, params["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  expected = convolved.reshape(2, 24, 24) + params["bias"][None, None]
  np.testing.assert_allclose(embed.apply({"params": params}, x), expected, atol=1e-5)


def test_initial_distributions():
  params = init(small(width=192, depth=1, patch_size=8, image_size=64, registers=64), 64)
  block = params["blocks_0"]
  for leaf in (
    block["attn"]["qkv"]["kernel"],
    block["attn"]["proj"]["kernel"],
    block["mlp"]["fc1"]["kernel"],
    block["mlp"]["fc2"]["kernel"],
    params["pos_embed"],
    params["registers"],
  ):
    np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.03)
    assert np.abs(leaf).max() > 0.05  # not cut at two deviations
  np.testing.assert_allclose(np.std(params["cls_token"]), 0.02, rtol=0.2)
  bound = (3 * 8 * 8) ** -0.5
  for leaf in params["patch_embed"].values():
    assert np.abs(leaf).max() <= bound
    np.testing.assert_allclose(np.std(leaf), bound / np.sqrt(3), rtol=0.1)
  for leaf in (block["attn"]["qkv"]["bias"], block["mlp"]["fc1"]["bias"], params["norm"]["bias"]):
    np.testing.assert_array_equal(leaf, 0.0)
  assert block["attn"]["qkv"]["kernel"].shape == (192, 576)
  assert params["patch_embed"]["kernel"].shape == (8, 8, 3, 192)


def test_registers_and_layer_scale_add_their_leaves():
  plain = random_params(small())
  params = init(small(registers=4, layer_scale=1e-5))
  assert params["registers"].shape == (1, 4, 24)
  assert params["pos_embed"].shape == plain["pos_embed"].shape == (1, 17, 24)
  np.testing.assert_array_equal(params["blocks_1"]["ls2"], np.full(24, 1e-5, np.float32))
  assert "registers" not in plain and "ls1" not in plain["blocks_0"]


def test_drop_path_rates_grow_linearly_and_hit_both_branches():
  n, rate = 4096, 0.6
  net = vit.ViT(width=4, depth=3, num_heads=1, patch_size=2, image_size=2, drop_path=rate)
  params = random_params(net, 0.0)
  for i in range(3):  # a kept attention branch adds 1 / keep, a kept MLP 10 / keep
    params[f"blocks_{i}"]["attn"]["proj"]["bias"] += 1.0
    params[f"blocks_{i}"]["mlp"]["fc2"]["bias"] += 10.0

  @jax.jit
  def run(params):
    return net.apply(
      {"params": params},
      jnp.zeros((n, 2, 2, 3)),
      train=True,
      rngs={"drop_path": jax.random.key(0)},
      capture_intermediates=lambda module, _: isinstance(module, blocks.Block),
    )

  _, captured = run(params)
  before = np.zeros(n)
  for i, block_rate in enumerate((0.0, 0.3, 0.6)):
    after = np.asarray(captured["intermediates"][f"blocks_{i}"]["__call__"][0])
    assert np.ptp(after, axis=(1, 2)).max() == 0.0  # the whole sample or nothing of it
    keep = 1.0 - block_rate
    added = np.round((after[:, 0, 0] - before) * keep, 3)
    before = after[:, 0, 0]
    assert set(np.unique(added)) <= {0.0, 1.0, 10.0, 11.0}
    attention, mlp = np.isin(added, (1.0, 11.0)), np.isin(added, (10.0, 11.0))
    tolerance = 4 * np.sqrt(keep * block_rate / n)
    np.testing.assert_allclose([attention.mean(), mlp.mean()], keep, atol=tolerance)
    np.testing.assert_allclose((attention & mlp).mean(), keep**2, atol=4 * 0.5 / np.sqrt(n))


def test_drop_path_draws_what_it_has_drawn_before():
  net = vit.ViT(width=4, depth=3, num_heads=1, patch_size=2, image_size=2, drop_path=0.6)
  params = random_params(net, 0.0)
  for i in range(3):  # attention adds 1, the MLP 10, over the share that is kept
    params[f"blocks_{i}"]["attn"]["proj"]["bias"] += 1.0
    params[f"blocks_{i}"]["mlp"]["fc2"]["bias"] += 10.0
  _, captured = net.apply(
    {"params": params},
    jnp.zeros((12, 2, 2, 3)),
    train=True,
    rngs={"drop_path": jax.random.key(5)},
    capture_intermediates=lambda module, _: isinstance(module, blocks.Block),
  )
  after = [captured["intermediates"][f"blocks_{i}"]["__call__"][0][:, 0, 0] for i in range(3)]
  added = np.diff([np.zeros(12), *after], axis=0) * [[1.0], [0.7], [0.4]]
  drawn = [  # pinned, so that a run of before goes on with the same draws
    [11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11],
    [10, 1, 11, 11, 11, 11, 11, 1, 10, 11, 1, 1],
    [11, 10, 11, 11, 10, 10, 0, 10, 11, 0, 10, 0],
  ]
  np.testing.assert_allclose(added, drawn, atol=1e-4)


def test_drop_path_follows_its_key_and_is_off_in_evaluation():
  net = small(drop_path=0.5)
  params, x = random_params(net), images(8)

  @jax.jit
  def run(seed):
    rngs = {"drop_path": jax.random.key(seed)}
    return net.apply({"params": params}, x, train=True, rngs=rngs)

  np.testing.assert_array_equal(run(0), run(0))
  assert np.abs(run(0) - run(1)).max() > 1e-2
  np.testing.assert_array_equal(apply(net, params, x), apply(small(), params, x))


@pytest.mark.parametrize(
  "options", [{"remat": True}, {"scan": True}, {"scan": True, "remat": True}]
)
def test_neither_remat_nor_a_loop_changes_values_or_gradients(options):
  same = {"drop_path": 0.3, "layer_scale": 0.5, "registers": 1, "depth": 3}
  params = random_params(small(**same))

  def run(net):
    def loss(p):
      key = jax.random.key(3)
      y = net.apply({"params": p}, images(6), train=True, rngs={"drop_path": key})
      return y.std(), y

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  plain, other = run(small(**same)), run(small(**same, **options))
  assert jax.tree.structure(plain) == jax.tree.structure(other)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), plain, other)


def test_the_gradient_of_a_loop_is_added_up_over_devices_behind_it():
  """In every turn it would be a message for each kernel of each block."""
  same = {"drop_path": 0.3, "depth": 3}
  params, x = random_params(small(**same)), images(16)

  def run(mesh, scan):
    net = small(scan=scan, **same)

    def loss(p, x):
      y = net.apply({"params": p}, x, train=True, rngs={"drop_path": jax.random.key(3)})
      return jnp.square(y - y.mean(axis=0, keepdims=True)).mean()

    with jax.set_mesh(mesh):
      rows = jax.device_put(x, NamedSharding(mesh, placement.ENCODED))
      compiled = jax.jit(jax.grad(loss)).lower(params, rows).compile()
      return jax.device_get(compiled(params, rows)), compiled.as_text()

  expected, _ = run(sharding.make_mesh(1, 1, jax.devices()[:1]), scan=False)
  for extent in ((8, 1), (2, 4)):
    found, text = run(sharding.make_mesh(*extent), scan=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)
    bodies = re.findall(r"\bbody=%?([\w.-]+)", text)
    parts = dict(re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    assert bodies and not any(" all-reduce(" in parts[body] for body in bodies)
    assert " all-reduce(" in text


def test_a_loop_compiles_one_block_and_stores_its_products_alone():
  net = small(depth=5, scan=True, dtype=jnp.bfloat16)
  params = random_params(net)

  def loss(p):
    return net.apply({"params": p}, images(2)).sum()

  text = str(jax.make_jaxpr(jax.grad(loss))(params))
  assert text.count("erfc") == 2 and text.count("name=hidden") == 1  # forwards and backwards
  stored = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
  of_tokens = [leaf for leaf in stored if leaf.shape[:3] == (5, 2, 17)]
  # The stream before and in the middle of a block; queries, keys, values; attention; hidden layer.
  assert sorted((leaf.shape[3], leaf.dtype.name) for leaf in of_tokens) == [
    (24, "bfloat16"),
    (24, "float32"),
    (24, "float32"),
    (72, "bfloat16"),
    (96, "bfloat16"),
  ]


@pytest.mark.parametrize("scan", [False, True])
def test_the_kernel_of_attention_changes_nothing_where_tokens_fill_no_tile(scan):
  params = random_params(small(registers=3))  # 20 tokens of 24

  def run(**options):
    net = small(registers=3, **options)

    def loss(p):
      y, tokens = net.apply({"params": p}, images(4), patches=True)
      return y.std() + tokens.std(), (y, tokens)

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  expected, found = run(attention="xla"), run(attention="pallas", scan=scan)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected, found)


def test_blocks_of_a_loop_can_be_looked_into():
  params = random_params(small())

  def run(scan):
    return small(scan=scan).apply({"params": params}, images(), capture_intermediates=True)[1]

  one_by_one, looped = run(False), run(True)
  assert "blocks_1" in looped["intermediates"]
  jax.tree.map(np.testing.assert_array_equal, one_by_one, looped)


def test_bfloat16_stays_close_to_float32_and_keeps_float32_parameters():
  net, half = small(width=96), small(width=96, dtype=jnp.bfloat16)
  params = random_params(half, 0.05)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  expected = np.asarray(apply(net, params, images(4)))
  actual = apply(half, params, images(4))
  assert actual.dtype == jnp.float32
  error = np.abs(actual - expected)
  assert error.max() > 0.0  # the products did run in bfloat16
  assert error.mean() < 0.02


def test_image_that_patches_do_not_tile_is_refused_with_the_nearest_size():
  with pytest.raises(errors.UserError, match="18 x 16 pixels.*patches of 4 x 4.*is 16 x 16") as e:
    init_shape = jnp.zeros((1, 18, 16, 3))
    small().init(jax.random.key(0), init_shape)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"width": 100, "num_heads": 3}, "model.width=100.*model.heads=3"),
    ({"drop_path": 1.0}, "model.drop_path=1.0"),
  ],
)
def test_impossible_options_are_refused(options, words):
  with pytest.raises(errors.UserError, match=words):
    vit.make("vit_tiny", **options)
