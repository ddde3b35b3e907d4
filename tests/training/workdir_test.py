"""Whose folder it is."""

import errno
import json
import os
import signal

import numpy as np
import pytest

from protojax import config as configs
from protojax import data, errors, files, progress, resolving
from protojax.training import workdir


def _config(**changes):
  config = configs.default()
  config.num_steps = 100
  for key, value in changes.items():
    section, _, leaf = key.replace("__", ".").rpartition(".")
    (config[section] if section else config)[leaf] = value
  return config


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"seed": 1}, ["seed 0 -> 1"]),
    ({"num_steps": 50}, ["num_steps 100 -> 50"]),
    ({"num_steps": 50, "resume": "extend"}, ["num_steps 100 -> 50"]),
    (
      {"num_steps": 200, "seed": 1, "resume": "extend"},
      ["num_steps 100 -> 200", "seed 0 -> 1"],
    ),
    (
      {"batch_size": 512, "method__num_prototypes": 2048},
      ["batch_size 1024 -> 512", "method.num_prototypes 65536 -> 2048"],
    ),
    (
      {"method__name": "carp", "method__prototypes": "learned"},
      ["method.name dino -> carp", "method.prototypes mixture -> learned"],
    ),
    ({"mixture__covariance": "diagonal"}, ["mixture.covariance isotropic -> diagonal"]),
    (
      {"model__patch_size": 8, "head__hidden": 64},
      ["model.patch_size 16 -> 8", "head.hidden 2048 -> 64"],
    ),
    (
      {"data__split": "test", "data__imbalance": 100.0},
      ["data.split train -> test", "data.imbalance None -> 100.0"],
    ),
    (
      {"augment__num_local": 2, "augment__global_scale": (0.2, 1.0)},
      ["augment.num_local 8 -> 2", "augment.global_scale [0.4, 1.0] -> [0.2, 1.0]"],
    ),
    (
      {"optim__lr": 1e-3, "teacher__momentum": 0.99},
      ["optim.lr 0.0005 -> 0.001", "teacher.momentum 0.996 -> 0.99"],
    ),
    (
      {"precision": "bfloat16", "data__channels": 5, "data__value_range": (0.0, 1.0)},
      [
        "precision float32 -> bfloat16",
        "data.channels 3 -> 5",
        "data.value_range None -> [0.0, 1.0]",
      ],
    ),
  ],
)
def test_settings_of_another_run_are_named_in_one_line(changes, words):
  before = json.loads(json.dumps(_config().to_dict()))
  with pytest.raises(errors.UserError) as caught:
    workdir.refuse_mismatch(before, _config(**changes))
  line = str(caught.value)
  assert all(word in line for word in words) and line.count("->") == len(words)
  assert "\n" not in line and "another workdir" in line and "overwrite" in line


def test_settings_that_do_not_change_the_numbers_may_change():
  before = json.loads(json.dumps(_config().to_dict()))
  free = _config(
    log_every=1,
    save_every=2,
    eval_every=3,
    keep_checkpoints=5,
    accum_steps=4,
    overwrite=True,
    data__data_dir="/elsewhere",
    data__num_workers=8,
    mesh__data=4,
    mesh__model=2,
    monitor__every=7,
    monitor__stop_on_collapse=True,
    probe__k=5,
    probe__limit=9,
    probe__batch_size=0,
    probe__name="folder",
    probe__train_split="validation",
    model__remat=True,
    method__block=4,
    optim__skip_nonfinite=3,
    wandb="project",
  )
  workdir.refuse_mismatch(before, free)


def _resolved(**changes):
  return resolving.resolve(_config(batch_size=50, **changes), 1000)


def test_a_longer_run_is_refused_with_its_ways_out_unless_it_is_asked_for():
  before = json.loads(json.dumps(_resolved().to_dict()))
  with pytest.raises(errors.UserError) as caught:
    workdir.refuse_mismatch(before, _resolved(num_steps=200))
  line = str(caught.value)
  assert "a run of 100 steps; with 200" in line and "\n" not in line
  for way in ("config.resume=extend", "another workdir with config.init_from=WORKDIR/exported"):
    assert way in line
  workdir.refuse_mismatch(before, _resolved(num_steps=200, resume="extend"))
  epochs = _config(batch_size=50, num_steps=0, num_epochs=10.0, resume="extend")
  workdir.refuse_mismatch(before, resolving.resolve(epochs, 1000))


def test_what_follows_from_a_changed_setting_is_not_listed_beside_it():
  before = json.loads(json.dumps(_resolved().to_dict()))
  other = _config(batch_size=25)
  with pytest.raises(errors.UserError, match="settings: batch_size 50 -> 25: type them as before"):
    workdir.refuse_mismatch(before, resolving.resolve(other, 1000))


def test_every_machine_that_goes_on_with_a_run_is_written_down(tmp_path):
  for sessions in range(3):
    folder = workdir.claim(str(tmp_path / "run"), _config())
    machines = json.loads((folder / "env.json").read_text())
    assert len(machines.get("resumed", [])) == sessions
  assert machines["resumed"][1].keys() == machines.keys() - {"resumed"}


@pytest.mark.survives(
  "an empty, damaged or missing config.json",
  "each of them, with a checkpoint that has the settings and one that is damaged, too",
  "a warning; it is made again from a checkpoint",
)
def test_settings_that_are_gone_are_made_again_from_a_checkpoint(tmp_path, caplog):
  config = _resolved()
  workdir.claim(str(tmp_path), config)
  known = tmp_path / "config.json"
  whole = known.read_text()
  for step, text in ((20, json.dumps({"config": config.to_dict()})), (30, '{"config": {')):
    files.write(tmp_path / "checkpoints" / str(step) / "metadata" / "metadata", text)
  for damaged in ("", whole[:90], "[1]", None):
    caplog.clear()
    known.write_text(damaged) if damaged is not None else known.unlink()
    workdir.claim(str(tmp_path), config)
    assert known.read_text() == whole and "made again from checkpoint 20" in caplog.text
  known.write_text("")
  with pytest.raises(errors.UserError, match="other settings: batch_size 50 -> 25"):
    workdir.claim(str(tmp_path), resolving.resolve(_config(batch_size=25), 1000))
  files.write(tmp_path / "checkpoints" / "20" / "metadata" / "metadata", "")
  with pytest.raises(errors.UserError, match="no checkpoint has its settings: bring it back from"):
    workdir.claim(str(tmp_path), config)


def test_extending_keeps_the_shorter_run_s_result_and_says_how_the_schedules_jump(tmp_path):
  files.write_json(tmp_path / "config.json", _resolved().to_dict())
  files.write(tmp_path / "eval" / "final" / "result.json", '{"measures": {}}')
  assert workdir.extend(tmp_path, _resolved(), 100) == []
  assert workdir.read_result(tmp_path) is not None
  longer = _resolved(num_steps=200, resume="extend", optim__lr=5e-4)
  (line,) = workdir.extend(tmp_path, longer, 100)
  # Peak .0005 * 50 / 256; at 100 of 200 steps, 20 of them warm-up, the cosine is at 80 of 180.
  lr = 1e-6 + (5e-4 * 50 / 256 - 1e-6) * (1 + np.cos(np.pi * 80 / 180)) / 2
  assert line == (
    "extended at step 100, from here on with the schedules of 200 steps: learning rate 1.03e-06 -> "
    f"{lr:.3g}, weight decay 0.4 -> 0.22, mixture.horizon_final 200.0 -> 400.0, "
    "mixture.horizon_steps 200.0 -> 400.0, num_steps 100 -> 200, "
    "optim.freeze_prototypes_steps 10 -> 20, optim.warmup_steps 10 -> 20"
  )
  assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 200
  assert workdir.read_result(tmp_path) is None  # or the longer run would count as done
  assert (tmp_path / "eval" / "step_100" / "result.json").exists()
  assert workdir.extend(tmp_path, longer, 150) == []


@pytest.mark.parametrize(("limit", "count"), [(0, "5"), (5, "5"), (9, "5"), (3, "3 of 5")])
def test_the_protocol_says_how_much_of_the_bank_was_used(limit, count):
  bank = data.Source("own/train", np.arange(5), list)
  told = workdir.protocol(_config(probe__limit=limit), bank, None)
  assert told["bank"] == f"own/train ({count} images)" and told["test"] is None


def test_settings_that_only_another_version_knows_are_not_compared():
  old = json.loads(json.dumps(_config().to_dict()))
  del old["mixture"]["beta"]
  old["optim"]["nesterov"] = True
  workdir.refuse_mismatch(old, _config())


def test_a_signal_after_the_training_ends_the_program_at_once_and_says_what_is_saved():
  """Before the final evaluation, which may be long: nobody asks for it there any more."""
  before = signal.getsignal(signal.SIGTERM)
  with workdir.Stop() as stop:
    assert not stop.asked(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.ended(12) and stop.number == signal.SIGTERM
    with pytest.raises(errors.Interrupted, match="stopped at step 12, the last one: all steps"):
      os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_leaves_long_work_at_its_next_report():
  with workdir.Stop() as stop, progress.watched(stop.look):
    numbers = progress.over([0, 1, 2], "counting")
    assert next(numbers) == 0 and next(numbers) == 1
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(workdir.Asked):
      next(numbers)
  assert list(progress.over([0, 1], "counting")) == [0, 1]


@pytest.mark.survives(
  "a closed terminal (SIGHUP)",
  "with and without nohup",
  "saved, status 129; under nohup nothing",
)
def test_a_closed_terminal_asks_to_save_unless_it_was_told_not_to_matter():
  before = signal.getsignal(signal.SIGHUP)
  try:
    for handler in (signal.SIG_DFL, signal.SIG_IGN):  # the latter is what nohup leaves
      signal.signal(signal.SIGHUP, handler)
      with workdir.Stop() as stop:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert ignored == (handler == signal.SIG_IGN)  # else the next line ends the tests
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked(0) != ignored
        assert ignored or stop.number == signal.SIGHUP
      assert signal.getsignal(signal.SIGHUP) == handler
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_setting_that_an_older_version_lacked_had_its_default():
  before = _config().to_dict()
  del before["augment"]["interpolation"]
  workdir.refuse_mismatch(before, _config())
  with pytest.raises(errors.UserError, match="augment.interpolation bicubic -> bilinear"):
    workdir.refuse_mismatch(before, _config(augment__interpolation="bilinear"))


@pytest.mark.parametrize(
  ("error", "line"),
  [
    (OSError(errno.ENOSPC, "x"), "no space left on device while writing {folder}: free some space"),
    (OSError(errno.EDQUOT, "x"), "no space left on device while writing {folder}: free some space"),
    (
      OSError(errno.EROFS, "x", "{folder}/a"),
      "Read-only file system while writing {folder}/a: mend",
    ),
    (
      OSError(errno.ENOENT, "x", "{folder}/a"),
      "No such file or directory while .*{folder}/a: mend",
    ),
  ],
)
def test_what_a_disk_refuses_is_one_line(tmp_path, error, line):
  if error.filename:
    error.filename = error.filename.format(folder=tmp_path)
  with pytest.raises(errors.UserError, match=line.format(folder=tmp_path)) as caught:
    with workdir.reporting(tmp_path):
      raise error
  assert str(caught.value).endswith("and run the same command again; there is no checkpoint yet")


@pytest.mark.parametrize(
  "error", [BrokenPipeError(errno.EPIPE, "x"), FileNotFoundError(errno.ENOENT, "x", "/elsewhere/a")]
)
def test_what_is_not_the_disk_of_the_run_stays_what_it_is(tmp_path, error):
  with pytest.raises(type(error)):
    with workdir.reporting(tmp_path):
      raise error
