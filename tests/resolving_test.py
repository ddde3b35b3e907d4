import pytest

from protojax import config as configs
from protojax import errors, recipes, resolving, typed


def test_length_is_given_exactly_once():
  config = configs.default()
  config.batch_size = 10
  with pytest.raises(errors.UserError, match="exactly one"):
    resolving.resolve(config, 100)
  config.num_steps, config.num_epochs = 5, 1.0
  with pytest.raises(errors.UserError, match="exactly one"):
    resolving.resolve(config, 100)


def test_epochs_become_steps_and_the_original_stays():
  config = configs.default()
  config.update({"batch_size": 10, "num_epochs": 30.0})
  out = resolving.resolve(config, 105)
  assert (out.steps_per_epoch, out.num_steps) == (10, 300)
  assert out.optim.warmup_steps == 30  # ten epochs would be 100: a tenth of the run at most
  assert out.optim.freeze_prototypes_steps == 10
  assert out.mixture.horizon_final == out.mixture.horizon_steps == 600.0
  assert config.num_steps == 0 and config.probe.name is None and out.probe.name == "digits"


@pytest.mark.parametrize(("epochs", "steps"), [(30.0, 150), (60.0, 300), (0.1, 1)])
def test_the_paper_s_mixture_anneals_over_half_of_any_run(epochs, steps):
  config = recipes.load("gmm_vit_s:paper")
  config.update({"batch_size": 10, "num_epochs": epochs})
  assert resolving.resolve(config, 105).mixture.anneal_steps == steps


def test_warmup_that_is_asked_for_in_steps_is_kept():
  config = configs.default()
  config.update({"batch_size": 10, "num_steps": 50})
  config.optim.warmup_steps = 40
  assert resolving.resolve(config, 100).optim.warmup_steps == 40


@pytest.mark.parametrize(
  ("steps", "words"), [(150, "still rising at the end"), (390, "more than half"), (400, "")]
)
def test_a_warm_up_that_fills_a_shortened_run_is_told(steps, words, caplog):
  config = recipes.load("gmm_cifar10")  # whose warm-up is 200 steps
  config.num_steps = steps
  resolving.resolve(config, 50_000)
  assert ("optim.warmup_steps=200" in caplog.text) == bool(words) and words in caplog.text


def test_a_debug_run_is_not_told_about_its_own_warm_up(caplog):
  resolving.resolve(recipes.load("quickstart:debug"), 1442)
  assert not caplog.text


def test_batch_larger_than_the_source_is_refused():
  config = configs.default()
  config.num_steps = 5
  with pytest.raises(errors.UserError, match="batch_size=1024 is more than the 100 images"):
    resolving.resolve(config, 100)


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("seed", 3_000_000_000, "seed=3000000000 must be -2147483648 to 2147483647"),
    ("steps_per_epoch", -5, "steps_per_epoch must not be negative"),
    ("teacher.momentum", 1.5, "teacher.momentum=1.5 must be 0 to 1: set config.teacher.momentum"),
    ("mixture.horizon_steps", -7.0, "mixture.horizon_steps=-7.0 must be at least 0: set"),
    ("mixture.horizon_final", 0.0, "mixture.horizon_final=0.0 must be above 0"),
    ("mixture.beta_final", -1.0, "mixture.beta_final=-1.0 must be above 0"),
    ("augment.global_scale", (0.4, "1"), r"augment.global_scale=\(0.4, '1'\) must be numbers"),
    ("mesh.rules", ("fsdp",), "must be pairs such as"),
  ],
)
def test_numbers_that_no_run_can_have_are_one_line(key, value, words):
  config = recipes.load("quickstart:debug")
  with config.ignore_type():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.UserError, match=words) as caught:
    resolving.check(config)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_mean_that_is_typed_as_none_is_measured(key):
  config = typed.config("quickstart:debug", [(f"augment.{key}", "None")])
  resolving.check(config)
  assert resolving.to_be_measured(config, key)


@pytest.mark.parametrize(
  ("recipe", "typed_as", "changed"),
  [
    ("gmm_photos", {"optim.warmup_epochs": "5", "num_epochs": "100"}, "optim.warmup_steps"),
    ("quickstart", {"mixture.horizon_epochs": "3"}, "mixture.horizon_steps"),
    ("adapt_cifar10", {"optim.freeze_backbone_epochs": "2"}, "optim.freeze_backbone_steps"),
  ],
)
def test_epochs_that_are_typed_take_the_place_of_the_recipe_s_steps(recipe, typed_as, changed):
  config = typed.config(recipe, list(typed_as.items()))
  epochs = float(next(iter(typed_as.values())))
  section, key = changed.split(".")
  found = resolving.resolve(config, 6400)
  assert found[section][key] == epochs * found.steps_per_epoch
  assert recipes.load(recipe)[section][key] not in (0, found[section][key])


def test_of_one_length_that_is_typed_twice_it_is_said_which_counts(caplog):
  twice = [("optim.warmup_steps", "10"), ("optim.warmup_epochs", "2")]
  resolved = resolving.resolve(typed.config("gmm_cifar10", twice), 50_000)
  assert resolved.optim.warmup_steps == 10
  said = "config.optim.warmup_steps=10 counts, config.optim.warmup_epochs=2 does not"
  assert said in caplog.text


def test_a_horizon_that_a_longer_run_outlives_is_said(caplog):
  changes = [("num_steps", "10000"), ("data.name", "digits")]
  resolving.resolve(typed.config("quickstart", changes), 1442)
  assert "horizon_steps=7000 is less than the run of 10000 steps" in caplog.text
  caplog.clear()
  resolving.resolve(typed.config("gmm_cifar10", [("mixture.horizon_epochs", "1")]), 50_000)
  assert "horizon_steps=390 is less than the run of 2000 steps" in caplog.text
  caplog.clear()
  for recipe, changed in (("quickstart", []), ("quickstart:joint", changes)):
    resolving.resolve(typed.config(recipe, changed), 1442)
  resolving.resolve(typed.config("quickstart", [*changes, ("mixture.horizon_steps", "0")]), 1442)
  assert "is less than the run" not in caplog.text


def test_settings_that_nothing_reads_are_said(caplog):
  changes = [("mixture.kappa", "20"), ("augment.local_size", "(16, 16)")]
  typed.config("dino_cifar10", [*changes, ("augment.num_local", "0")])
  said = "config.mixture.kappa changes nothing here: method.prototypes='learned' is no mixture"
  assert said in caplog.text and "config.augment.local_size changes nothing here" in caplog.text
  caplog.clear()
  typed.config("gmm_cifar10", [("mixture.kappa", "20")])
  assert not caplog.text


def test_a_method_named_on_the_command_line_brings_its_options():
  config = configs.debug(configs.default())
  config.method.name = "carp"
  assert resolving.resolve(config, 64).method.partition_size == 512
  with pytest.raises(errors.UserError, match="'crap' is unknown: choose one of barlow_twins, carp"):
    configs.default("crap")


def test_a_random_backbone_that_stands_still_is_said(caplog):
  recipe = recipes.load("adapt_cifar10")
  out = resolving.resolve(recipe, 50_000)
  assert out.optim.freeze_backbone_steps == 300 and "a random one: give its weights" in caplog.text
  caplog.clear()
  recipe.init_from = "runs/weights"
  recipe.optim.update({"freeze_backbone_steps": 0, "freeze_backbone_epochs": 2.0})
  assert resolving.resolve(recipe, 5000).optim.freeze_backbone_steps == 2 * (5000 // 128)
  assert "random one" not in caplog.text
  assert resolving.resolve(recipes.load("adapt_vit_s:debug"), 1442).optim.freeze_backbone_steps == 5


def test_learned_prototypes_that_never_move_are_said_to_be(caplog):
  config = recipes.load("swav_resnet50")
  config.num_epochs, config.num_steps = 0.0, 3000
  resolving.resolve(config, 50_000)
  assert "freeze_prototypes_steps=5005 of 3000 steps: learned prototypes never move" in caplog.text
  caplog.clear()
  debug = resolving.resolve(recipes.load("swav_resnet50:debug"), 1442)
  assert debug.optim.freeze_prototypes_steps == 2 and not caplog.text
