import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.metrics import collapse, pairwise


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _angles(*degrees):
  """Rows in the plane at these angles, of different norms."""
  a = np.deg2rad(np.asarray(degrees, np.float64))
  return np.stack([np.cos(a), np.sin(a)], axis=1) * np.arange(1, len(degrees) + 1)[:, None]


def test_all_partners_count_and_some_estimate_the_same_number():
  """Groups of 1 to 20 copies: a plain count among the sample would find them unique."""
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 21, size=190)
  rows = np.repeat(rng.normal(size=(190, 64)), sizes, axis=0)
  rows = rows * rng.uniform(0.5, 2, (len(rows), 1))
  rows = rows[rng.permutation(len(rows))].astype(np.float32)
  every = collapse.partners(rows)
  assert (every.num, every.looked) == (len(rows), len(rows))
  np.testing.assert_array_equal(every.unique, 190)
  np.testing.assert_array_equal(every.nearest, pairwise.nearest_distances(rows))
  chosen = np.arange(400) * len(rows) // 400
  some = collapse.partners(rows, 400)
  assert (some.num, some.looked) == (len(rows), 400)
  near = _unit(rows[chosen].astype(np.float64)) @ _unit(rows.astype(np.float64)).T > 1 - 0.025
  np.testing.assert_allclose(some.unique[0], len(rows) * np.mean(1 / near.sum(1)), rtol=1e-5)
  np.testing.assert_allclose(some.unique, 190, atol=len(rows) / 2 / np.sqrt(400))
  np.testing.assert_allclose(some.nearest, every.nearest[chosen], atol=1e-6)
  rows[chosen[5]] = 0.0  # no direction, no prototype
  rows[chosen[7]] = rows[chosen[6]]
  assert collapse.partners(rows, 400).unique[0] < some.unique[0]


def test_the_random_value_of_some_is_what_random_prototypes_are_expected_to_get():
  num, dim, thresholds = 400, 6, (0.025, 0.1, 0.25, 0.5)
  expected = collapse.partners(np.eye(num, dim, dtype=np.float32), 10, thresholds).random
  draws = []
  for seed in range(12):
    rows = _unit(np.random.default_rng(seed).normal(size=(num, dim)))
    cosine = rows @ rows.T
    draws.append([np.sum(1 / np.sum(cosine > 1 - t, axis=1)) for t in thresholds])
  np.testing.assert_allclose(expected, np.mean(draws, axis=0), rtol=0.02)
  roomy = collapse.partners(np.eye(num, 256, dtype=np.float32), 10, (0.025, 0.25)).random
  np.testing.assert_allclose(roomy, num, rtol=1e-9)


def test_relative_uniqueness_tells_a_narrow_cone_from_copies():
  rng = np.random.default_rng(0)
  offset = 20.0 * np.eye(64)[0]
  cone = (rng.normal(size=(128, 64)) + offset).astype(np.float32)
  features = (rng.normal(size=(900, 64)) + offset).astype(np.float32)
  copies = np.repeat(cone[:16], 8, axis=0)
  counted = pairwise.unique_counts(np.concatenate([cone, copies]), (0.25,))[0]
  assert counted == 1  # the cover alone sees no difference
  assert collapse.relative_uniqueness(cone, features) > 0.8
  assert collapse.relative_uniqueness(copies, features) < 1e-3

  def distances(a, b):
    return 1.0 - _unit(a.astype(np.float64)) @ _unit(b.astype(np.float64)).T

  among = distances(cone, cone)
  np.fill_diagonal(among, np.inf)
  expected = np.median(among.min(1)) / np.median(distances(features, cone).min(1))
  np.testing.assert_allclose(collapse.relative_uniqueness(cone, features), expected, rtol=1e-3)


def test_drift_is_the_mean_cosine_to_the_start():
  start = _angles(0, 0, 0)
  np.testing.assert_allclose(collapse.drift(start, start), 1.0, rtol=1e-6)
  np.testing.assert_allclose(
    collapse.drift(_angles(0, 90, 180), start), 0.0, atol=1e-6
  )  # (1 + 0 - 1) / 3


def test_usage_of_one_code_of_all_codes_and_of_some():
  assert collapse.usage_perplexity(np.full(50, 3), 16) == 1.0
  np.testing.assert_allclose(collapse.used_fraction(np.full(50, 3), 16), 1 / 16)
  np.testing.assert_allclose(collapse.usage_perplexity(np.arange(48) % 16, 16), 16.0, rtol=1e-6)
  assert collapse.used_fraction(np.arange(48) % 16, 16) == 1.0
  p = np.array([0.5, 0.25, 0.25])
  np.testing.assert_allclose(
    collapse.usage_perplexity(np.array([0, 0, 5, 7]), 9), np.exp(-(p * np.log(p)).sum()), rtol=1e-6
  )
  np.testing.assert_allclose(collapse.used_fraction(jnp.array([0, 0, 5, 7]), 9), 3 / 9, rtol=1e-6)


def test_entropies_separate_one_hot_uniform_and_balanced():
  num = 8
  one_code = np.eye(num)[np.zeros(40, int)]
  balanced = np.eye(num)[np.arange(40) % num]
  uniform = np.full((40, num), 1 / num)
  for probs, mean, each in (
    (one_code, 0.0, 0.0),
    (balanced, np.log(num), 0.0),
    (uniform, np.log(num), np.log(num)),
  ):
    np.testing.assert_allclose(collapse.mean_assignment_entropy(probs), mean, atol=1e-6)
    np.testing.assert_allclose(collapse.assignment_entropy(probs), each, atol=1e-6)


def test_within_variance_ratio_matches_numpy_and_is_zero_for_points():
  rng = np.random.default_rng(0)
  z, code = rng.normal(size=(300, 5)) + 3, rng.integers(6, size=300)
  total = ((z - z.mean(0)) ** 2).sum()
  within = sum(((z[code == k] - z[code == k].mean(0)) ** 2).sum() for k in range(6))
  np.testing.assert_allclose(collapse.within_variance_ratio(z, code, 9), within / total, rtol=1e-5)
  points = rng.normal(size=(6, 5))[code]
  np.testing.assert_allclose(collapse.within_variance_ratio(points, code, 6), 0.0, atol=1e-6)
  assert collapse.within_variance_ratio(np.ones((10, 3)), np.zeros(10, int), 2) == 0.0


def test_feature_std_is_one_for_random_and_zero_for_equal_directions():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(4000, 48))
  np.testing.assert_allclose(collapse.feature_std(z), 1.0, atol=0.01)
  np.testing.assert_allclose(
    collapse.feature_std(z), _unit(z).std(axis=0).mean() * 48**0.5, rtol=1e-4
  )
  ray = np.ones((20, 48)) * rng.uniform(1, 5, (20, 1))
  np.testing.assert_allclose(collapse.feature_std(ray), 0.0, atol=1e-5)


def test_mean_pairwise_cosine_is_the_mean_over_pairs():
  z = np.random.default_rng(0).normal(size=(50, 6)) + 0.5
  cosine = _unit(z) @ _unit(z).T
  expected = cosine[~np.eye(50, dtype=bool)].mean()
  np.testing.assert_allclose(collapse.mean_pairwise_cosine(z), expected, rtol=1e-4)
  np.testing.assert_allclose(collapse.mean_pairwise_cosine(np.ones((9, 4))), 1.0, rtol=1e-6)


@pytest.mark.parametrize(("num", "piece"), [(12, 64), (500, 500), (500, 64), (500, 499)])
def test_spectrum_is_the_sorted_eigenvalues_of_the_covariance(num, piece, monkeypatch):
  monkeypatch.setattr(collapse, "_PIECE", piece)
  z = np.random.default_rng(0).normal(size=(num, 20)) * np.linspace(0.1, 2, 20) + 5
  expected = np.sort(np.linalg.eigvalsh(np.cov(z.T, bias=True)))[::-1]
  got = collapse.spectrum(z)
  assert got.shape == (20,)
  np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_rankme_matches_the_published_formula():
  z = np.random.default_rng(0).normal(size=(400, 24)) * np.geomspace(1, 0.01, 24) + 0.3
  s = np.linalg.svd(z, compute_uv=False)
  p = s / s.sum() + 1e-7
  np.testing.assert_allclose(collapse.rankme(z), np.exp(-(p * np.log(p)).sum()), rtol=1e-4)


def test_rankme_counts_directions():
  rng = np.random.default_rng(0)
  np.testing.assert_allclose(collapse.rankme(np.tile(np.eye(12), (9, 1))), 12.0, rtol=1e-4)
  np.testing.assert_allclose(collapse.rankme(np.ones((300, 64))), 1.0, atol=1e-3)
  flat = rng.normal(size=(2000, 3)) @ np.linalg.qr(rng.normal(size=(64, 3)))[0].T
  np.testing.assert_allclose(collapse.rankme(flat), 3.0, atol=0.05)


@pytest.mark.parametrize("measure", [collapse.spectrum, collapse.rankme])
def test_directions_of_many_rows_need_memory_as_the_rows_do(measure):
  """The singular vectors of N rows, which nobody asks for, would be [N, N]."""
  rows = jax.ShapeDtypeStruct((100_000, 64), jnp.float32)
  needed = jax.jit(measure).lower(rows).compile().memory_analysis().temp_size_in_bytes
  assert needed < 4 * rows.size * rows.dtype.itemsize


def test_teacher_distance_is_relative_and_exactly_zero_for_a_copy():
  encoder = {"a": jnp.full((3,), 2.0), "b": {"c": jnp.ones((2, 2))}}
  teacher = jax.tree.map(lambda x: x * 1.1, encoder)
  np.testing.assert_allclose(collapse.teacher_distance(encoder, teacher), 0.1, rtol=1e-5)
  assert collapse.teacher_distance(encoder, jax.tree.map(jnp.copy, encoder)) == 0.0
  with pytest.raises(ValueError):
    collapse.teacher_distance(encoder, {"a": jnp.ones(3)})


def test_shared_buffers_finds_the_aliased_leaf():
  encoder = {"a": jnp.ones(3), "b": jnp.zeros((2, 2)), "c": jnp.ones(5)}
  assert collapse.shared_buffers(encoder, jax.tree.map(jnp.copy, encoder)) == 0
  teacher = {**jax.tree.map(jnp.copy, encoder), "b": encoder["b"]}
  assert collapse.shared_buffers(encoder, teacher) == 1
  assert collapse.shared_buffers(encoder, encoder) == 3
