"""Processes that were started otherwise than the first one are named, by all of them."""

import threading

import jax
import numpy as np
import pytest
import tiny

from protojax import errors
from protojax.training import agreement


class _Exchange:
  """What JAX's collectives between hosts do, between threads: all give, all get everything."""

  def __init__(self, monkeypatch, count):
    self._given, self._barrier, self._own = {}, threading.Barrier(count), threading.local()
    monkeypatch.setattr(jax, "process_count", lambda: count)
    exchange = agreement.multihost_utils
    monkeypatch.setattr(exchange, "broadcast_one_to_all", lambda x: self._all(x)[0])
    monkeypatch.setattr(exchange, "process_allgather", lambda x: np.stack(self._all(x)))

  def _all(self, x):
    self._given[self._own.index] = np.asarray(x)
    self._barrier.wait(10)
    found = [self._given[index] for index in sorted(self._given)]
    assert len({x.shape for x in found}) == 1  # as a collective needs them
    self._barrier.wait(10)
    return found

  def call(self, index, function, *arguments):
    self._own.index = index
    return function(*arguments)


def _said(monkeypatch, *configs):
  """What each process raises, "" where it goes on."""
  exchange, out = _Exchange(monkeypatch, len(configs)), {}

  def one(index, config):
    try:
      exchange.call(index, agreement.require_same, config)
      out[index] = ""
    except errors.UserError as error:
      out[index] = str(error)

  threads = [threading.Thread(target=one, args=given) for given in enumerate(configs)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return [out[index] for index in range(len(configs))]


@pytest.mark.survives(
  "processes of one run that were not started alike",
  "a setting, a version",
  "which process and what, on all of them, status 2",
)
def test_a_setting_that_one_process_has_otherwise_is_named_by_all(monkeypatch):
  said = _said(
    monkeypatch, tiny.config(), tiny.config(), tiny.config(optim__lr=0.5, method__block=123_456)
  )
  assert len(set(said)) == 1
  assert said[0].startswith("process 2 was not started as process 0 was: ")
  assert "method.block 123456 instead of null" in said[0]
  assert "optim.lr 0.5 instead of" in said[0]


def test_where_images_lie_is_a_matter_of_each_machine(monkeypatch):
  other = tiny.config(data__data_dir="/local/images", data__num_workers=3)
  assert _said(monkeypatch, tiny.config(), other) == ["", ""]


def test_another_version_is_named(monkeypatch):
  versions = iter(["0.1.0", "0.2.0"])
  monkeypatch.setattr(
    agreement, "_started_with", lambda config: {"protojax": next(versions), "seed": 0}
  )
  said = _said(monkeypatch, tiny.config(), tiny.config())
  assert "protojax " in said[0] and "instead of" in said[0]


def test_one_process_has_nobody_to_agree_with():
  agreement.require_same(tiny.config())
