"""Processes that were started otherwise than the first one are named, by all of them."""

import functools

import processes
import pytest
import tiny

from protojax.training import agreement


def _said(monkeypatch, *configs):
  calls = [functools.partial(agreement.require_same, config) for config in configs]
  return processes.together(monkeypatch, *calls)


@pytest.mark.survives(
  "processes of one run that were not started alike",
  "a setting, a version",
  "which process and what, on all of them, status 2",
)
def test_a_setting_that_one_process_has_otherwise_is_named_by_all(monkeypatch):
  other = tiny.config(optim__lr=0.5, method__block=123_456)
  said = _said(monkeypatch, tiny.config(), tiny.config(), other)
  assert len(set(said)) == 1
  assert said[0].startswith("process 2 was not started as process 0 was: method.block 123456 inst")
  assert "instead of null, optim.lr 0.5 instead of" in said[0]


def test_where_images_lie_is_a_matter_of_each_machine(monkeypatch):
  other = tiny.config(data__data_dir="/local/images", data__num_workers=3)
  assert _said(monkeypatch, tiny.config(), other) == ["", ""]


def test_another_version_is_named(monkeypatch):
  versions = iter(["0.1.0", "0.2.0"])
  monkeypatch.setattr(agreement, "_started_with", lambda config: {"protojax": next(versions)})
  said = _said(monkeypatch, tiny.config(), tiny.config())
  assert said[0] == said[1] and "as process 0 was: protojax " in said[0]


def test_one_process_has_nobody_to_agree_with():
  agreement.require_same(tiny.config())
