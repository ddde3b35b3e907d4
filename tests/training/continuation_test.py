"""Settings under which a run may go on."""

import json

import numpy as np
import pytest
import tiny

from protojax import errors, files, resolving
from protojax.training import continuation, workdir


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"seed": 1}, ["seed 0 -> 1"]),
    ({"num_steps": 50}, ["num_steps 100 -> 50"]),
    (
      {"num_steps": 50, "resume": "extend"},
      ["num_steps 100 -> 50 (resume=extend takes a larger one)"],
    ),
    (
      {"num_steps": 200, "seed": 1, "resume": "extend"},
      ["seed 0 -> 1"],
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
  before = json.loads(json.dumps(tiny.unresolved().to_dict()))
  with pytest.raises(errors.UserError) as caught:
    continuation.refuse_mismatch(before, tiny.unresolved(**changes))
  line = str(caught.value)
  assert all(word in line for word in words) and line.count("->") == len(words)
  assert "\n" not in line and "another workdir" in line and "overwrite" in line


def test_settings_that_do_not_change_the_numbers_may_change():
  before = json.loads(json.dumps(tiny.unresolved().to_dict()))
  free = tiny.unresolved(
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
    method__precision="high",
    optim__skip_nonfinite=3,
    wandb="project",
  )
  continuation.refuse_mismatch(before, free)


def _resolved(**changes):
  return resolving.resolve(tiny.unresolved(batch_size=50, **changes), 1000)


def test_a_longer_run_is_refused_with_its_ways_out_unless_it_is_asked_for():
  before = json.loads(json.dumps(_resolved().to_dict()))
  with pytest.raises(errors.UserError) as caught:
    continuation.refuse_mismatch(before, _resolved(num_steps=200))
  line = str(caught.value)
  assert "a run of 100 steps; with 200" in line and "\n" not in line
  for way in ("config.resume=extend", "another workdir with config.init_from=WORKDIR/exported"):
    assert way in line
  continuation.refuse_mismatch(before, _resolved(num_steps=200, resume="extend"))
  epochs = tiny.unresolved(batch_size=50, num_steps=0, num_epochs=10.0, resume="extend")
  continuation.refuse_mismatch(before, resolving.resolve(epochs, 1000))


def test_what_follows_from_a_changed_setting_is_not_listed_beside_it():
  before = json.loads(json.dumps(_resolved().to_dict()))
  other = tiny.unresolved(batch_size=25)
  with pytest.raises(errors.UserError, match="settings: batch_size 50 -> 25: type them as before"):
    continuation.refuse_mismatch(before, resolving.resolve(other, 1000))


def test_extending_keeps_the_shorter_run_s_result_and_says_how_the_schedules_jump(tmp_path):
  files.write_json(tmp_path / "config.json", _resolved().to_dict())
  files.write(tmp_path / "eval" / "final" / "result.json", '{"measures": {}}')
  assert continuation.extend(tmp_path, _resolved(), 100) == []
  assert workdir.read_result(tmp_path) is not None
  longer = _resolved(num_steps=200, resume="extend", optim__lr=5e-4)
  (line,) = continuation.extend(tmp_path, longer, 100)
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
  assert continuation.extend(tmp_path, longer, 150) == []


def test_settings_that_only_another_version_knows_are_not_compared():
  old = json.loads(json.dumps(tiny.unresolved().to_dict()))
  del old["mixture"]["beta"]
  old["optim"]["nesterov"] = True
  continuation.refuse_mismatch(old, tiny.unresolved())


def test_a_setting_that_an_older_version_lacked_had_its_default():
  before = tiny.unresolved().to_dict()
  del before["augment"]["interpolation"]
  continuation.refuse_mismatch(before, tiny.unresolved())
  with pytest.raises(errors.UserError, match="augment.interpolation bicubic -> bilinear"):
    continuation.refuse_mismatch(before, tiny.unresolved(augment__interpolation="bilinear"))


def test_other_images_are_called_that_and_no_setting_to_type():
  before = json.loads(
    json.dumps(tiny.unresolved(data__num_records=303, steps_per_epoch=18).to_dict())
  )
  words = (
    "holds a run on 303 images, and data.name='digits' has 302 now: bring back those that were"
  )
  with pytest.raises(errors.UserError, match=words):
    continuation.refuse_mismatch(before, tiny.unresolved(data__num_records=302, steps_per_epoch=17))
