"""k-means against scikit-learn; concentrations against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.cluster
import sklearn.datasets
from jax.sharding import NamedSharding, PartitionSpec

from protojax import local_devices, progress
from protojax.planning import counting, hlo
from protojax.prototypes import kmeans


def _blobs(num=400, dim=5, centers=12, seed=0):
  rows, _ = sklearn.datasets.make_blobs(num, dim, centers=centers, cluster_std=2, random_state=seed)
  return rows.astype(np.float32)


def test_iterations_are_those_of_scikit_learn():
  rows = _blobs()
  start = rows[:12]
  for steps in (1, 7):
    ours = kmeans.lloyd(jnp.asarray(rows), jnp.asarray(start), steps)
    theirs = sklearn.cluster.KMeans(
      12, init=start, n_init=1, max_iter=steps, tol=0, algorithm="lloyd"
    )
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # not converged: as asked
      theirs.fit(rows)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.inertia, theirs.inertia_, rtol=1e-5)
    np.testing.assert_array_equal(ours.codes, theirs.labels_)
    np.testing.assert_array_equal(ours.counts, np.bincount(theirs.labels_, minlength=12))


def test_start_by_start_on_all_devices_it_is_the_same(monkeypatch):
  """100 rows over eight devices, four of padding behind them."""
  rows, said = jnp.asarray(_blobs(num=100)), []

  def over(items, what):
    said.append((what, len(items)))
    return items

  monkeypatch.setattr(progress, "over", over)
  arguments = {"num_clusters": 5, "num_steps": 3, "num_restarts": 6}
  whole = kmeans.fit(rows, jax.random.key(3), **arguments)
  parts = kmeans.fit_by_starts(rows, jax.random.key(3), **arguments)
  np.testing.assert_array_equal(whole.codes, parts.codes)
  np.testing.assert_array_equal(whole.counts, parts.counts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, parts)
  assert said == [("k-means, start", 6)]


def test_on_all_devices_too_empty_clusters_go_to_the_farthest_rows_and_never_to_padding():
  rows = np.array([[4.0], [4.1], [4.2], [8.0], [9.5]], np.float32)  # padding lies at 0, far away
  start = jnp.array([[4.1], [100.0], [200.0]])
  spread, real = local_devices.split((rows, np.ones(5, np.float32)))
  run = jax.jit(lambda *of: kmeans._lloyd(kmeans._assign_by_share, *of, start, 1))
  found, expected = run(spread, real), kmeans.lloyd(jnp.asarray(rows), start, 1)
  np.testing.assert_allclose(found.centroids, expected.centroids, rtol=1e-6)
  np.testing.assert_allclose(found.inertia, expected.inertia, rtol=1e-6)
  np.testing.assert_array_equal(found.counts, expected.counts)


def test_every_device_holds_its_share_of_the_rows_and_no_row_is_gathered():
  """Of 8,192 rows in 16 dimensions; their squared distances alone, to find the farthest, are."""
  over = NamedSharding(local_devices.mesh(), PartitionSpec(local_devices.AXIS))
  rows, real = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=over) for s in ((8192, 16), (8192,)))
  compiled = kmeans._once_by_share.lower(
    rows, real, jax.random.key(0), num_rows=8190, num_clusters=40, num_steps=2
  ).compile()
  found = hlo.parse(compiled.as_text())
  sizes = {
    math.prod(shape.dims)
    for computation in found.computations.values()
    for one in computation.instructions.values()
    for shape in one.shapes
  }
  assert max(sizes) <= 1024 * 40  # pairs of a share; all rows: 131,072 numbers, all pairs 327,680
  moved = counting.count(compiled.as_text()).collectives
  assert {one.kind for one in moved} <= {"all-reduce", "all-gather"}
  assert max(one.bytes for one in moved) <= 4 * 8192


def test_inertia_of_the_best_start_is_that_of_scikit_learn():
  rows = _blobs(centers=8)
  ours = kmeans.fit(
    jnp.asarray(rows), jax.random.key(0), num_clusters=8, num_steps=30, num_restarts=20
  )
  theirs = sklearn.cluster.KMeans(8, n_init=20, random_state=0).fit(rows)
  assert float(ours.inertia) <= 1.01 * theirs.inertia_
  one = kmeans.fit(jnp.asarray(rows), jax.random.key(0), num_clusters=8, num_steps=30)
  assert float(ours.inertia) <= float(one.inertia)


def test_what_is_found_describes_the_rows():
  rows = _blobs()
  found = kmeans.fit(jnp.asarray(rows), jax.random.key(1), num_clusters=9)
  distance = np.linalg.norm(rows[:, None] - np.asarray(found.centroids)[None], axis=-1)
  np.testing.assert_array_equal(found.codes, distance.argmin(axis=1))
  np.testing.assert_allclose(found.inertia, (distance.min(axis=1) ** 2).sum(), rtol=1e-5)
  for k in range(9):
    mine = distance[distance.argmin(axis=1) == k, k]
    assert found.counts[k] == len(mine)
    np.testing.assert_allclose(found.distances[k], mine.mean(), rtol=1e-5)


def test_chunks_do_not_change_the_clusters_and_a_key_gives_the_same_to_the_bit(monkeypatch):
  rows, key = jnp.asarray(_blobs()), jax.random.key(2)
  whole = kmeans.fit(rows, key, num_clusters=6)
  again = kmeans.fit(rows, key, num_clusters=6)
  jax.tree.map(np.testing.assert_array_equal, whole, again)
  monkeypatch.setattr(kmeans, "_PAIRS", 6 * 33)  # 13 chunks of 33 rows, the last one padded
  kmeans.fit.clear_cache()
  parts = kmeans.fit(rows, key, num_clusters=6)
  kmeans.fit.clear_cache()
  np.testing.assert_array_equal(whole.codes, parts.codes)
  np.testing.assert_allclose(whole.centroids, parts.centroids, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(whole.inertia, parts.inertia, rtol=1e-5)


def test_empty_clusters_go_to_the_farthest_rows():
  rows = jnp.array([[0.0], [0.1], [0.2], [8.0], [9.5]])
  start = jnp.array([[0.1], [100.0], [200.0]])  # one cluster has all rows
  found = kmeans.lloyd(rows, start, 1)
  np.testing.assert_allclose(np.sort(found.centroids[:, 0]), [3.56, 8.0, 9.5], rtol=1e-6)
  found = kmeans.lloyd(rows, start, 5)
  assert float(found.counts.min()) > 0


def test_copies_and_as_many_clusters_as_rows_are_finite():
  copies = kmeans.fit(jnp.ones((10, 3)), jax.random.key(0), num_clusters=4)
  assert np.isfinite(copies.centroids).all() and float(copies.inertia) == 0.0
  rows = jnp.asarray(_blobs(6))
  assert float(kmeans.fit(rows, jax.random.key(0), num_clusters=6).inertia) == 0.0


def test_fifty_thousand_rows_fit_into_memory():
  rows = jax.ShapeDtypeStruct((50_000, 128), jnp.float32)
  lowered = kmeans.fit.lower(rows, jax.random.key(0), num_clusters=1000)
  assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**28  # all pairs: 200 MB each


def _reference_concentration(distances, counts, temperature):
  phi = distances / np.log(counts + 10)
  several = counts > 1
  phi = np.where(several, phi, phi[several].max())
  phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
  return temperature * phi / phi.mean()


def test_concentration_matches_numpy():
  rng = np.random.default_rng(0)
  distances, counts = rng.uniform(0.1, 1.0, 40), rng.integers(2, 50, 40).astype(float)
  counts[3], counts[4] = 1, 0
  distances[3], distances[4] = 0.0, 0.0
  phi = kmeans.concentration(jnp.asarray(distances), jnp.asarray(counts), 0.2)
  np.testing.assert_allclose(phi, _reference_concentration(distances, counts, 0.2), rtol=1e-5)
  np.testing.assert_allclose(phi.mean(), 0.2, rtol=1e-5)


@pytest.mark.parametrize("tight", [10, 6])
def test_concentration_of_clusters_of_copies_stays_positive(tight):
  distances = jnp.where(jnp.arange(10) < tight, 0.0, 0.5)
  phi = kmeans.concentration(distances, jnp.full(10, 5.0), 0.2)
  assert np.isfinite(phi).all() and float(phi.min()) >= 0.2 * 0.0099
