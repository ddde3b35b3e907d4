import numpy as np
import pytest
from scipy.sparse import csgraph

from protojax.metrics import chance, pairwise, uniqueness

T = pairwise.THRESHOLDS


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _angles(*degrees):
  """Rows in the plane at these angles, of different norms."""
  a = np.deg2rad(np.asarray(degrees, np.float64))
  return np.stack([np.cos(a), np.sin(a)], axis=1) * np.arange(1, len(degrees) + 1)[:, None]


def _clustered(num, dim, centres, noise, seed=0):
  rng = np.random.default_rng(seed)
  means = _unit(rng.normal(size=(centres, dim)))
  rows = means[rng.integers(centres, size=num)] + noise * rng.normal(size=(num, dim))
  return rows.astype(np.float32)


def _naive(rows, thresholds):
  """Owner by definition 2.1 word by word, components by SciPy, isolated and nearest by NumPy."""
  rows = _unit(np.asarray(rows, np.float64))
  distance = 1.0 - rows @ rows.T
  np.fill_diagonal(distance, np.inf)
  owners, components, isolated = [], [], []
  for threshold in thresholds:
    owner = np.full(len(rows), -1)
    for i in range(len(rows)):
      if owner[i] < 0:
        owner[(owner < 0) & (distance[i] < threshold)] = i
        owner[i] = i
    owners.append(owner)
    components.append(csgraph.connected_components(distance < threshold)[0])
    isolated.append(np.sum(distance.min(axis=1) >= threshold))
  return np.array(owners), components, isolated, distance.min(axis=1)


# 1024 rows are one whole block; 2500 need earlier blocks and a part of one.
@pytest.mark.parametrize(
  "num, dim, centres, noise",
  [
    (1, 6, 1, 0.1),
    (2, 6, 1, 0.1),
    (300, 6, 40, 0.15),
    (1024, 4, 60, 0.08),
    (2500, 3, 60, 0.2),
    (2500, 12, 1200, 0.1),
  ],
)
def test_all_counts_match_their_definitions(num, dim, centres, noise):
  rows = _clustered(num, dim, centres, noise)
  owner, components, isolated, nearest = _naive(rows, T)
  got = uniqueness.measure(rows)
  np.testing.assert_array_equal(got.owner, owner)
  np.testing.assert_array_equal(got.unique, [len(set(o)) for o in owner])
  np.testing.assert_array_equal(got.components, components)
  np.testing.assert_array_equal(got.isolated, isolated)
  np.testing.assert_allclose(got.nearest, nearest, atol=1e-6)
  if num == 2500 and centres == 1200:
    assert len({*got.components, *got.unique}) > 6  # not trivially all alike


def test_the_cover_is_that_of_collapse():
  rows = _clustered(2500, 8, 200, 0.1)
  np.testing.assert_array_equal(uniqueness.measure(rows).owner, pairwise.cover(rows))


@pytest.mark.parametrize("threshold", T)
@pytest.mark.parametrize("factor, expected", [(0.99, 300), (1.01, 1500)])
def test_copies_count_once_below_a_threshold_and_each_above_it(threshold, factor, expected):
  """M = 300 orthogonal rows, 5 of each, all 5 at one distance just below or above the threshold."""
  rng = np.random.default_rng(1)
  centres = np.linalg.qr(rng.normal(size=(300, 300)))[0]
  corners = _unit(np.eye(5) - 0.2)  # a regular simplex, cosines -1/4
  aside = np.sqrt(0.8 * factor * threshold)  # so that 1 - cos = 5/4 aside^2
  rows = [np.sqrt(1 - aside**2) * np.repeat(centres, 5, axis=0), aside * np.tile(corners, (300, 1))]
  rows = np.concatenate(rows, axis=1)[rng.permutation(1500)] * rng.uniform(0.1, 9, (1500, 1))
  got = uniqueness.measure(rows, (threshold,))
  assert (got.unique[0], got.components[0]) == (expected, expected)
  assert got.isolated[0] == (0 if expected == 300 else 1500)
  np.testing.assert_allclose(got.nearest, factor * threshold, atol=1e-6)
  groups = uniqueness.largest_groups(got.owner[0], 3)
  assert [len(g) for g in groups] == ([5, 5, 5] if expected == 300 else [])


def test_the_threshold_is_strict():
  got = uniqueness.measure(np.eye(3)[[0, 1, 2, 2]], (1.0, 1.0001))  # distances of 0 and exactly 1
  for counts in (got.unique, got.components):
    np.testing.assert_array_equal(counts, [3, 1])
  np.testing.assert_array_equal(got.isolated, [2, 0])


def test_the_cover_does_not_chain_and_the_components_do_in_any_order():
  chain = _angles(0, 20, 40, 60, 80)  # 20 degrees are a distance of .060, 40 degrees .234
  got = uniqueness.measure(chain, (0.1,))
  np.testing.assert_array_equal(got.owner[0], [0, 0, 2, 2, 4])
  assert got.components[0] == 1
  long = _angles(*np.arange(0, 300, 0.1))  # 3,000 rows, three blocks; .1 degree is 1.5e-6
  order = np.random.default_rng(1).permutation(len(long))
  got = uniqueness.measure(long[order], (2e-6, 1e-6))
  np.testing.assert_array_equal(got.components, [1, 3000])


def test_rows_without_a_direction_take_no_part():
  rows = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
  whole = uniqueness.measure(rows[[0, 1, 3, 4, 6, 8, 9]])
  rows[2], rows[5], rows[7, 3] = 0.0, np.nan, np.inf
  got = uniqueness.measure(rows)
  np.testing.assert_array_equal(np.flatnonzero(got.owner[0] == -1), [2, 5, 7])
  np.testing.assert_array_equal(got.unique, whole.unique)
  np.testing.assert_array_equal(np.isinf(got.nearest), np.isin(np.arange(10), [2, 5, 7]))
  got = uniqueness.measure(np.full((4, 3), np.nan))
  assert not (got.unique.any() or got.components.any() or got.isolated.any())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_at_the_ends_of_float32_do_not_matter(scale):
  rows = np.concatenate([np.eye(4), np.eye(4)]).astype(np.float32) * np.float32(scale)
  np.testing.assert_array_equal(uniqueness.measure(rows).unique, 4)


def test_largest_groups_are_the_most_frequent_owners_in_index_order():
  owner = np.array([0, 1, 0, 3, 1, 0, 6, 3, -1])
  groups = uniqueness.largest_groups(owner, 2)
  assert [g.tolist() for g in groups] == [[0, 2, 5], [1, 4]]
  assert len(uniqueness.largest_groups(owner, 9)) == 3  # 6 is alone


def test_random_rows_are_counted_only_where_some_might_be_near():
  roomy = uniqueness.null(65_536, 256)
  assert not roomy.drawn
  for counts in (roomy.unique, roomy.components, roomy.isolated):
    np.testing.assert_array_equal(counts, 65_536)
  crowded = uniqueness.null(1024, 8)
  assert crowded.drawn
  np.testing.assert_array_equal(crowded.unique, chance.random_unique(1024, 8))


def test_expected_near_pairs_and_nearest_quantiles_are_those_of_drawn_rows():
  rng = np.random.default_rng(0)
  num, dim, threshold = 400, 6, 0.2
  pairs, nearest = [], []
  for _ in range(20):
    rows = _unit(rng.normal(size=(num, dim)))
    distance = 1.0 - rows @ rows.T
    pairs.append(np.sum(distance[np.triu_indices(num, 1)] < threshold))
    np.fill_diagonal(distance, np.inf)
    nearest.append(distance.min(axis=1))
  expected = chance.near_pairs(num, dim, threshold)
  np.testing.assert_allclose(np.mean(pairs), expected, rtol=4 / np.sqrt(20 * expected))
  np.testing.assert_allclose(
    np.quantile(nearest, (0.05, 0.5, 0.95)),
    uniqueness.null_nearest(num, dim, (0.05, 0.5, 0.95)),
    rtol=0.03,
  )
  # arXiv 2510.20108's K and D: the closest of all pairs is expected at .616, none is below .5.
  assert chance.near_pairs(65_536, 256, 0.5) < 1e-3 < chance.near_pairs(65_536, 256, 0.62)


def test_a_collapsed_set_of_thousands_takes_no_memory_for_its_pairs():
  import tracemalloc

  rows = np.ones((8192, 32), np.float32) + 1e-4 * _clustered(8192, 32, 10, 0.1)
  tracemalloc.start()
  got = uniqueness.measure(rows)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  np.testing.assert_array_equal([got.unique, got.components], 1)
  np.testing.assert_array_equal(got.isolated, 0)
  assert peak < 60 * 2**20  # the mask of all pairs alone is 67 MB, the distances four times that
