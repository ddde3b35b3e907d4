"""The example in CONTRIBUTING.md: its three blocks are run as a contributor would use them."""

import pathlib
import re

import config_test
import jax
import jax.numpy as jnp
import method_table
import numpy as np
import pytest
import tiny

from protojax import errors, methods, recipes, resolving
from protojax.methods.networks import student, student_teacher
from protojax.training import programs

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def blocks(tmp_path, monkeypatch):
  """The recipe's path and the row, with the method's file where methods are looked for."""
  text = (ROOT / "CONTRIBUTING.md").read_text()
  method, recipe, row = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  (tmp_path / "twins.py").write_text(method)
  (tmp_path / "twins_cifar10.py").write_text(recipe)
  monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
  assert len(method.splitlines()) + len(recipe.splitlines()) + len(row.splitlines()) <= 34
  return tmp_path / "twins_cifar10.py", eval(row, {"Row": method_table.Row})


def test_the_example_learns_and_is_the_same_on_eight_devices(blocks):
  _, row = blocks
  config = row.config(optim__name="sgd")
  _, _, one = tiny.run_steps(config, 20, jax.devices()[:1])
  _, _, eight = tiny.run_steps(config, 2)
  np.testing.assert_allclose(eight[0]["train/loss"], one[0]["train/loss"], rtol=1e-5)
  assert np.mean([m["train/agreement"] for m in one[-5:]]) > one[0]["train/agreement"]


def test_the_example_trains_as_it_stands_in_a_package_of_ones_own(blocks, tmp_path, monkeypatch):
  _, row = blocks
  (tmp_path / "lab_of_twins").mkdir()
  (tmp_path / "twins.py").rename(tmp_path / "lab_of_twins" / "twins.py")
  monkeypatch.syspath_prepend(tmp_path)
  config = row._replace(name="lab_of_twins.twins").config()
  assert config.method.floor == 1e-5
  _, state, metrics = tiny.run_steps(config, 2, jax.devices()[:1])
  assert int(state.step) == 2 and np.isfinite(metrics[1]["train/agreement"])


def test_the_recipe_of_the_example_says_its_command_and_traces(blocks, monkeypatch):
  recipe, _ = blocks
  config_test.test_recipe_says_its_command(recipe)
  monkeypatch.syspath_prepend(ROOT)  # `from configs import common`
  config = resolving.resolve(recipes.load(f"{recipe}:debug"), 64)
  assert "stablehlo" in programs.Program(config).lower().as_text()


def test_parameters_of_ones_own_join_the_encoder_and_are_updated_with_it():
  """The block with a predictor in CONTRIBUTING.md, of a student, and of a teacher with a copy."""
  text = (ROOT / "CONTRIBUTING.md").read_text()
  (block,) = (b for b in re.findall(r"```py\n(.*?)```", text, re.DOTALL) if "predictor" in b)
  names = {"jax": jax, "networks": student.build(tiny.config("vicreg", "none"))}
  exec(block.partition("\n\n\n")[0], names)
  variables = jax.eval_shape(names["init"], jax.random.key(0))
  assert variables.encoder["predictor"]["kernel"].shape == (256, 256)
  assert set(variables.encoder) == {"backbone", "head", "predictor"}

  networks = student_teacher.build(tiny.config("pcl", "kmeans"))
  names["networks"] = networks

  def one_update(key):
    variables = names["init"](key)
    copy = jax.tree.map(jnp.copy, variables.encoder["predictor"])
    teacher = {"encoder": {**variables.teacher["encoder"], "predictor": copy}}
    variables = variables.replace(teacher=teacher)
    return variables, networks.method.update(variables, variables.carry["batch_stats"], 0)

  before, after = jax.eval_shape(one_update, jax.random.key(0))
  assert before == after


def test_without_its_file_the_example_is_no_method():
  with pytest.raises(errors.UserError, match="method.name='twins' is unknown: choose one of b"):
    methods.load("twins")
