"""Batches gathered on the devices equal those of the host pipeline, record for record."""

import io
import re

import jax
import numpy as np
import pytest
from PIL import Image

from protojax import errors
from protojax.data import cache, pipeline, sources
from protojax.training import encode, programs, sharding

KEYS = ("image", "size", "index", "label")


def _encoded(i):
  """A PNG of a size of its own; number 5 is damaged."""
  if i == 5:
    return b"no image"
  pixels = np.random.default_rng(i).integers(0, 256, (6 + i % 3, 7, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "png")
  return file.getvalue()


def _read(rows):
  return [(_encoded(row), row % 4) for row in rows]


def _source(count=21):
  labels = np.arange(count, dtype=np.int32) % 4
  return sources.Source("toys", np.arange(count), _read, labels, "toys[{}]".format, "abcd")


def _loaded(devices, data=None, model=1):
  mesh = sharding.make_mesh(-1, model, jax.devices()[:devices])
  return cache.load(data or _source(), image_size=8, mesh=mesh)


@pytest.mark.parametrize("devices, model", [(1, 1), (8, 1), (8, 2)])
def test_batches_are_those_of_the_host_over_epochs_and_corrupt_records(devices, model):
  cached = _loaded(devices, model=model)
  assert cached.arrays["image"].addressable_shards[0].data.shape[0] == -(-21 // devices)
  gathered = cache.batches(cached, seed=3, step=2, batch_size=16, keys=KEYS)
  host = pipeline.batches(_source(), seed=3, step=2, batch_size=16, image_size=8)
  seen = set()
  for _ in range(4):  # 64 rows: three epochs and a bit
    (batch, skipped), expected = next(gathered), next(host)
    for key in KEYS:
      rows = sharding.batch_sharding(cached.mesh)
      assert batch[key].sharding.is_equivalent_to(rows, batch[key].ndim)
      assert batch[key].dtype == expected[key].dtype
      np.testing.assert_array_equal(batch[key], expected[key])
    np.testing.assert_array_equal(skipped, expected["skipped"])
    seen |= set(skipped.tolist())
  assert seen == {-1, 5}
  host.close()


@pytest.mark.parametrize("limit", [0, 16])
def test_one_pass_gives_the_rows_that_the_host_gives(limit):
  data = _source()
  mesh = sharding.make_mesh(devices=jax.devices())
  options = {"mesh": mesh, "batch_size": 8, "image_size": 8, "limit": limit}
  expected = encode.rows(lambda batch: batch, data, **options)
  out = encode.rows(lambda batch: batch, data, cached=_loaded(8, data), **options)
  assert len(expected["index"]) == (limit or 21) - 1  # without the damaged one
  for key in KEYS:
    np.testing.assert_array_equal(out[key], expected[key])


def test_on_several_devices_rows_are_exchanged_as_bytes_and_only_those_of_the_batch():
  cached = _loaded(8)
  text = cache._gather.lower(cached.arrays, np.zeros(16, np.int32), cached.mesh).compile().as_text()
  assert re.search(r"u8\[2,8,8,3\]\S* reduce-scatter\(", text)  # two of the sixteen images each
  assert "all-gather" not in text  # of the images that a device holds


def test_a_program_takes_its_batches_from_the_devices(monkeypatch):
  import tiny

  c = tiny.config()
  program, data = programs.Program(c), sources.build("digits", split="train")
  cached = program.load(data)
  monkeypatch.setattr(data, "_read", None)  # whatever the host would read now is an error
  batches = program.batches(
    data, seed=0, step=3, batch_size=16, keys=("image", "index"), cached=cached
  )
  with jax.transfer_guard("disallow"):
    batch, skipped, _ = next(batches)
  host = pipeline.batches(
    sources.build("digits", split="train"), seed=0, step=3, batch_size=16, image_size=32
  )
  expected = next(host)
  host.close()
  assert set(batch) == {"image", "index"} and (skipped == -1).all()
  np.testing.assert_array_equal(batch["image"], expected["image"])


def _choose(choice, sources, room, monkeypatch, drawn=10_000):
  monkeypatch.setattr(cache, "_room", lambda mesh: room)
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  return cache.choose(choice, sources, image_size=8, images_drawn=drawn, mesh=mesh)


def test_sources_are_cached_in_their_order_as_far_as_the_room_goes(monkeypatch):
  train, bank = _source(21), _source(40)
  per_device = 11 * 8 * 8 * 3  # half of the rows, rounded up
  assert _choose("auto", [train, bank], per_device - 1, monkeypatch) == []
  assert _choose("auto", [train, bank], per_device, monkeypatch) == [train]
  assert _choose("auto", [train, bank], 31 * 8 * 8 * 3, monkeypatch) == [train, bank]
  assert _choose("auto", [train, train], per_device, monkeypatch) == [train]  # one and the same
  assert _choose("off", [train], 1 << 30, monkeypatch) == []


def test_auto_wants_a_known_memory_and_a_run_of_an_epoch(monkeypatch):
  data = _source()
  assert _choose("auto", [data], None, monkeypatch) == []
  assert _choose("device", [data], None, monkeypatch) == [data]
  assert _choose("auto", [data], 1 << 30, monkeypatch, drawn=20) == []
  assert _choose("auto", [data], 1 << 30, monkeypatch, drawn=21) == [data]


def test_what_cannot_be_cached_is_one_line(monkeypatch):
  with pytest.raises(errors.UserError, match="data.cache=device: toys takes 0 MiB of each device"):
    _choose("device", [_source()], 100, monkeypatch)
  with pytest.raises(errors.UserError, match="data.cache='gpu' is unknown: choose auto, device, o"):
    _choose("gpu", [_source()], 100, monkeypatch)


def test_room_is_a_share_of_the_smallest_device(monkeypatch):
  class Device:
    def __init__(self, limit):
      self._limit = limit

    def memory_stats(self):
      return self._limit and {"bytes_limit": self._limit}

  class Mesh:
    local_devices = [Device(64 * 2**20), Device(32 * 2**20)]

  assert cache._room(Mesh) == 32 * 2**20 * cache.SHARE
  Mesh.local_devices = [Device(None)]  # a CPU
  assert cache._room(Mesh) is None
