"""A recipe by its name, a file of one's own, and what both share."""

import pathlib
import re
import runpy
import shutil
import sys

import pytest

from protojax import errors, recipes

ROOT = pathlib.Path(__file__).parents[1]


def test_a_recipe_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert recipes.names() == sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "common"
  )
  (tmp_path / "quickstart").mkdir()  # a folder of that name is not in the way
  for mode in ("", ":debug"):
    by_file = recipes.load(f"{ROOT}/configs/quickstart.py{mode}")
    assert recipes.load(f"quickstart{mode}") == by_file
  assert recipes.load("quickstart:debug").num_steps == 20


def test_every_recipe_has_a_first_line(tmp_path, monkeypatch):
  assert all(recipes.title(name).endswith(".") for name in recipes.names())
  monkeypatch.setattr(recipes, "FOLDER", tmp_path)
  (tmp_path / "half_written.py").write_text("def get_config(")
  assert recipes.title("half_written") == ""


def test_a_recipe_of_one_s_own_shares_the_frame_and_finds_the_modules_beside_it(
  tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(tmp_path / "elsewhere")  # restores the path afterwards
  (tmp_path / "lab_beside").mkdir()
  (tmp_path / "lab_beside" / "numbers.py").write_text("SEED = 5\n")
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "mine.py").write_text("""
from lab_beside import numbers
from protojax.recipes import common, quickstart


def get_config(mode=""):
  config = common.dino_cifar10()
  config.seed = numbers.SEED
  config.num_steps = quickstart.get_config().num_steps
  return common.finish(config, mode)
""")
  config = recipes.load(str(tmp_path / "own" / "mine.py"))
  assert (config.seed, config.num_steps, config.data.name) == (5, 2500, "cifar10")


def test_the_recipe_in_docs_runs_is_one(tmp_path):
  (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.DOTALL)
  (tmp_path / "own.py").write_text(block)
  config = recipes.load(str(tmp_path / "own.py"))
  assert (config.num_epochs, config.data.name) == (300.0, "folder")
  assert recipes.load(f"{tmp_path}/own.py:debug").data.name == "digits"


def test_installed_recipes_are_those_inside_the_package(tmp_path):
  package = tmp_path / "site-packages" / "protojax"
  shutil.copytree(ROOT / "configs", package / "configs")
  (tmp_path / "site-packages" / "configs").mkdir()  # somebody else's
  shutil.copy(ROOT / "protojax" / "recipes.py", package)
  installed = runpy.run_path(str(package / "recipes.py"))
  assert installed["FOLDER"] == package / "configs" != recipes.FOLDER
  assert installed["names"]() == recipes.names()


@pytest.mark.parametrize(
  ("recipe", "words"),
  [
    ("gmm_vits", "no recipe 'gmm_vits': did you mean --config=gmm_vit_s, which comes with"),
    ("configs/gmm_vit_s.py", "no file 'configs/gmm_vit_s.py': did you mean --config=gmm_vit_s,"),
    ("zzz", "no recipe 'zzz': give one of those that come with protojax .protojax train --help"),
    ("zzz.py:debug", "no file 'zzz.py': give one of those"),
    ("own.py", "own.py defines no get_config"),
    ("common", "no recipe 'common'"),
    (
      "quickstart:debgu",
      "^--config=quickstart:debgu: mode 'debgu' is unknown: this recipe has",
    ),
    ("none.py", "^--config=none.py: get_config of .*none.py returns int, no config: let it return"),
    ("forgot.py", "forgot.py returns None, no config: let it return what it has made of"),
    (
      "empty.py",
      r"empty.py returns a config without accum_steps, augment, batch_size, \.\.",
    ),
    ("none.py:debug", "^--config=none.py:debug: mode 'debug' is unknown: .* of none.py takes none"),
  ],
)
def test_what_is_no_recipe_is_refused_in_one_line(recipe, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path / "elsewhere")
  (tmp_path / "own.py").write_text("x = 1\n")
  (tmp_path / "none.py").write_text("def get_config():\n  return 1\n")
  (tmp_path / "forgot.py").write_text("def get_config():\n  pass\n")
  empty = "import ml_collections\n\n\nget_config = ml_collections.ConfigDict\n"
  (tmp_path / "empty.py").write_text(empty)
  with pytest.raises(errors.UserError, match=words) as caught:
    recipes.load(recipe)
  assert "\n" not in str(caught.value)


def test_a_recipe_imports_what_lies_beside_it_and_its_errors_are_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "path", [*sys.path])
  (tmp_path / "beside_it.py").write_text("STEPS = 7\n")
  recipe = tmp_path / "mine.py"
  start = "from beside_it import STEPS\nfrom protojax.recipes import quickstart\n\n\n"
  start += "def get_config(mode=''):\n  config = quickstart.get_config(mode)\n"
  recipe.write_text(start + "  config.num_steps = STEPS\n  return config\n")
  assert recipes.load(str(recipe)).num_steps == 7
  for text, line in {
    "import no_such_helper\n" + start: "No module named 'no_such_helper' .*mine.py, line 1",
    start + "  return config.steps\n": "'steps'.* .*mine.py, line 7",
    start + "  return (\n": "SyntaxError: .*line 7",
  }.items():
    recipe.write_text(text)
    with pytest.raises(errors.UserError, match=line) as caught:
      recipes.load(f"{recipe}:debug")
    assert "\n" not in str(caught.value)
