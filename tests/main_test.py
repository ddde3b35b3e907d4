"""Mistakes of the user: one clear line, a non-zero status, nothing half-written."""

import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from protojax import config as configs
from protojax import errors, main, recipes, resolving, trees
from protojax.training import loop
from protojax.training import workdir as workdirs

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.py:debug")


def _run(*arguments, **environment):
  """(status, stdout, stderr) of the program in a process of its own."""
  done = subprocess.run(
    [sys.executable, "-m", "protojax.main", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", **environment},
    timeout=300,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def _lines(stderr):
  return [line for line in stderr.splitlines() if line.startswith("protojax: ")]


def test_unknown_key_is_one_line_with_the_nearest(tmp_path):
  status, _, stderr = _run(
    f"--config={QUICKSTART}", f"--workdir={tmp_path / 'run'}", "--config.optim.learning_rate=1"
  )
  assert status == 2
  assert (
    _lines(stderr)
    == [
      "protojax: unknown config key --config.optim.learning_rate: did you mean --config.optim.lr?"
    ]
    or "--config.optim." in _lines(stderr)[0]
  )
  assert "Traceback" not in stderr and not (tmp_path / "run").exists()


def test_mistake_found_after_the_flags_is_one_line_too(tmp_path):
  status, _, stderr = _run(
    f"--config={QUICKSTART}", f"--workdir={tmp_path / 'run'}", "--config.method.num_prototypes=1"
  )
  assert status == 2 and len(_lines(stderr)) == 1
  assert "num_prototypes=1" in stderr and "at least 2" in stderr
  assert "Traceback" not in stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--workdir=w"], "--config is missing: protojax train --config=quickstart .* --help lists"),
    ([f"--config={QUICKSTART}"], "--workdir is missing"),
    (["--config=configs/nothing.py", "--workdir=w"], "no file 'configs/nothing.py'"),
    ([f"--config={QUICKSTART}", "--workdir=w", "--config.num_steps=many"], "num_steps"),
    ([f"--config={QUICKSTART}", "--workdir=w", "--config.num_steps"], "num_steps"),
    (["--config=quickstart", "--wrokdir=x"], "no flag --wrokdir=x: did you mean --workdir"),
    (["--confg=x", "--workdir=w"], "no flag --confg=x: did you mean --config"),
    (["--config.seed=1", "--workdir=w"], "--config is missing"),
    (
      [f"--config={QUICKSTART}", "--workdir=w", "--config.num_steps=1e3"],
      "1e3: a whole number, such as 100, is",
    ),
    (
      [f"--config={QUICKSTART}", "--workdir=w", "--config.optim.lr=x"],
      "optim.lr=x: a number, such as 0.1, is wan",
    ),
    (
      [f"--config={QUICKSTART}", "--workdir=w", "--config.overwrite=x"],
      "overwrite=x: True or False is wanted",
    ),
    (["--config=quickstart", "--num_steps=100"], r"did you mean --config.num_steps=100\?"),
    (["--config=quickstart", "--lr=.1"], r"did you mean --config.optim.lr=.1\?"),
    (["--config=quickstart", "--teacher_momentum"], r"did you mean --config.teacher.momentum\?"),
    (
      ["quickstart"],
      "quickstart stands alone: did you mean --config=quickstart or --workdir=quick",
    ),
    (["--config=quickstart", "--workdir=w", "--zzzz=x"], "unrecognized arguments: --zzzz=x"),
    (["--config=quickstart", "--workdir=w", "stray"], "unrecognized arguments: stray"),
  ],
)
def test_flags_that_do_not_parse_are_one_line(arguments, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    main.parse(arguments)
  assert "\n" not in str(caught.value)


def _parsed(*arguments):
  return main.parse(["--workdir=w", *arguments])[0]


def test_a_setting_is_typed_with_its_value_beside_it_or_after_it():
  config = _parsed(
    "--config=gmm_vit_s",
    *("--config.mesh.data", "-1", "--config.overwrite", "--config.seed", "7"),
    *("--config.augment.mean=(.5, .5, .5)", "--config.data.name", "folder"),
    *("--config.data.data_dir=x", "--config.mixture.horizon_final=9", "--config.probe.name=None"),
  )
  assert config.overwrite is True and config.mesh.data == -1 and config.seed == 7
  assert config.augment.mean == (0.5, 0.5, 0.5) and config.mixture.horizon_final == 9.0
  assert (config.data.name, config.data.data_dir, config.probe.name) == ("folder", "x", None)


def test_a_typed_length_takes_the_place_of_the_recipe_s():
  assert recipes.load("gmm_vit_s").num_epochs == 100.0
  short = _parsed("--config=gmm_vit_s", "--config.num_steps=100")
  assert (short.num_steps, short.num_epochs) == (100, 0.0)
  assert resolving.resolve(short, 1_281_167).optim.warmup_steps == 10
  epochs = _parsed("--config=quickstart", "--config.num_epochs", "2")
  assert (epochs.num_steps, epochs.num_epochs) == (0, 2.0)
  assert resolving.resolve(epochs, 1442).num_steps == 44
  both = _parsed("--config=quickstart", "--config.num_epochs=2", "--config.num_steps=9")
  with pytest.raises(errors.UserError, match="exactly one"):
    resolving.resolve(both, 1442)


def test_a_debug_run_is_on_digits_and_says_so_unless_a_folder_is_typed(caplog):
  caplog.set_level("INFO")
  assert _parsed("--config=gmm_photos:debug").data.name == "digits"
  assert "gmm_photos:debug is on the digits of scikit-learn; config.data.data_dir=" in caplog.text
  caplog.clear()
  typed = ("--config.data.name=folder", "--config.data.data_dir=IMAGES")
  for words in (typed, typed[1:]):
    for recipe in ("gmm_photos:debug", "gmm_photos"):
      config = _parsed(f"--config={recipe}", *words)
      assert (config.data.name, config.data.data_dir) == ("folder", "IMAGES")
  assert _parsed("--config=quickstart:debug").data.name == "digits" and not caplog.text
  assert _parsed("--config=quickstart:debug", typed[1]).data.name == "digits"
  assert "data_dir=IMAGES is not looked at: quickstart:debug is on the digits" in caplog.text


def _help(capsys, *arguments):
  with pytest.raises(SystemExit) as stopped:
    main.parse([*arguments, "--help"])
  assert not stopped.value.code
  return capsys.readouterr().out


def test_help_lists_the_recipes_and_says_how_to_set_a_key(capsys):
  said = _help(capsys)
  together = " ".join(said.split())
  assert all(f" {name} {recipes.title(name)}" in together for name in recipes.names())
  assert "on the digits of scikit-learn or what --config.data.data_dir and" in together
  assert "--config.KEY=VALUE" in said and "protojax train --config=gmm_vit_s --help" in said
  assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize("recipe", ["gmm_vit_s", "falcon_cifar10:debug"])
def test_help_of_a_recipe_is_the_command_line_that_would_make_it(capsys, recipe):
  said = _help(capsys, f"--config={recipe}")
  typed = [shlex.split(line, comments=True) for line in said.splitlines()]
  again = _parsed("--config=quickstart", *sum(typed, []))
  assert again.to_dict() == recipes.load(recipe).to_dict()
  assert {f"--config.{key}" for key in trees.flat(recipes.load(recipe))} == {
    flag.partition("=")[0] for flag in sum(typed, [])
  }


def test_help_of_a_recipe_tells_units_choices_and_what_it_changes(capsys):
  said = _help(capsys, "--config=gmm_vit_s", "--config.optim.lr=1")
  assert "  --config.optim.lr=1.0  # per 256 images; default: 0.0005\n" in said
  assert "  --config.method.targets=sinkhorn  # center or sinkhorn; default: center\n" in said
  assert "  # labelled images for k-NN, linear probe, monitor\n  --config.probe." in said
  assert (
    "  # Microbatches of the encoder's forward inside one exact loss; another number on resume\n"
    "  # redraws drop path.\n  --config.accum_steps=1\n"
  ) in said


def _folder(root, names, corrupt=()):
  rng = np.random.default_rng(0)
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(path)
  for name in corrupt:
    (root / name).write_bytes(b"not an image")
  return root


def _config(tmp_path, **changes):
  config = recipes.load(QUICKSTART)
  for key, value in changes.items():
    section, _, leaf = key.replace("__", ".").rpartition(".")
    (config[section] if section else config)[leaf] = value
  return config


def _refused(tmp_path, words, **changes):
  with pytest.raises(errors.UserError, match=words) as caught:
    loop.run(_config(tmp_path, **changes), str(tmp_path / "run"))
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "run").exists()


def test_missing_data_folder(tmp_path):
  _refused(tmp_path, "gone", data__name="folder", data__data_dir=str(tmp_path / "gone"))


def test_missing_tfds_folder(tmp_path):
  _refused(tmp_path, "gone", data__name="cifar10", data__data_dir=str(tmp_path / "gone"))


def test_empty_folder(tmp_path):
  (tmp_path / "empty").mkdir()
  _refused(tmp_path, "empty", data__name="folder", data__data_dir=str(tmp_path / "empty"))


def test_labels_asked_of_unlabelled_data(tmp_path):
  flat = _folder(tmp_path / "flat", [f"{i}.png" for i in range(20)])
  _refused(
    tmp_path,
    "labels",
    probe__name="folder",
    probe__data_dir=str(flat),
    probe__train_split="",
    probe__test_split="",
  )


def test_splits_with_different_classes(tmp_path):
  names = [f"train/{c}/{i}.png" for c in "abc" for i in range(8)]
  root = _folder(tmp_path / "two", names + [f"test/{c}/{i}.png" for c in "ac" for i in range(4)])
  _refused(
    tmp_path,
    "different classes .3 and 2.: give both the same class_names .of a folder",
    data__name="folder",
    data__data_dir=str(root),
  )


def test_batch_that_the_devices_do_not_divide(tmp_path):
  _refused(tmp_path, "batch_size=12 cannot be split over 8 devices", batch_size=12)


def test_crop_that_the_patch_does_not_divide(tmp_path):
  _refused(tmp_path, "patch", augment__local_size=12)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"batch_size": 0}, "batch_size=0"),
    ({"log_every": 0}, "log_every=0"),
    ({"optim__lr": -0.1}, "optim.lr=-0.1 must not be negative: set config.optim.lr"),
    ({"optim__lr": float("nan")}, "optim.lr=nan must be a finite number"),
    ({"optim__weight_decay": float("nan")}, "optim.weight_decay=nan must be"),
    ({"optim__clip": -3.0}, "optim.clip=-3.0 must not be"),
    ({"optim__warmup_steps": -1}, "optim.warmup_steps=-1 must not be"),
    # Before the images are looked for:
    ({"num_steps": 0, "data__name": "folder", "data__data_dir": "/nowhere"}, "num_steps=0 and num"),
    ({"data__name": "digit"}, r"data.name='digit' is unknown: did you mean digits\?"),
    ({"monitor__images": 1}, "monitor.images=1"),
    ({"probe__batch_size": 12}, "probe.batch_size=12 cannot be split over 8"),
    ({"probe__k": 600}, "probe.k=600"),
    (
      {"init_from": "/nowhere"},
      "config.init_from=/nowhere: there is no /nowhere: give the workdir",
    ),
    ({"mixture__beta_final": 2.0}, "anneal_steps"),
  ],
)
def test_numbers_out_of_range(tmp_path, changes, words):
  _refused(tmp_path, words, **changes)


def test_unknown_mode_of_a_recipe():
  with pytest.raises(errors.UserError, match="'debgu' is unknown"):
    recipes.load(QUICKSTART.replace(":debug", ":debgu"))


def test_unknown_names(tmp_path):
  _refused(tmp_path, "method.name='simclr' is unknown.*carp, dino", method__name="simclr")
  _refused(tmp_path, "model.name='vit_huge'", model__name="vit_huge")
  _refused(tmp_path, "method.prototypes='gmm'", method__prototypes="gmm")
  _refused(tmp_path, "mixture: .*mass='sum'.*ca or ema", mixture__mass="sum")


@pytest.mark.survives(
  "images that cannot be read",
  "one of 30 in a folder",
  "skipped, counted and named",
)
def test_corrupt_images_are_skipped_counted_and_named(tmp_path, caplog):
  root = _folder(tmp_path / "images", [f"{i:02d}.png" for i in range(30)], corrupt=["05.png"])
  config = _config(
    tmp_path,
    data__name="folder",
    data__data_dir=str(root),
    batch_size=16,
    num_steps=4,
    eval_every=4,
  )
  with caplog.at_level("WARNING"):
    loop.run(config, str(tmp_path / "run"))
  named = [r.getMessage() for r in caplog.records if "05.png" in r.getMessage()]
  assert len(named) == 1 and "corrupt" in named[0]


@pytest.mark.xdist_group("train")
def test_workdir_of_another_run_is_refused_and_left_alone(finished_run):
  def files():
    return sorted((p, p.stat().st_mtime_ns) for p in finished_run.rglob("*") if p.is_file())

  before = files()
  with pytest.raises(errors.UserError, match="seed 0 -> 1") as caught:
    loop.run(tiny.run_config(seed=1), str(finished_run))
  assert "\n" not in str(caught.value) and "another workdir" in str(caught.value)
  assert files() == before


def test_importing_the_program_loads_no_tensorflow():
  code = "import sys, protojax.main, protojax.training; assert 'tensorflow' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_default_config_is_complete():
  assert configs.default().method.name == "dino"


def test_one_task_of_slurm_takes_every_gpu_that_it_sees(monkeypatch):
  """Told of a cluster of one, JAX would give it the one GPU of its local rank."""
  joined = []
  monkeypatch.setattr("jax.distributed.initialize", lambda *given: joined.append(given))
  _, args = main.parse([f"--config={QUICKSTART}", "--workdir=unused"])
  monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
  for tasks, expected in (("1", []), ("2", [()])):
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    main._connect(args)
    assert joined == expected


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--num_processes=2", "--process_id=0"], "need --coordinator_address too: host:port"),
    (["--process_id=0"], "need --coordinator_address"),
    (["--coordinator_address=x:1", "--num_processes=2", "--process_id=2"], "counted from 0 to 1"),
    (["--coordinator_address=x:1", "--num_processes=2", "--process_id=-1"], "counted from 0 to 1"),
    (["--coordinator_address=x:1"], "needs --num_processes and --process_id too"),
  ],
)
def test_processes_that_cannot_meet_are_refused_at_once(flags, words):
  _, args = main.parse([f"--config={QUICKSTART}", "--workdir=unused", *flags])
  with pytest.raises(errors.UserError, match=words):
    main._connect(args)


def test_a_typed_length_does_not_leave_the_run_in_its_warm_up():
  def warmup(*typed):
    return main.parse(["--config=gmm_cifar10", "--workdir=unused", *typed])[0].optim.warmup_steps

  assert warmup() == 200
  assert warmup("--config.num_steps=400") == 200
  assert warmup("--config.num_steps=150") == 15
  none = main.parse(["--config=gmm_vit_s", "--workdir=unused", "--config.optim.warmup_steps=0"])[0]
  assert resolving.resolve(none, 1_281_167).optim.warmup_steps == 0
  assert warmup("--config.num_steps=150", "--config.optim.warmup_steps=90") == 90


def test_a_workdir_in_the_folder_of_images_is_refused(tmp_path):
  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  for workdir in (tmp_path, tmp_path / "runs" / "own"):
    config = tiny.config(data__name="folder", data__data_dir=str(tmp_path))
    with pytest.raises(errors.UserError, match="lies in the folder of images"):
      workdirs.claim(str(workdir), config)
  assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_memory_is_kept_before_anybody_asks_for_devices(monkeypatch, tmp_path):
  """Behind that, JAX has chosen the thread of its steps, and nothing is kept."""
  asked = []
  monkeypatch.setattr("jax.distributed.initialize", lambda *_: None)
  monkeypatch.setattr("protojax.environment.keep_memory", lambda: asked.append("memory"))
  monkeypatch.setattr("jax.process_count", lambda: asked.append("devices") or 1)
  monkeypatch.setattr("jax.default_backend", lambda: asked.append("devices") or "cpu")
  monkeypatch.setattr("protojax.api.train", lambda *_: asked.append("train"))
  main.main([f"--workdir={tmp_path}", "--config=configs/quickstart.py"])
  assert asked[0] == "memory" and asked[-1] == "train"
