import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from protojax import errors
from protojax.training import sharding


def _abstract(**shapes):
  return {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in shapes.items()}


class _Mesh:
  """A mesh of devices that are none."""

  def __init__(self, devices, names, axis_types):
    del axis_types
    self.devices, self.size = devices, devices.size
    self.shape = dict(zip(names, devices.shape, strict=True))


def test_mesh_takes_all_devices_and_says_auto():
  mesh = sharding.make_mesh(-1, 2)
  assert dict(mesh.shape) == {"data": 4, "model": 2}
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(("data", "model"), [(3, 1), (-1, 3), (0, 8), (8, 2)])
def test_mesh_that_does_not_fit_is_refused_in_one_line(data, model):
  with pytest.raises(errors.UserError, match="mesh.data=.*8 device") as caught:
    sharding.make_mesh(data, model)
  assert "\n" not in str(caught.value)


def test_first_matching_rule_wins():
  mesh = sharding.make_mesh(2, 4)
  tree = {
    "prototypes": _abstract(means=(32, 8), dictionary=(6, 32), kappa=(), feature_mean=(8,)),
    "encoder": _abstract(kernel=(8, 8)),
    "carry": _abstract(center=(32,)),
  }
  placed = jax.tree.map(lambda s: s.spec, sharding.state_shardings(tree, mesh))
  assert placed["prototypes"]["means"] == PartitionSpec("model")
  assert placed["prototypes"]["dictionary"] == PartitionSpec(None, "model")
  assert placed["prototypes"]["kappa"] == PartitionSpec()
  assert placed["prototypes"]["feature_mean"] == PartitionSpec()
  assert placed["encoder"]["kernel"] == PartitionSpec()
  assert placed["carry"]["center"] == PartitionSpec("model")


def test_each_of_several_prototype_sets_is_placed_like_one():
  mesh = sharding.make_mesh(2, 4)
  one = _abstract(means=(32, 8), step=(), feature_mean=(8,))
  tree = {
    "prototypes": {"patch": one},
    "teacher": {"prototypes": {"patch": _abstract(v=(32, 8))}},
    "carry": {"center": _abstract(patch=(32,))},
  }
  placed = jax.tree.map(lambda s: s.spec, sharding.state_shardings(tree, mesh))
  split, whole = PartitionSpec("model"), PartitionSpec()
  assert placed["prototypes"]["patch"] == {"means": split, "step": whole, "feature_mean": whole}
  assert placed["teacher"]["prototypes"]["patch"]["v"] == split
  assert placed["carry"]["center"]["patch"] == split


def test_every_leaf_must_match_a_rule():
  mesh = sharding.make_mesh()
  with pytest.raises(errors.UserError, match="no rule matches 'b'"):
    sharding.state_shardings(_abstract(a=(2,), b=(2,)), mesh, (("a", "replicate"),))
  with pytest.raises(errors.UserError, match="unknown placement 'scatter'"):
    sharding.state_shardings(_abstract(a=(2,)), mesh, ((".*", "scatter"),))


def test_fsdp_takes_the_largest_divisible_dimension_of_large_leaves():
  mesh = sharding.make_mesh(8, 1)
  tree = _abstract(big=(512, 1024), odd=(1023, 513), small=(8, 8))
  placed = sharding.state_shardings(tree, mesh, ((".*", "fsdp"),))
  assert placed["big"].spec == PartitionSpec(None, "data")
  assert placed["odd"].spec == placed["small"].spec == PartitionSpec()


def test_prototypes_that_the_mesh_does_not_divide_are_refused():
  mesh = sharding.make_mesh(1, 8)
  with pytest.raises(errors.UserError, match="12 prototypes"):
    sharding.state_shardings({"prototypes": _abstract(v=(12, 4))}, mesh)


def test_batch_that_the_devices_do_not_divide_is_refused():
  mesh = sharding.make_mesh(2, 4)  # more rows than "data", but not one for each device
  told = (
    "batch_size=12 cannot be split over 8 devices .mesh.data=2 x mesh.model=4.: .* multiple of 8"
  )
  with pytest.raises(errors.UserError, match=told):
    sharding.rows_of_process(12, mesh)
  assert sharding.rows_of_process(16, mesh) == (0, 1)


@pytest.mark.parametrize("model", [1, 2, 8])
def test_put_batch_gives_every_device_rows_of_its_own_in_their_order(model):
  mesh = sharding.make_mesh(-1, model)
  rows = np.arange(16, dtype=np.int32)
  placed = sharding.put_batch({"index": rows}, mesh)["index"]
  held = {shard.device: np.asarray(shard.data).tolist() for shard in placed.addressable_shards}
  assert [held[device] for device in mesh.devices.ravel()] == rows.reshape(8, 2).tolist()


@pytest.mark.parametrize("model", [1, 2, 4, 8])
def test_processes_load_contiguous_rows_however_the_mesh_is_cut(model, monkeypatch):
  """Four processes of two devices each, as each of them sees it."""

  @dataclasses.dataclass
  class Device:
    process_index: int
    id: int

  devices = [Device(i % 4, i) for i in range(8)]  # in the order of the torus, say
  monkeypatch.setattr(jax.sharding, "Mesh", _Mesh)
  mesh = sharding.make_mesh(-1, model, devices)
  for process in range(4):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    assert sharding.rows_of_process(16, mesh) == (process, 4)
