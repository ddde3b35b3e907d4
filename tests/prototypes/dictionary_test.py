"""Codes and their comparison: geometry, closed forms, published gradients, chunks."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import NamedSharding, PartitionSpec
from sklearn import metrics

from protojax import placement
from protojax.prototypes import dictionary
from protojax.training import sharding

_EPS = 1e-8
compare = jax.jit(dictionary.compare, static_argnames="block")


def _codes(dim, num, seed=0):
  return dictionary.init(jax.random.key(seed), dim, num)["dictionary"]


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _place(z, assign):
  if assign == "tanh":
    return jnp.tanh(z)
  return z * (z.shape[-1] ** 0.5 / jnp.linalg.norm(z, axis=-1, keepdims=True))


def test_codes_are_fair_signs_and_nearly_orthogonal():
  codes = _codes(512, 300)
  assert codes.dtype == jnp.int8 and set(np.unique(codes)) == {-1, 1}
  unit = np.asarray(dictionary.rows(codes), np.float64)
  assert unit.shape == (300, 512)
  np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-6)
  cosines = (unit @ unit.T)[np.triu_indices(300, 1)]
  # Five standard errors, of the sign and of the product of two.
  assert abs(np.asarray(codes, np.float64).mean()) < 5 * codes.size**-0.5
  assert abs(cosines.mean()) < 5 * (512 * cosines.size) ** -0.5
  np.testing.assert_allclose(cosines.var(), 1 / 512, rtol=0.05)


def test_codes_are_a_function_of_the_key_on_any_mesh():
  drawn = dictionary.init(jax.random.key(3), 16, 64)
  again = dictionary.init(drawn["key"], 16, 64)["dictionary"]
  np.testing.assert_array_equal(drawn["dictionary"], again)
  assert np.any(drawn["dictionary"] != _codes(16, 64, seed=4))
  mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.NamedSharding(mesh, jax.P(None, "model"))
  draw = jax.jit(functools.partial(_codes, 16, 64, 3), out_shardings=split)
  np.testing.assert_array_equal(drawn["dictionary"], draw())


@pytest.mark.parametrize("root", [1.0, 1.0 - 2 / 16])
def test_both_optima_over_orthogonal_codes_leave_eps_to_the_others(root):
  """h = a w_j + (a - 1) sum of the others, norm-preserving for both roots a (times sqrt n)."""
  num, dim, eps = 16, 64, 1e-4
  codes = scipy.linalg.hadamard(dim)[:, :num]
  x = root * codes.T + (root - 1.0) * (codes.sum(axis=1)[None] - codes.T)
  np.testing.assert_allclose(np.linalg.norm(x, axis=1), dim**0.5, rtol=1e-12)
  scale = dictionary.inverse_temperature(num, eps)
  p = jax.nn.softmax(scale * dictionary.scores(jnp.int8(codes), jnp.float32(x)))
  expected = np.full((num, num), eps) + (0.9985 - eps) * np.eye(num)
  np.testing.assert_allclose(p, expected, rtol=1e-4)


def _states(assign, codes, seed):
  """Embeddings [64, 2, D] of four states of a training."""
  dim, num = codes.shape
  two = _place(_normal(64, 2, dim, seed=seed), assign)
  own, one = codes.T[jnp.arange(64) % num], jnp.broadcast_to(codes[None, :, 0], (64, dim))
  yield "independent", two
  yield "identical", jnp.stack([two[:, 0]] * 2, axis=1)
  yield "own", jnp.stack([own] * 2, axis=1).astype(jnp.float32)
  yield "one", jnp.stack([one] * 2, axis=1).astype(jnp.float32)


def _measure(assign, dim, num, seed=0):
  """{state: (reverse prior, forward prior, cross entropy of different views)}."""
  codes = _codes(dim, num, seed)
  scale = dictionary.inverse_temperature(num, _EPS) * (8.0 if assign == "tanh" else 1.0)
  out = {}
  for state, x in _states(assign, codes, seed):
    c = compare(codes, x, scale=scale)
    views = (c.cross_entropy[0, 1] + c.cross_entropy[1, 0]) / 2
    out[state] = [np.log(num) - c.mean_entropy.mean(), c.uniform.mean(), views]
  return out


def _assert_near(measured, expected, rtol):
  for state, values in expected.items():
    for value, target in zip(measured[state], values, strict=True):
      np.testing.assert_allclose(value, target, rtol=rtol, atol=0.03 if target < 0.3 else 0.0)


@pytest.mark.parametrize(
  ("assign", "expected"),
  [
    (
      "l2",
      {
        "independent": (0.001, 9.706, 9.786),
        "identical": (0.001, 9.705, 9.621),
        "own": (5.542, 18.28, 0.003),
        "one": (9.701, 18.42, 0.003),
      },
    ),
    (
      "tanh",
      {
        "independent": (0.222, 9.876, 11.79),
        "own": (5.545, 142.6, 0.0),
        "one": (9.704, 147.3, 0.0),
      },
    ),
  ],
)
def test_terms_of_known_states_at_2048_dimensions_and_16384_codes(assign, expected):
  """Independently computed for random batch-normed outputs and a batch of 64."""
  _assert_near(_measure(assign, 2048, 16_384), expected, rtol=0.02)


def test_terms_of_known_states_at_128_dimensions():
  """The wide dictionary once; 10 codes as the mean of 20 draws, which vary much."""
  _assert_near(_measure("l2", 128, 16_384), {"independent": (0.072, 9.771, 11.03)}, rtol=0.02)
  draws = [_measure("l2", 128, 10, seed) for seed in range(20)]
  mean = {state: np.mean([d[state] for d in draws], axis=0) for state in draws[0]}
  expected = {"independent": (0.018, 2.32, 3.36), "own": (0.003, 2.305, 0.0),
              "one": (2.303, 16.26, 0.0)}  # fmt: skip
  _assert_near(mean, expected, rtol=0.05)


def test_gradients_are_the_published_formulas():
  """In the scores: codes that are an identity matrix, at a scale of K, make them the embedding."""
  num, batch = 7, 5
  with jax.enable_x64(True):
    z = 2.0 * np.random.default_rng(1).normal(size=(batch, 2, num))
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    log_p, log_mean = np.log(p), np.log(p.mean(axis=0))

    def gradient(term):
      def value(z):
        return term(dictionary.compare(jnp.eye(num, dtype=jnp.int8), z, scale=float(num)))

      return np.asarray(jax.grad(value)(jnp.asarray(z)))

    def centred(p, values):
      return p * (values - (p * values).sum(axis=-1, keepdims=True))

    cross = gradient(lambda c: c.cross_entropy[0, 1])
    np.testing.assert_allclose(cross[:, 0], (p[:, 0] - p[:, 1]) / batch, atol=1e-12)
    np.testing.assert_allclose(cross[:, 1], -centred(p[:, 1], log_p[:, 0]) / batch, atol=1e-12)
    reverse = gradient(lambda c: -c.mean_entropy.sum())
    np.testing.assert_allclose(reverse, centred(p, log_mean[None]) / batch, atol=1e-12)
    forward = gradient(lambda c: c.uniform.sum())
    share = p / p.sum(axis=0, keepdims=True)
    expected = p * share.mean(axis=-1, keepdims=True) - share / num
    np.testing.assert_allclose(forward, expected, atol=1e-12)


@functools.partial(jax.jit, static_argnames="block")
def _value_and_gradient(codes, x, *, block, scale):
  """All terms in one number, each with a weight of its own; and the gradient in x."""

  def value(x):
    c = dictionary.compare(codes, x, scale=scale, block=block)
    weights = jnp.arange(1.0, 1.0 + c.cross_entropy.size).reshape(c.cross_entropy.shape)
    return jnp.sum(weights * c.cross_entropy) - 3.0 * c.mean_entropy[0] + 2.0 * c.uniform[1]

  return jax.value_and_grad(value)(x)


@pytest.mark.parametrize(("assign", "scale"), [("l2", 18.42), ("tanh", 147.4)])
def test_chunks_change_neither_value_nor_gradient(assign, scale):
  codes, x = _codes(16, 24), _place(_normal(6, 4, 16), assign)
  value, gradient = _value_and_gradient(codes, x, block=0, scale=scale)
  for block in (1, 8, 24):
    other, other_gradient = _value_and_gradient(codes, x, block=block, scale=scale)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    gap = np.linalg.norm(other_gradient - gradient) / np.linalg.norm(gradient)
    assert gap < 1e-5
  assert np.linalg.norm(gradient) > 0.1


def test_devices_compare_chunks_alone_and_add_up_once():
  """On two groups of four: no exchange in a loop, and no more of them for more chunks."""
  codes, x = _codes(16, 88), _place(_normal(16, 3, 16), "l2")
  value, gradient = _value_and_gradient(codes, x, block=0, scale=18.4)
  mesh = sharding.make_mesh(2, 4)
  specs = (PartitionSpec(None, "model"), placement.COMPARED)
  placed = [
    jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((codes, x), specs, strict=True)
  ]
  with jax.set_mesh(mesh):
    step = _value_and_gradient.lower(*placed, block=2, scale=18.4).compile()
    other, other_gradient = step(*placed, scale=18.4)
  exchanges = [line for line in step.as_text().splitlines() if re.search(r"all-\w+\(", line)]
  assert len(exchanges) <= 8 and not any("while/body" in line for line in exchanges)
  np.testing.assert_allclose(other, value, rtol=1e-5)
  np.testing.assert_allclose(other_gradient, gradient, atol=1e-5 * np.abs(gradient).max())


def test_chunks_bound_the_memory_of_the_gradient():
  codes, x = _codes(16, 4096), _normal(32, 2, 16)

  def bytes_needed(block):
    lowered = _value_and_gradient.lower(codes, x, block=block, scale=1.0)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  scores = 32 * 2 * 4096 * 4
  assert bytes_needed(0) > scores > 2 * bytes_needed(64)


@pytest.mark.parametrize("block", [0, 16])
def test_certain_assignments_are_finite_however_wrong(block):
  """At a scale of 147 every probability but one underflows; views agree, differ or all collapse."""
  codes = _codes(64, 32)
  agree = jnp.stack([codes.T[:8]] * 2, axis=1)
  differ = jnp.stack([codes.T[:8], codes.T[8:16]], axis=1)
  collapse = jnp.broadcast_to(codes[None, None, :, 0], (8, 2, 64))
  assert np.exp(np.float32(-147.4)) == 0.0
  for x in (agree, differ, collapse):
    x = x.astype(jnp.float32)
    value, gradient = _value_and_gradient(codes, x, block=block, scale=147.4)
    assert np.isfinite(value) and np.isfinite(gradient).all()
  assert float(compare(codes, differ, scale=147.4).cross_entropy[1, 0]) > 50.0


def test_order_of_codes_and_copies_of_the_batch_do_not_matter():
  codes, x = _codes(16, 40), _place(_normal(6, 3, 16), "l2")
  expected = compare(codes, x, scale=18.4)
  order = np.random.default_rng(0).permutation(40)
  chex.assert_trees_all_close(compare(codes[:, order], x, scale=18.4), expected, rtol=1e-5)
  twice = jnp.concatenate([x, x])
  chex.assert_trees_all_close(compare(codes, twice, scale=18.4), expected, rtol=1e-5)


def test_bfloat16_embeddings_are_compared_in_float32():
  codes, x = _codes(64, 40), _place(_normal(6, 2, 64), "l2").astype(jnp.bfloat16)
  low, full = (compare(codes, v, scale=18.4) for v in (x, x.astype(jnp.float32)))
  chex.assert_trees_all_equal(low, full)
  assert {leaf.dtype for leaf in low} == {jnp.dtype("float32")}


# Test images of each class.
SVHN = (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595)
CIFAR10, CIFAR100 = (1000,) * 10, (100,) * 100


# More clusters than images are meant: scikit-learn up to 1.7 takes them for a regression.
@pytest.mark.filterwarnings("ignore:The number of unique classes:UserWarning")
@pytest.mark.parametrize(
  ("sizes", "chance", "alone"),
  [
    (SVHN, {10: 0.001, 100: 0.005, 1000: 0.042, 2048: 0.085, 4096: 0.141, 16_384: 0.262}, 0.359),
    (CIFAR10, {10: 0.002, 100: 0.013, 1000: 0.113, 2048: 0.185, 4096: 0.258, 16_384: 0.353}, 0.400),
    (
      CIFAR100,
      {10: 0.013, 100: 0.122, 1000: 0.404, 2048: 0.486, 4096: 0.551, 16_384: 0.631},
      0.667,
    ),
  ],
)
def test_random_codes_of_many_clusters_have_high_nmi_and_no_ami(sizes, chance, alone):
  """Chance on the test splits of SVHN and CIFAR: NMI grows with the clusters, AMI does not."""
  labels, rng = np.repeat(np.arange(len(sizes)), sizes), np.random.default_rng(0)
  for num, nmi in chance.items():
    codes = rng.integers(num, size=len(labels))
    np.testing.assert_allclose(metrics.normalized_mutual_info_score(labels, codes), nmi, atol=0.005)
    if num in (100, 16_384):  # the expectation takes seconds
      assert abs(metrics.adjusted_mutual_info_score(labels, codes)) < 0.005
  every = metrics.normalized_mutual_info_score(labels, np.arange(len(labels)))
  np.testing.assert_allclose(every, alone, atol=0.001)


@pytest.mark.filterwarnings("ignore:The number of unique classes:UserWarning")
def test_chance_falls_with_more_images_to_a_code():
  """16,384 clusters on the train splits of SVHN, CIFAR-10 and CIFAR-100."""
  svhn = (4948, 13_861, 10_585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)
  for sizes, nmi in ((svhn, 0.159), ((5000,) * 10, 0.204), ((500,) * 100, 0.471)):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    codes = np.random.default_rng(0).integers(16_384, size=len(labels))
    score = metrics.normalized_mutual_info_score(labels, codes)
    np.testing.assert_allclose(score, nmi, atol=0.001)


def test_nearest_codes_of_noise_score_as_chance():
  labels = np.repeat(np.arange(10), 1000)
  nearest = jnp.argmax(dictionary.scores(_codes(64, 1000), _normal(10_000, 64)), axis=-1)
  nmi = metrics.normalized_mutual_info_score(labels, np.asarray(nearest))
  assert 0.09 < nmi < 0.12
  assert abs(metrics.adjusted_mutual_info_score(labels, np.asarray(nearest))) < 0.005
