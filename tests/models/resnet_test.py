"""ResNets and their batch norm: golden counts, a float64 forward, global statistics."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.models import batch_norm, resnet
from protojax.training import sharding


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def scrambled(tree, scale=0.2):
  """N(0, scale) of our own added to every leaf, so that no bias is 0 and no scale 1."""
  rng = np.random.default_rng(3)
  return jax.tree.map(
    lambda x: jnp.asarray(np.asarray(x) + scale * rng.normal(size=x.shape), x.dtype), tree
  )


def count(net, size):
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, size, size, 3))))
  return sum(x.size for x in jax.tree.leaves(shapes["params"]))


def reference_conv(x, kernel, stride, padding):
  size = kernel.shape[0]
  x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
  windows = windows[:, ::stride, ::stride]  # [N, H, W, C, size, size]
  return np.tensordot(windows, kernel, axes=((3, 4, 5), (2, 0, 1)))


def reference_norm(x, p, views):
  x = x.copy()
  for view in range(views):
    part = x[view::views].reshape(-1, x.shape[-1])
    x[view::views] = (x[view::views] - part.mean(0)) / np.sqrt(part.var(0) + 1e-5)
  return x * p["scale"] + p["bias"]


def reference_resnet(params, x, stages, bottleneck, stem, views):
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  x = np.asarray(x, np.float64)
  stride, padding = {"imagenet": (2, 3), "cifar": (1, 1), "cifar_pad2": (1, 2)}[stem]
  x = reference_conv(x, p["conv1"]["kernel"], stride, padding)
  x = np.maximum(reference_norm(x, p["norm1"], views), 0)
  if stem == "imagenet":
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    x = windows[:, ::2, ::2].max(axis=(4, 5))
  for stage, size in enumerate(stages, start=1):
    for i in range(size):
      block = p[f"stage{stage}_{i}"]
      stride = 2 if stage > 1 and i == 0 else 1
      plan = ((1, 1, 0), (2, stride, 1), (3, 1, 0)) if bottleneck else ((1, stride, 1), (2, 1, 1))
      y = x
      for k, conv_stride, padding in plan:
        y = reference_conv(y, block[f"conv{k}"]["kernel"], conv_stride, padding)
        y = reference_norm(y, block[f"norm{k}"], views)
        if k < len(plan):
          y = np.maximum(y, 0)
      if "conv_shortcut" in block:
        x = reference_conv(x, block["conv_shortcut"]["kernel"], stride, 0)
        x = reference_norm(x, block["norm_shortcut"], views)
      x = np.maximum(x + y, 0)
  return x.mean(axis=(1, 2))


@pytest.mark.parametrize("name, expected", [("resnet18", 11_176_512), ("resnet50", 23_508_032)])
def test_parameter_counts(name, expected):
  assert count(resnet.ResNet(*resnet.VARIANTS[name]), 64) == expected


@pytest.mark.parametrize("width, expected", [(128, 1_037_184), (256, 4_138_752)])
def test_resnet8_parameter_counts(width, expected):
  assert count(resnet.ResNet8(width), 32) == expected


@pytest.mark.parametrize(
  "stages, bottleneck, stem, size, remat",
  [
    ((2, 1), False, "imagenet", 32, False),
    ((1, 2), True, "cifar", 16, False),
    ((1, 1), False, "cifar_pad2", 15, True),
  ],
)
def test_forward_equals_a_float64_reference(stages, bottleneck, stem, size, remat):
  net = resnet.ResNet(stages, bottleneck, stem, remat=remat)
  x = random(6, size, size, 3)
  variables = jax.jit(net.init)(jax.random.key(0), x)
  params = scrambled(variables["params"], 0.05)

  @jax.jit
  def run(params):
    variables_now = {**variables, "params": params}
    return net.apply(variables_now, x, views=2, train=True, mutable=["batch_stats"])[0]

  actual = run(params)
  assert actual.shape == (6, net.feature_dim) and actual.dtype == jnp.float32
  expected = reference_resnet(params, x, stages, bottleneck, stem, views=2)
  np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


def test_resnet8_equals_a_float64_reference():
  net = resnet.ResNet8(width=8)
  x = random(2, 12, 12, 3)
  params = scrambled(jax.jit(net.init)(jax.random.key(0), x)["params"])
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

  def conv(y, name):
    kernel = p[name]["kernel"]
    return reference_conv(y, kernel, 1, kernel.shape[0] // 2) + p[name]["bias"]

  def leaky(y):
    return np.where(y > 0, y, 0.2 * y)

  def pool(y):
    return (y[:, ::2, ::2] + y[:, 1::2, ::2] + y[:, ::2, 1::2] + y[:, 1::2, 1::2]) / 4

  y = np.asarray(x, np.float64)
  main = conv(leaky(conv(y, "block1_conv1")), "block1_conv2")
  y = pool(main) + conv(pool(y), "block1_conv_shortcut")
  for i in (2, 3, 4):
    main = conv(leaky(conv(leaky(y), f"block{i}_conv1")), f"block{i}_conv2")
    y = pool(y) + pool(main) if i == 2 else y + main
  expected = leaky(y).mean(axis=(1, 2))
  np.testing.assert_allclose(net.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


def test_initial_distributions():
  net = resnet.ResNet((1, 1), False, zero_init_residual=True)
  params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  kernel = params["stage2_0"]["conv2"]["kernel"]
  np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 128)), rtol=0.02)
  np.testing.assert_allclose(np.std(params["conv1"]["kernel"]), np.sqrt(2 / (49 * 64)), rtol=0.05)
  for block in ("stage1_0", "stage2_0"):
    np.testing.assert_array_equal(params[block]["norm1"]["scale"], 1.0)
    np.testing.assert_array_equal(params[block]["norm2"]["scale"], 0.0)
  np.testing.assert_array_equal(params["stage2_0"]["norm_shortcut"]["scale"], 1.0)


def test_resnet8_starts_xavier_uniform_with_the_gain_of_each_layer():
  params = jax.jit(resnet.ResNet8(64).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  for name, fan_sum, gain in (
    ("block1_conv1", 9 * 67, 1.0),
    ("block3_conv2", 9 * 128, 2**0.5),
    ("block1_conv_shortcut", 67, 2**0.5),
  ):
    bound = gain * np.sqrt(6 / fan_sum)
    largest = np.abs(params[name]["kernel"]).max()
    assert 0.97 * bound < largest <= bound * (1 + 1e-6)
    np.testing.assert_array_equal(params[name]["bias"], 0.0)


@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("cifar_pad2", 34)])
def test_cifar_stem_keeps_32_pixels_or_pads_them_to_34(stem, size):
  net = resnet.ResNet((1,), False, stem=stem)
  x = jnp.zeros((2, 32, 32, 3))
  variables = jax.eval_shape(lambda: net.init(jax.random.key(0), x))
  _, captured = jax.eval_shape(lambda v: net.apply(v, x, capture_intermediates=True), variables)
  assert captured["intermediates"]["conv1"]["__call__"][0].shape == (2, size, size, 64)


def test_bfloat16_resnet_stays_close_to_float32():
  x = random(8, 16, 16, 3)
  variables = jax.jit(resnet.ResNet((1, 1), False, "cifar").init)(jax.random.key(0), x)
  outputs = []
  for dtype in (jnp.float32, jnp.bfloat16):
    net = resnet.ResNet((1, 1), False, "cifar", dtype=dtype)
    y, stats = net.apply(variables, x, train=True, mutable=["batch_stats"])
    assert {s.dtype for s in jax.tree.leaves((y, stats))} == {jnp.dtype("float32")}
    outputs.append(np.asarray(y))
  assert 0.0 < np.abs(outputs[0] - outputs[1]).max() < 0.05 * outputs[0].max()


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 3, 5)])
@pytest.mark.parametrize("joint", [False, True])
def test_batch_norm_equals_a_float64_reference(shape, joint):
  views = 3
  x = 5.0 + random(*shape) * jnp.arange(1.0, 7.0).reshape(6, *(1,) * (len(shape) - 1))
  layer = batch_norm.BatchNorm(joint=joint)
  variables = layer.init(jax.random.key(0), x)
  variables = {
    "params": scrambled(variables["params"]),
    "batch_stats": scrambled(variables["batch_stats"]),
  }
  y, updated = layer.apply(variables, x, views=views, train=True, mutable=["batch_stats"])

  p, old = jax.tree.map(np.asarray, (variables["params"], variables["batch_stats"]))
  x64, groups = np.asarray(x, np.float64), 1 if joint else views
  np.testing.assert_allclose(y, reference_norm(x64, p, groups), atol=1e-5)
  parts = [x64[view::groups].reshape(-1, 5) for view in range(groups)]
  mean = np.mean([part.mean(0) for part in parts], axis=0)
  var = np.mean([part.var(0, ddof=1) for part in parts], axis=0)
  new = updated["batch_stats"]
  np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-5)
  np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * var, rtol=1e-5)

  y = layer.apply({**variables, "batch_stats": new}, x)
  new = jax.tree.map(np.asarray, new)
  expected = (x64 - new["mean"]) / np.sqrt(new["var"] + 1e-5) * p["scale"] + p["bias"]
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_batch_norm_keeps_small_variances_beside_large_means():
  x = 1000.0 + random(64, 3)
  layer = batch_norm.BatchNorm()
  y, _ = layer.apply(layer.init(jax.random.key(0), x), x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(np.std(y, axis=0), 1.0, atol=1e-3)


@pytest.mark.parametrize("joint", [False, True])
def test_gradients_of_batch_norm_are_finite_differences(joint):
  """Of float64 NumPy; the derivative is written by hand, and has one of its own."""
  views, step = 2, 1e-5
  x, weights = 5.0 + random(6, 2, 1, 3), random(6, 2, 1, 3, seed=1)
  layer = batch_norm.BatchNorm(joint=joint)
  variables = layer.init(jax.random.key(0), x)
  inputs = {"x": x, **scrambled(variables["params"])}
  along = jax.tree.map(lambda leaf: random(*leaf.shape, seed=2), inputs)

  def value(inputs):
    params = {name: inputs[name] for name in ("scale", "bias")}
    changed = {**variables, "params": params}
    y, _ = layer.apply(changed, inputs["x"], views=views, train=True, mutable=["batch_stats"])
    return jnp.vdot(weights, jnp.tanh(y))

  def slope(inputs):
    slopes = jax.tree.map(jnp.vdot, jax.grad(value)(inputs), along)
    return slopes, sum(jax.tree.leaves(slopes))

  (slopes, _), bend = jax.jit(lambda i: (slope(i), jax.grad(lambda j: slope(j)[1])(i)))(inputs)

  at, u, w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (inputs, along, weights))

  def moved(by, names):
    there = {name: at[name] + (by * u[name] if name in names else 0.0) for name in at}
    return np.vdot(w, np.tanh(reference_norm(there["x"], there, 1 if joint else views)))

  for name, found in slopes.items():
    expected = (moved(step, [name]) - moved(-step, [name])) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
  expected = (moved(1e-3, at) - 2.0 * moved(0.0, at) + moved(-1e-3, at)) / 1e-6
  np.testing.assert_allclose(
    sum(jax.tree.leaves(jax.tree.map(np.vdot, bend, u))), expected, rtol=1e-3
  )


def test_batch_norm_keeps_its_input_alone_for_the_backward_pass():
  """In bfloat16, if it comes so: float32 copies of it would fill a device."""
  x = jnp.ones((8, 4, 4, 16), jnp.bfloat16)
  layer = batch_norm.BatchNorm(dtype=jnp.bfloat16)
  variables = layer.init(jax.random.key(0), x)

  def kept(params, x):
    def run(params, x):
      changed = {**variables, "params": params}
      return layer.apply(changed, x, views=2, train=True, mutable=["batch_stats"])

    return jax.tree.leaves(jax.vjp(run, params, x, has_aux=True)[1])

  large = [leaf for leaf in jax.eval_shape(kept, variables["params"], x) if leaf.size >= x.size]
  assert [(leaf.shape, leaf.dtype) for leaf in large] == [(x.shape, x.dtype)]


def test_batch_norm_refuses_rows_that_are_not_whole_images():
  with pytest.raises(ValueError, match="5 rows are not a multiple of 2 views"):
    batch_norm.BatchNorm().init(jax.random.key(0), jnp.zeros((5, 3)), views=2)


def test_batch_norm_over_eight_devices_is_that_of_one():
  """Of a large mean too; and they exchange statistics once, forwards and backwards."""
  x = random(16, 4, 4, 5) * jnp.arange(1.0, 17.0)[:, None, None, None]
  x += jnp.asarray([0.0, 1.0, -30.0, 100.0, 300.0])[None, None, None]
  layer = batch_norm.BatchNorm()
  variables = layer.init(jax.random.key(0), x)

  def run(x):
    return layer.apply(variables, x, views=2, train=True, mutable=["batch_stats"])

  def gradient(x):
    return jax.grad(lambda x: jnp.vdot(random(16, 4, 4, 5, seed=1), run(x)[0]))(x)

  expected = [jax.jit(f)(x) for f in (run, gradient)]
  mesh = sharding.make_mesh(4, 2)
  with jax.set_mesh(mesh):
    for f, exchanges, one in zip((run, gradient), (1, 2), expected, strict=True):
      step = jax.jit(f, in_shardings=sharding.batch_sharding(mesh))
      hlo = step.lower(x).compile().as_text()
      assert len(re.findall(r" all-reduce\(", hlo)) == exchanges and "all-gather" not in hlo
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), step(x), one
      )
