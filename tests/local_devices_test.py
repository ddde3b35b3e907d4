"""On the eight devices of tests/conftest.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from protojax import local_devices
from protojax.evals import knn
from protojax.metrics import pairwise
from protojax.training import sharding


def test_every_device_gets_an_equal_share_and_zeros_behind_the_rows():
  rows = local_devices.split({"x": np.arange(1.0, 20.0), "y": np.ones((19, 2))}, multiple=2)
  assert rows["x"].shape == (32,) and rows["y"].shape == (32, 2)  # 8 devices x 2 x 2
  np.testing.assert_array_equal(rows["x"], [*range(1, 20), *[0] * 13])
  shares = [shard.data.shape for shard in rows["y"].addressable_shards]
  assert shares == [(4, 2)] * jax.local_device_count()


def test_a_function_of_rows_sees_its_share_and_all_of_what_is_shared():
  rows, shared = local_devices.split(np.arange(16.0)), local_devices.everywhere(np.arange(3.0))

  @functools.partial(jax.jit, static_argnames="summed")
  def run(rows, shared, summed):
    def function(rows, shared):
      assert rows.shape == (2,) and shared.shape == (3,)
      return jnp.sum(rows) * shared if summed else rows + shared.sum()

    return local_devices.by_share(function, summed=summed)(rows, shared)

  np.testing.assert_array_equal(run(rows, shared, False), np.arange(16.0) + 3.0)
  np.testing.assert_array_equal(run(rows, shared, True), 120.0 * np.arange(3.0))


def test_measures_can_be_taken_inside_of_the_mesh_of_a_training():
  rng = np.random.default_rng(0)
  rows, labels = rng.standard_normal((64, 16), np.float32), np.arange(64) % 4

  def measured():
    counts = pairwise.unique_counts(rows)
    return counts.tolist(), knn.accuracy(rows, labels, rows[:9], labels[:9], num_classes=4, k=5)

  expected = measured()
  with jax.set_mesh(sharding.make_mesh(-1, 2)):
    jax.clear_caches()  # or what was compiled outside of it would be taken
    assert measured() == expected
