"""Mistakes of the user: one clear line, a non-zero status, nothing half-written."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from protojax import config as configs
from protojax import errors, main
from protojax.training import loop

pytestmark = pytest.mark.usefixtures("compile_fast")

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
  assert status == 2 and len(_lines(stderr)) == len(stderr.splitlines()) == 1
  assert "num_prototypes=1" in stderr and "at least 2" in stderr
  assert "Traceback" not in stderr and not (tmp_path / "run").exists()


# ml_collections 1.1 loads config files with a call that Python 3.12 has deprecated.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--workdir=w"], "--config is missing"),
    ([f"--config={QUICKSTART}"], "--workdir is missing"),
    (["--config=configs/nothing.py", "--workdir=w"], "no file 'configs/nothing.py'"),
    ([f"--config={QUICKSTART}", "--workdir=w", "--config.num_steps=many"], "num_steps"),
    (
      [f"--config={QUICKSTART}", "--workdir=w", "--wrokdir=x"],
      "no flag --wrokdir: did you mean --workdir",
    ),
    ([f"--config={QUICKSTART}", "--workdr=w"], "no flag --workdr: did you mean --workdir"),
    (["--confg=x", "--workdir=w"], "no flag --confg: did you mean --config"),
    (["--config.seed=1", "--workdir=w"], "--config is missing"),
    ([f"--config={QUICKSTART}", "--workdir=w", "--zzzz=x"], "no flag --zzzz: --help shows"),
  ],
)
def test_flags_that_do_not_parse_are_one_line(arguments, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    main.parse(["main", *arguments])
  assert "\n" not in str(caught.value)


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
  config = main.load(QUICKSTART)
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
    ({"monitor__images": 1}, "monitor.images=1"),
    ({"probe__batch_size": 12}, "probe.batch_size=12 cannot be split over 8"),
    ({"probe__k": 600}, "probe.k=600"),
    ({"init_from": "/nowhere"}, "no encoder.safetensors"),
    ({"mixture__beta_final": 2.0}, "anneal_steps"),
  ],
)
def test_numbers_out_of_range(tmp_path, changes, words):
  _refused(tmp_path, words, **changes)


def test_unknown_mode_of_a_recipe():
  with pytest.raises(errors.UserError, match="debgu is unknown"):
    main.load(QUICKSTART.replace(":debug", ":debgu"))


def test_unknown_names(tmp_path):
  _refused(tmp_path, "method.name='simclr' is unknown.*carp, dino", method__name="simclr")
  _refused(tmp_path, "model.name='vit_huge'", model__name="vit_huge")
  _refused(tmp_path, "method.prototypes='gmm'", method__prototypes="gmm")
  _refused(tmp_path, "mixture: .*mass='sum'.*ca or ema", mixture__mass="sum")


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


def test_workdir_of_another_run_is_refused_and_left_alone(tmp_path):
  loop.run(_config(tmp_path, num_steps=1, eval_every=1), str(tmp_path / "run"))
  before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.is_file())
  with pytest.raises(errors.UserError, match="seed 0 -> 1") as caught:
    loop.run(_config(tmp_path, num_steps=1, eval_every=1, seed=1), str(tmp_path / "run"))
  assert "\n" not in str(caught.value) and "another workdir" in str(caught.value)
  after = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.is_file())
  assert before == after


def test_importing_the_program_loads_no_tensorflow():
  code = "import sys, protojax.main, protojax.training; assert 'tensorflow' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_default_config_is_complete():
  assert configs.default().method.name == "dino"
