"""The time of a step, of counts and chips that can be added up by hand."""

import pytest

from protojax.planning import chips, counting, prediction

_V5E = chips.of_kind("TPU v5 lite")
_H100 = chips.of_kind("NVIDIA H100 80GB HBM3")


def _item(opcode="fusion", flops=0.0, moved=0.0, precision="bf16 x bf16"):
  return counting.Item("x", opcode, {precision: flops} if flops else {}, moved, 1, "")


def _message(kind="all-reduce", size=2e8, group=256, times=1, beside=False):
  return counting.Collective(kind, int(size), group, times, {"backward": int(size)}, "", beside)


def _predict(items, messages=(), sides=(16, 16), devices=256):
  counts = counting.Counts(items, list(messages), 0, {})
  return prediction.predict(counts, _V5E, sides, devices, 1024)


def test_every_operation_takes_the_longer_of_products_and_bytes():
  found = _predict([_item(flops=197e9, moved=81.9e6), _item(flops=19.7e9, moved=819e6)])
  assert found.matrix == pytest.approx(1.1e-3) and found.memory == pytest.approx(1.1e-3)
  assert found.work == found.step == pytest.approx(2e-3)
  assert found.images_per_second == pytest.approx(1024 / 2e-3)
  assert found.of_peak == pytest.approx(1.1 / 2)


def test_copies_ahead_of_time_run_beside_work_and_no_further():
  items = [_item(flops=197e9), _item("copy-start", moved=819e5)]
  assert _predict(items).work == pytest.approx(1e-3)
  items.append(_item("copy-start", moved=819e6))
  found = _predict(items)
  assert found.work == pytest.approx(1.1e-3) and found.bound == "matrix"


def test_float32_takes_the_passes_that_its_precision_asks_for():
  found = _predict([_item(flops=197e9, precision="f32 x f32, highest")])
  assert found.matrix == pytest.approx(6e-3)
  assert _V5E.rate("bf16 x f32, highest") == pytest.approx(197e12 / 3)
  assert _H100.rate("bf16 x bf16") == 989e12 and _H100.rate("f32 x f32, highest") == 67e12
  assert _H100.rate("f32 x f32, high") == _H100.rate("f32 x f32") == 494e12  # TF32, both


@pytest.mark.parametrize(
  ("kind", "bandwidths", "hops"),
  [("all-reduce", 2, 32), ("all-gather", 1, 16), ("reduce-scatter", 1, 16)],
)
def test_a_message_of_a_whole_torus_goes_over_all_links(kind, bandwidths, hops):
  taken = prediction.seconds(_message(kind), _V5E, (16, 16), 256)
  assert taken == pytest.approx(bandwidths * 2e8 * 255 / 256 / 200e9 + hops * 1e-6)


def test_a_slice_that_is_no_torus_sends_half_and_a_part_of_it_over_one_axis():
  whole = prediction.seconds(_message(group=16), _V5E, (4, 4), 16)
  assert whole == pytest.approx(2 * 2e8 * 15 / 16 / 100e9 + 16e-6)
  part = prediction.seconds(_message(group=4), _V5E, (16, 16), 256)
  assert part == pytest.approx(2 * 2e8 * 3 / 4 / 50e9 + 8e-6)
  ring = prediction.seconds(_message(group=16), _V5E, (16, 16), 256)
  assert ring == pytest.approx(2 * 2e8 * 15 / 16 / 100e9 + 16e-6)
  switch = prediction.seconds(_message(group=8), _H100, (), 8)
  assert switch == pytest.approx(2 * 2e8 * 7 / 8 / 450e9)
  assert prediction.seconds(_message(group=1), _V5E, (), 1) == 0.0


def test_messages_are_waited_for_unless_they_run_beside():
  work = [_item(flops=19.7e12)]  # .1 s
  one = prediction.seconds(_message(), _V5E, (16, 16), 256)
  waited = _predict(work, [_message(times=3)])
  assert waited.step == pytest.approx(0.1 + 3 * one) and waited.waited == waited.network
  assert waited.efficiency == pytest.approx(0.1 / (0.1 + 3 * one))
  beside = _predict(work, [_message(beside=True)])
  assert beside.step == pytest.approx(0.1) and beside.efficiency == pytest.approx(1.0)
  assert _predict(work, [_message(size=1e12)]).bound == "network"


def test_every_chip_of_the_table_is_found_by_its_kind():
  for chip in chips.CHIPS:
    assert [chips.of_kind(kind) for kind in chip.kinds] == [chip] * len(chip.kinds)
  assert chips.of_kind("TPU v5").name == "v5p" and chips.of_kind("cpu") is None
