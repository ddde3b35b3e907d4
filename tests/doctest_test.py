"""Public functions show how they are called, and every example prints what it says."""

import doctest
import importlib
import pathlib

import pytest

_PACKAGE = pathlib.Path(__file__).parents[1] / "protojax"
# What takes a trained run is called in tests/pretrained_test.py and in the README instead.
_SHOWN = {
  "api": ("diagnose",),
  "config": ("default",),
  "data.sources": ("build",),
  "evals.knn": ("accuracy",),
  "losses": ("cross_view_entropy", "koleo"),
  "methods": ("load",),
  "metrics.measures": ("summary",),
  "metrics.pairwise": ("unique_counts",),
  "metrics.verdicts": ("verdict",),
  "prototypes.assignment": ("sinkhorn",),
  "prototypes.kmeans": ("fit",),
  "prototypes.mixture": ("online_em",),
  "resolving": ("resolve",),
  "schedules": ("warmup_cosine",),
  "trees": ("flat", "nested"),
}


def _name(path):
  parts = path.relative_to(_PACKAGE).with_suffix("").parts
  return ".".join(part for part in parts if part != "__init__")


_MODULES = sorted(_name(p) for p in _PACKAGE.rglob("*.py") if "\n  >>> " in p.read_text())


def _examples(name):
  """{function or class: its examples} of a module, without those that have none."""
  module = importlib.import_module(f"protojax.{name}")
  found = doctest.DocTestFinder(exclude_empty=True).find(module)
  return {test.name.removeprefix(module.__name__ + "."): test for test in found if test.examples}


@pytest.mark.parametrize("name", _SHOWN)
def test_public_functions_have_an_example(name):
  assert [function for function in _SHOWN[name] if function not in _examples(name)] == []


@pytest.mark.parametrize("name", _MODULES)
def test_examples_print_what_they_say(name):
  for test in _examples(name).values():
    printed = []
    assert doctest.DocTestRunner().run(test, out=printed.append).failed == 0, "".join(printed)
