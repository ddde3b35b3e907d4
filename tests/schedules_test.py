"""Schedules against the values of two published training logs and NumPy in float64."""

import jax
import numpy as np
import pytest

from protojax import schedules

_EPOCH, _EPOCHS = 2502, 100  # ImageNet at batch 512
_STEPS = _EPOCH * _EPOCHS


def _every(schedule, first, count):
  return np.asarray(jax.vmap(schedule)(np.arange(first, first + count)), np.float64)


def _lr():
  return schedules.warmup_cosine(1e-3, 1e-6, warmup_steps=10 * _EPOCH, num_steps=_STEPS)


def _wd():
  return schedules.cosine(0.04, 0.4, _STEPS)


@pytest.mark.parametrize(
  ("epoch", "lr", "wd"),
  [
    (0, 4.99820136696111e-05, 0.04002958960483863),
    (1, 1.4998601063e-04, 0.0402071631726),
    (2, 2.4999000759e-04, 0.0405621705636),
    (10, 9.99898629e-04, 0.04971127),
    (50, 5.78638490e-04, 0.22282607),
  ],
)
def test_epoch_means_are_those_of_the_published_logs(epoch, lr, wd):
  np.testing.assert_allclose(_every(_lr(), epoch * _EPOCH, _EPOCH).mean(), lr, rtol=1e-6)
  np.testing.assert_allclose(_every(_wd(), epoch * _EPOCH, _EPOCH).mean(), wd, rtol=1e-6)


@pytest.mark.parametrize(
  ("schedule", "epoch", "expected"),
  [
    (_lr(), 1, 1.00004e-4),
    (_lr(), 5, 5.0002e-4),
    (_lr(), 10, 1e-3),
    (_lr(), 11, 9.99696e-4),
    (_lr(), 50, 5.87237e-4),
    (_lr(), 99, 1.30428e-6),
    (_wd(), 1, 0.0400888),
    (_wd(), 10, 0.0488098),
    (_wd(), 50, 0.22),
    (_wd(), 99, 0.399911),
    (schedules.cosine(0.996, 1.0, _STEPS), 1, 0.996001),
    (schedules.cosine(0.996, 1.0, _STEPS), 10, 0.996098),
    (schedules.cosine(0.996, 1.0, _STEPS), 50, 0.998),
    (schedules.cosine(0.996, 1.0, _STEPS), 99, 0.999999),
  ],
)
def test_values_at_the_start_of_an_epoch(schedule, epoch, expected):
  assert float(schedule(epoch * _EPOCH)) == pytest.approx(expected, rel=5e-6)


def test_warmup_cosine_matches_numpy_at_every_step():
  warmup, steps, peak, final = 7, 40, 0.3, 1e-5
  i = np.arange(steps - warmup)
  cosine = final + 0.5 * (peak - final) * (1 + np.cos(np.pi * i / (steps - warmup)))
  expected = np.concatenate([np.linspace(0, peak, warmup), cosine])
  schedule = schedules.warmup_cosine(peak, final, warmup_steps=warmup, num_steps=steps)
  np.testing.assert_allclose(_every(schedule, 0, steps), expected, rtol=1e-6)
  assert expected[warmup - 1] == expected[warmup] == peak


def test_last_steps_of_a_long_run_keep_their_digits():
  i = np.arange(_STEPS - 5, _STEPS)
  expected = 0.0 + 0.5 * (1e-3 - 0.0) * (1 + np.cos(np.pi * i.astype(np.longdouble) / _STEPS))
  schedule = schedules.cosine(1e-3, 0.0, _STEPS)
  np.testing.assert_allclose(_every(schedule, _STEPS - 5, 5), expected.astype(float), rtol=1e-5)


def test_no_warmup_starts_at_the_peak_and_one_step_of_it_at_zero():
  assert float(schedules.warmup_cosine(0.5, 0.0, warmup_steps=0, num_steps=9)(0)) == 0.5
  one = schedules.warmup_cosine(0.5, 0.0, warmup_steps=1, num_steps=9)
  assert [float(one(0)), float(one(1))] == [0.0, 0.5]


def test_run_shorter_than_its_warmup_stays_in_it():
  schedule = schedules.warmup_cosine(1.0, 0.0, warmup_steps=11, num_steps=5)
  np.testing.assert_allclose(_every(schedule, 0, 5), np.arange(5) / 10, rtol=1e-6)


def test_warmup_may_start_above_zero():
  schedule = schedules.warmup_cosine(1.0, 0.0, warmup_steps=5, num_steps=9, start=0.2)
  np.testing.assert_allclose(_every(schedule, 0, 5), [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


def test_linear_approaches_its_end_and_stops_before():
  schedule = schedules.linear(0.004, 0.0, 8)
  np.testing.assert_allclose(_every(schedule, 0, 8), 0.004 * (1 - np.arange(8) / 8), rtol=1e-6)
  assert float(schedule(99)) == float(schedule(7)) > 0


def test_steps_beyond_the_end_keep_the_last_value():
  schedule = schedules.cosine(1.0, 0.1, 50)
  assert float(schedule(49)) == float(schedule(50)) == float(schedule(10_000)) > 0.1


def test_per_epoch_linear_holds_within_an_epoch_and_then_for_good():
  schedule = schedules.per_epoch_linear(0.04, 0.07, warmup_epochs=30, steps_per_epoch=5)
  expected = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(20, 0.07)]).repeat(5)
  np.testing.assert_allclose(_every(schedule, 0, 250), expected, rtol=1e-6)


def test_per_epoch_linear_of_no_and_one_epoch():
  none = schedules.per_epoch_linear(0.04, 0.07, warmup_epochs=0, steps_per_epoch=5)
  one = schedules.per_epoch_linear(0.04, 0.07, warmup_epochs=1, steps_per_epoch=5)
  np.testing.assert_allclose([none(0), one(4), one(5)], [0.07, 0.04, 0.07], rtol=1e-6)


@pytest.mark.parametrize(
  "schedule",
  [
    schedules.constant(0.3),
    schedules.cosine(0.3, 0.1, 10),
    schedules.linear(0.3, 0.1, 10),
    schedules.warmup_cosine(0.3, 0.1, warmup_steps=3, num_steps=10),
    schedules.per_epoch_linear(0.3, 0.1, warmup_epochs=3, steps_per_epoch=2),
  ],
)
def test_every_schedule_is_a_float32_scalar_inside_and_outside_jit(schedule):
  outside, inside = schedule(4), jax.jit(schedule)(np.int32(4))
  assert outside.shape == inside.shape == () and outside.dtype == inside.dtype == np.float32
  np.testing.assert_allclose(outside, inside, rtol=1e-6)


def test_constant_is_constant():
  assert float(schedules.constant(0.25)(0)) == float(schedules.constant(0.25)(999)) == 0.25
