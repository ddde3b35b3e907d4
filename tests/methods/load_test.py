"""Methods by name: those that come along, and a user's own module, from training to export."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import tiny

from protojax import config as configs
from protojax import errors, loading, main, methods, pretrained, recipes, resolving
from protojax.methods import base, swav
from protojax.training import loop

_ROOT = pathlib.Path(__file__).parents[2]

# Two views agree; a name of its own for each test, since Python imports a module once.
METHOD = """
from protojax import methods
from protojax.methods.networks import student

OPTIONS = {"prototypes": "none", "num_prototypes": 0, "weight": 2.0}


def make(config) -> methods.Method:
  def objective(z):
    distance = ((z[:, 0] - z[:, 1]) ** 2).mean()
    return config.method.weight * distance, {"distance": distance}

  return student.two_views(config, objective)
"""

RECIPE = """
from protojax import config as configs


def get_config():
  config = configs.debug(configs.default("{name}"))
  config.update({{"num_steps": 2, "batch_size": 8, "save_every": 2, "eval_every": 2}})
  config.monitor.images = 16
  config.probe.update({{"limit": 40, "batch_size": 8}})
  config.augment.num_local = 0
  config.head.update({{"norm": "batch", "l2": False}})
  return config
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
  """(package, {module: text}) -> None: files in a folder that Python looks in."""
  monkeypatch.syspath_prepend(tmp_path)

  def write(name, modules):
    (tmp_path / name).mkdir()
    for module, text in modules.items():
      (tmp_path / name / f"{module}.py").write_text(text)

  return write


def test_the_contract_is_at_hand_beside_load():
  assert (methods.Method, methods.LossOut, methods.Variables) == (
    base.Method,
    base.LossOut,
    base.Variables,
  )


def test_a_module_of_ones_own_trains_by_its_name(package):
  package("lab_trains", {"agree": METHOD})
  changes = {"augment__num_local": 0, "head__l2": False, "head__norm": "batch"}
  config = tiny.config("lab_trains.agree", "none", **changes)
  assert config.method.weight == 2.0
  _, state, metrics = tiny.run_steps(config, 2, jax.devices()[:1])
  assert int(state.step) == 2
  for step in metrics:
    assert step["train/loss"] == pytest.approx(2.0 * step["train/distance"]) and step["train/loss"]


def test_a_name_given_after_the_recipe_brings_its_options(package):
  package("lab_named", {"agree": METHOD})
  config = configs.default("vicreg")
  config.method.name, config.num_steps, config.batch_size = "lab_named.agree", 1, 8
  config.augment.num_local, config.head.l2 = 0, False
  assert "weight" not in config.method
  config = resolving.resolve(config, 64)
  assert config.method.weight == 2.0
  again = configs.restored(json.loads(config.to_json_best_effort()))
  assert again.method == config.method
  methods.load(again.method.name).make(again)


def test_its_run_and_its_exported_encoder_are_read_again(tmp_path, monkeypatch):
  """From a recipe beside the package, whose folder the loader puts on the path."""
  monkeypatch.syspath_prepend(tmp_path / "elsewhere")  # restores the path afterwards
  for folder, name, text in (
    ("lab_runs", "agree", METHOD),
    ("recipes", "agree_digits", RECIPE.format(name="lab_runs.agree")),
  ):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / f"{name}.py").write_text(text)
  folder = tmp_path / "run"
  loop.run(recipes.load(str(tmp_path / "recipes" / "agree_digits.py")), str(folder))
  run, encoder = (loading.load(str(path)) for path in (folder, folder / "exported"))
  assert run.config.method.name == encoder.config.method.name == "lab_runs.agree"
  assert run.config.method.weight == encoder.config.method.weight == 2.0
  a, b = (pretrained.encoded(m, pretrained.source(run, "test"), limit=9) for m in (run, encoder))
  np.testing.assert_allclose(b["features"]["last"], a["features"]["last"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "text", "words"),
  [
    ("lab_gone.agree", None, "Python finds no module 'lab_gone': start in the folder that holds"),
    ("lab_part.gone", "", "no module 'lab_part.gone': start in the folder that holds lab_part, or"),
    ("lab_needs.m", "import lab_gone.x", "importing it failed with ModuleNotFoundError: No module"),
    (
      "lab_typo.m",
      "def make(:",
      "importing it failed with SyntaxError: .*import lab_typo.m' shows",
    ),
    ("lab_bare.m", "OPTIONS = {}", "/m.py defines no make(config) -> Method"),
    ("lab_free.m", "def make(config): pass", "/m.py defines no dict OPTIONS"),
    (".agree", None, "importing it failed with TypeError"),
    ("simclr", None, "is unknown: choose one of barlow_twins, .*, or name a module of your own"),
  ],
)
def test_what_is_no_method_is_refused_in_one_line(package, name, text, words):
  if text is not None:
    package(name.partition(".")[0], {"m": text})
  pattern = (
    re.escape(f"method.name={name!r}") + ".*" + words.replace("(", r"\(").replace(")", r"\)")
  )
  with pytest.raises(errors.UserError, match=pattern) as caught:
    methods.load(name)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("flags", "method"),
  [
    (
      ["--config.method.name=lab_flags.agree", "--config.method.weight=0.5"],
      {"name": "lab_flags.agree", "prototypes": "none", "num_prototypes": 0, "weight": 0.5},
    ),
    (
      ["--config.method.name", "swav", "--config.method.num_prototypes=40"],
      {"name": "swav", "prototypes": "mixture", "num_prototypes": 40, **swav.OPTIONS},
    ),
  ],
)
def test_another_method_than_the_recipe_s_brings_its_own_settings_and_flags(package, flags, method):
  package("lab_flags", {"agree": METHOD})
  config, _ = main.parse(["--config=quickstart:debug", "--workdir=w", *flags])  # of dino
  common = {
    "train_prototype_norm": False,
    "em_order": "after_step",
    "block": None,
    "precision": "highest",
  }
  assert config.method.to_dict() == {**common, **method}
