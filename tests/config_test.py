import os
import pathlib
import re

import jax
import pytest

from protojax import api, errors, methods, recipes, resolving, trees, typed
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
  program = programs.Program(resolving.resolve(config, len(train_source)), bank.num_classes)
  state, metrics = program.trace().out_info
  assert jax.tree.structure(state) == jax.tree.structure(program.abstract)
  assert metrics["train/loss"].shape == ()


@pytest.mark.parametrize("images", [160, 20_000])
def test_the_recipe_for_photos_fits_small_and_large_folders(images, caplog):
  config = resolving.resolve(recipes.load("gmm_photos"), images)
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
  config = resolving.resolve(recipes.load(name), 50_000)
  assert programs.Program(config, 10).trace().out_info[1]["train/loss"].shape == ()


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
  methods.load("falcon").make(resolving.resolve(config, 2000))


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
    typed.check_keys(["model.patchsize"], configs.default())
  typed.check_keys(["model.patch_size", "seed"], configs.default())


@pytest.mark.parametrize(
  ("name", "meant"),
  [
    ("optim.learning_rate", "optim.lr"),
    ("wd", "optim.weight_decay"),
    ("probe.batch", "probe"),
    ("lr", "optim.lr"),
    ("method.teacher_momentum", "teacher.momentum"),
  ],
)
def test_names_of_other_programs_are_understood(name, meant):
  with pytest.raises(errors.UserError, match=rf"did you mean config.{meant}"):
    typed.check_keys([name], configs.default())


@pytest.mark.parametrize(("block", "small"), [(None, None), (0, 0), (8192, 32)])
def test_a_debug_run_of_prototypes_by_blocks_has_blocks_too(block, small):
  config = configs.default()
  config.method.block = block
  assert configs.debug(config).method.block == small
