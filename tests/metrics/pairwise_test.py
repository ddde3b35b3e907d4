import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.metrics import chance, pairwise


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _angles(*degrees):
  """Rows in the plane at these angles, of different norms."""
  a = np.deg2rad(np.asarray(degrees, np.float64))
  return np.stack([np.cos(a), np.sin(a)], axis=1) * np.arange(1, len(degrees) + 1)[:, None]


def naive_owner(rows, threshold):
  """Definition 2.1 word by word, float64: int [K]."""
  rows = _unit(np.asarray(rows, np.float64))
  owner = np.full(len(rows), -1)
  for i in range(len(rows)):
    if owner[i] < 0:
      owner[(owner < 0) & (1.0 - rows @ rows[i] < threshold)] = i
  return owner


def _clustered(num, dim, centres, noise, seed=0):
  rng = np.random.default_rng(seed)
  means = _unit(rng.normal(size=(centres, dim)))
  return means[rng.integers(centres, size=num)] + noise * rng.normal(size=(num, dim))


# 300 rows are one block, 1024 a whole one; 2500 need earlier blocks and padding.


@pytest.mark.parametrize("num", [1, 300, 1024, 2500])
def test_cover_is_the_naive_one_at_every_threshold(num):
  rows = _clustered(num, 6, 40, 0.15).astype(np.float32)
  got = np.asarray(pairwise.cover(rows))
  for t, threshold in enumerate(pairwise.THRESHOLDS):
    np.testing.assert_array_equal(got[t], naive_owner(rows, threshold))
  counts = np.asarray(pairwise.unique_counts(rows))
  assert counts.dtype == np.int32
  expected = [len(set(naive_owner(rows, t))) for t in pairwise.THRESHOLDS]
  np.testing.assert_array_equal(counts, expected)


def test_cover_depends_on_the_order_and_does_not_chain():
  """20 degrees are a distance of .060, 40 degrees .234: the middle row first covers both others."""
  assert pairwise.unique_counts(_angles(0, 20, 40), (0.1,))[0] == 2
  assert pairwise.unique_counts(_angles(20, 0, 40), (0.1,))[0] == 1
  # Five steps of 20 degrees do not chain to one representative.
  chain = _angles(0, 20, 40, 60, 80)
  np.testing.assert_array_equal(pairwise.cover(chain, (0.1,))[0], [0, 0, 2, 2, 4])


def test_threshold_is_strict():
  rows = np.eye(3)  # distances of exactly 1
  assert pairwise.unique_counts(rows, (1.0,))[0] == 3
  assert pairwise.unique_counts(rows, (1.0001,))[0] == 1


def test_counts_need_not_fall_as_the_threshold_grows_but_are_each_computed_alone():
  rows = _clustered(200, 3, 20, 0.3).astype(np.float32)
  together = np.asarray(pairwise.unique_counts(rows))
  alone = [int(pairwise.unique_counts(rows, (t,))[0]) for t in pairwise.THRESHOLDS]
  np.testing.assert_array_equal(together, alone)


def test_duplicates_of_random_rows_count_once_whatever_their_norm_and_order():
  rng = np.random.default_rng(0)
  rows = np.repeat(rng.normal(size=(150, 64)), 8, axis=0) * rng.uniform(0.1, 9, (1200, 1))
  rows = rows[rng.permutation(1200)].astype(np.float32)
  np.testing.assert_array_equal(pairwise.unique_counts(rows)[:4], 150)


def test_rows_without_a_direction_are_not_counted():
  rows = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
  rows[2], rows[5], rows[7, 3] = 0.0, np.nan, np.inf
  assert pairwise.unique_counts(rows, (0.025,))[0] == 7
  np.testing.assert_array_equal(np.flatnonzero(pairwise.cover(rows, (0.025,))[0] == -1), [2, 5, 7])
  assert pairwise.unique_counts(np.full((4, 3), np.nan))[0] == 0


def test_cover_never_holds_all_pairs():
  """The largest array of the compiled program grows with K, not with K * K."""
  rows = jax.ShapeDtypeStruct((65_536, 16), jnp.float32)
  lowered = pairwise._pairs.lower(rows, thresholds=pairwise.THRESHOLDS, block=512)
  analysis = lowered.compile().memory_analysis()
  assert analysis.temp_size_in_bytes < 100 * 2**20


def test_random_prototypes_pass_where_there_is_room():
  np.testing.assert_array_equal(chance.random_unique(1024, 256), 1024)
  crowded = chance.random_unique(1024, 8)
  assert crowded[0] > crowded[-1] and crowded[-1] < 300
  assert chance.random_unique(1024, 8) is crowded
  with pytest.raises(ValueError):
    crowded[0] = 0
  owner = naive_owner(chance.random_prototypes(300, 4), 0.25)
  assert chance.random_unique(300, 4)[3] == len(set(owner))


def test_random_prototypes_with_room_are_never_compared(monkeypatch):
  """A million of 256 dimensions, at thresholds of which each is far from any of their pairs."""

  def refuse(*_):
    raise AssertionError("compared")

  monkeypatch.setattr(chance, "random_prototypes", refuse)
  near = (0.025, 0.05, 0.1, 0.25)
  np.testing.assert_array_equal(chance.random_unique(1_000_000, 256, near), 1_000_000)
  np.testing.assert_array_equal(chance.random_unique(65_536, 256), 65_536)
  with pytest.raises(AssertionError, match="compared"):
    chance.random_unique(65_536, 64)  # .5 is too much for 64 dimensions


@pytest.mark.parametrize("num", [7, 700, 1300])
def test_pairs_match_numpy_for_blocks_that_are_not_full(num):
  rows = _clustered(num, 5, 300, 0.1).astype(np.float32)
  rows[num // 2] = 0.0
  unit = _unit(np.where(rows == 0, 1e-30, rows).astype(np.float64)) * (rows != 0).any(1)[:, None]
  distance = 1.0 - unit @ unit.T
  np.fill_diagonal(distance, np.inf)
  got = pairwise.pairs(rows)
  np.testing.assert_allclose(got.nearest, np.maximum(distance.min(axis=1), 0), atol=1e-6)
  rows[3] = np.nan
  nearest = np.asarray(pairwise.nearest_distances(rows))
  np.testing.assert_array_equal(np.flatnonzero(np.isnan(nearest)), [3])


def test_nearest_distances_and_quantiles_match_numpy():
  rows = _clustered(700, 5, 300, 0.1).astype(np.float32)
  distance = 1.0 - _unit(rows.astype(np.float64)) @ _unit(rows.astype(np.float64)).T
  np.fill_diagonal(distance, np.inf)
  np.testing.assert_allclose(pairwise.nearest_distances(rows), distance.min(axis=1), atol=1e-6)
  np.testing.assert_allclose(
    pairwise.nearest_quantiles(rows, (0.1, 0.9)),
    np.quantile(distance.min(axis=1), (0.1, 0.9)),
    atol=1e-6,
  )
  assert np.isinf(pairwise.nearest_distances(rows[:1])[0])
