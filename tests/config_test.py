import os
import pathlib
import re

import jax
import pytest

from protojax import api, errors, methods, recipes, trees
from protojax import config as configs
from protojax.training import datasets, loop, programs, sharding

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RECIPES = sorted(p for p in CONFIGS.glob("*.py") if p.stem != "common")
# Methods whose run is made to its end: the one that does something between epochs, where no other
# test trains to its end; all with PROTOJAX_TEST_ALL.
RUN = methods.names() if os.environ.get("PROTOJAX_TEST_ALL") else ["pcl"]
_RECIPES_RUN = [f"{name}_cifar10" for name in RUN]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_changes_only_known_keys_and_its_debug_mode_is_small(path):
  full, debug = recipes.load(str(path)), recipes.load(f"{path}:debug")
  known = set(trees.flat(configs.default(full.method.name)))
  assert set(trees.flat(full)) == known and set(trees.flat(debug)) == known
  assert debug.data.name == "digits" and debug.data.data_dir is None
  assert debug.model.depth == 2 and debug.method.num_prototypes <= 256


# Those that no test runs to their end. Without PROTOJAX_TEST_ALL not those for CIFAR-10: what their
# debug step has beside the others' is in a row of `train_step_test.py`.
_TRACED = [
  p
  for p in RECIPES
  if p.stem not in _RECIPES_RUN
  and ("PROTOJAX_TEST_ALL" in os.environ or not p.stem.endswith("_cifar10"))
]


@pytest.mark.parametrize("path", _TRACED, ids=lambda p: p.stem)
def test_debug_step_of_a_recipe_traces(path):
  config = recipes.load(f"{path}:debug")
  train_source, bank, test = datasets.of_run(config)
  assert test is not None
  program = programs.Program(configs.resolve(config, len(train_source)), bank.num_classes)
  state, metrics = program.trace().out_info
  assert jax.tree.structure(state) == jax.tree.structure(program.abstract)
  assert metrics["train/loss"].shape == ()


@pytest.mark.parametrize("images", [160, 20_000])
def test_the_recipe_for_photos_fits_small_and_large_folders(images, caplog):
  config = configs.resolve(recipes.load("gmm_photos"), images)
  assert config.data.name == "folder" and config.optim.warmup_steps == config.num_steps // 10
  for every in (config.log_every, config.save_every, config.eval_every, config.monitor.every):
    assert config.num_steps % every == 0
  assert config.num_steps >= 2 * config.eval_every >= 2 * config.monitor.every
  assert config.data.image_size >= 2 * config.augment.global_size and not caplog.text


_MODES = ["gmm_cifar10:paper"]
if "PROTOJAX_TEST_ALL" in os.environ:
  _MODES += [
    "falcon_resnet8_cifar10:barlow_twins",
    "falcon_resnet8_cifar10:gedi",
    "falcon_resnet8_cifar10:self_classifier",
    "falcon_resnet8_cifar10:swav",
    "gmm_vit_s:paper",
    "ibot_vit_s:gmm",
    "carp_resnet50:gmm",
  ]


@pytest.mark.parametrize("name", _MODES)
def test_a_mode_of_a_recipe_traces_at_its_real_size(name):
  config = configs.resolve(recipes.load(name), 50_000)
  assert programs.Program(config, 10).trace().out_info[1]["train/loss"].shape == ()


@pytest.mark.usefixtures("compile_fast")
@pytest.mark.parametrize("name", RUN)
def test_debug_run_of_a_method_ends_with_measures_and_files(name, tmp_path, monkeypatch):
  """Twenty steps cannot do better than pixels, but a broken feature is at chance, a tenth."""
  # One device, as a reader's CPU is: less to compile.
  make_mesh, one = sharding.make_mesh, jax.devices()[:1]
  monkeypatch.setattr(sharding, "make_mesh", lambda data, model, *_: make_mesh(data, model, one))
  config = recipes.load(str(CONFIGS / f"{name}_cifar10.py:debug"))
  assert config.method.name == name
  with_report = name in ("dino", "vicreg")  # with prototypes and without
  measures = (api.train if with_report else loop.run)(config, str(tmp_path))
  assert measures["step"] == 20 and measures["probe/knn"] > 0.2
  for file in ("eval/final/result.json", "exported/encoder.safetensors"):
    assert (tmp_path / file).stat().st_size > 0
  for file in ("report.png", "report.html"):
    assert (tmp_path / file).exists() == with_report


def test_the_largest_dictionary_that_its_recipe_names_is_possible():
  path = CONFIGS / "falcon_vit_s.py"
  named = re.findall(r"--config\.(method\.\w+)=([\d_]+)", path.read_text())
  assert dict(named) == {"method.num_prototypes": "500_000"}
  config = recipes.load(str(path))
  for key, value in named:
    config.method[key.split(".")[1]] = int(value)
  methods.load("falcon").make(configs.resolve(config, 2000))


def test_unknown_mode_of_a_recipe_names_those_it_has():
  with pytest.raises(errors.UserError, match=r"py:gmn: mode 'gmn' is .* has debug, gmm$"):
    recipes.load(str(CONFIGS / "swav_cifar10.py:gmn"))
  assert recipes.load(str(CONFIGS / "swav_cifar10.py:gmm")).method.prototypes == "mixture"
  assert recipes.load(str(CONFIGS / "swav_cifar10.py")).method.prototypes == "learned"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_says_its_command(path):
  text = path.read_text()
  assert f"protojax train --config={path.stem}" in text.split('"""')[1]


def test_unknown_key_names_the_nearest():
  with pytest.raises(errors.UserError, match=r"model.patchsize: did you mean config.model.patch"):
    configs.check_keys(["model.patchsize"], configs.default())
  configs.check_keys(["model.patch_size", "seed"], configs.default())


def test_length_is_given_exactly_once():
  config = configs.default()
  config.batch_size = 10
  with pytest.raises(errors.UserError, match="exactly one"):
    configs.resolve(config, 100)
  config.num_steps, config.num_epochs = 5, 1.0
  with pytest.raises(errors.UserError, match="exactly one"):
    configs.resolve(config, 100)


def test_epochs_become_steps_and_the_original_stays():
  config = configs.default()
  config.update({"batch_size": 10, "num_epochs": 30.0})
  out = configs.resolve(config, 105)
  assert (out.steps_per_epoch, out.num_steps) == (10, 300)
  assert out.optim.warmup_steps == 30  # ten epochs would be 100: a tenth of the run at most
  assert out.optim.freeze_prototypes_steps == 10
  assert out.mixture.horizon_final == out.mixture.horizon_steps == 600.0
  assert config.num_steps == 0 and config.probe.name is None and out.probe.name == "digits"


@pytest.mark.parametrize(("epochs", "steps"), [(30.0, 150), (60.0, 300), (0.1, 1)])
def test_the_paper_s_mixture_anneals_over_half_of_any_run(epochs, steps):
  config = recipes.load("gmm_vit_s:paper")
  config.update({"batch_size": 10, "num_epochs": epochs})
  assert configs.resolve(config, 105).mixture.anneal_steps == steps


def test_warmup_that_is_asked_for_in_steps_is_kept():
  config = configs.default()
  config.update({"batch_size": 10, "num_steps": 50})
  config.optim.warmup_steps = 40
  assert configs.resolve(config, 100).optim.warmup_steps == 40


@pytest.mark.parametrize(
  ("steps", "words"), [(150, "still rising at the end"), (390, "more than half"), (400, "")]
)
def test_a_warm_up_that_fills_a_shortened_run_is_told(steps, words, caplog):
  config = recipes.load("gmm_cifar10")  # whose warm-up is 200 steps
  config.num_steps = steps
  configs.resolve(config, 50_000)
  assert ("optim.warmup_steps=200" in caplog.text) == bool(words) and words in caplog.text


def test_a_debug_run_is_not_told_about_its_own_warm_up(caplog):
  configs.resolve(recipes.load("quickstart:debug"), 1442)
  assert not caplog.text


@pytest.mark.parametrize(
  ("typed", "meant"),
  [
    ("optim.learning_rate", "optim.lr"),
    ("wd", "optim.weight_decay"),
    ("probe.batch", "probe"),
    ("lr", "optim.lr"),
    ("method.teacher_momentum", "teacher.momentum"),
  ],
)
def test_names_of_other_programs_are_understood(typed, meant):
  with pytest.raises(errors.UserError, match=rf"did you mean config.{meant}"):
    configs.check_keys([typed], configs.default())


def test_batch_larger_than_the_source_is_refused():
  config = configs.default()
  config.num_steps = 5
  with pytest.raises(errors.UserError, match="batch_size=1024 is more than the 100 images"):
    configs.resolve(config, 100)


def test_a_method_named_on_the_command_line_brings_its_options():
  config = configs.debug(configs.default())
  config.method.name = "carp"
  assert configs.resolve(config, 64).method.partition_size == 512
  with pytest.raises(errors.UserError, match="'crap' is unknown: choose one of barlow_twins, carp"):
    configs.default("crap")


def test_a_random_backbone_that_stands_still_is_said(caplog):
  recipe = recipes.load("adapt_cifar10")
  out = configs.resolve(recipe, 50_000)
  assert out.optim.freeze_backbone_steps == 300 and "a random one: give its weights" in caplog.text
  caplog.clear()
  recipe.init_from = "runs/weights"
  recipe.optim.update({"freeze_backbone_steps": 0, "freeze_backbone_epochs": 2.0})
  assert configs.resolve(recipe, 5000).optim.freeze_backbone_steps == 2 * (5000 // 128)
  assert "random one" not in caplog.text
  assert configs.resolve(recipes.load("adapt_vit_s:debug"), 1442).optim.freeze_backbone_steps == 5
