"""The list of the published constants against our recipes, and its page against the list."""

import pathlib
import re
import runpy

import pytest

from protojax import recipes, trees

ROOT = pathlib.Path(__file__).parents[1]
FIDELITY = runpy.run_path(str(ROOT / "docs" / "fidelity.py"))


@pytest.mark.parametrize("run", FIDELITY["RUNS"], ids=lambda run: run.recipe)
def test_a_recipe_has_the_published_constants_or_says_why_not(run):
  settings = trees.flat(recipes.load(run.recipe))
  for constant in run.constants:
    assert not constant.key or constant.key in settings, constant
    if FIDELITY["same"](constant, settings):
      assert not constant.key or not constant.note, f"nothing differs: {constant}"
    else:
      assert constant.note, f"ours is {settings[constant.key]}: {constant}"
    if not constant.key:
      assert re.match("same|differs because ", constant.note), constant
    for path in re.findall(r"tests/[\w/]+\.py", constant.note):
      assert (ROOT / path).exists()
    for key, value in re.findall(r"switch ([\w.]+)=(\w+)", constant.note):
      assert str(settings[key]) != value  # else there is nothing to switch
  names = [(constant.name, constant.key) for constant in run.constants]
  assert len(names) == len(set(names))


def test_the_page_is_what_the_list_says():
  assert (ROOT / "docs" / "fidelity.md").read_text() == FIDELITY["page"](), (
    "run python docs/fidelity.py"
  )
