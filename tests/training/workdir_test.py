"""Whose folder it is."""

import json

import numpy as np
import pytest

from protojax import config as configs
from protojax import data, errors
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
    ({"num_steps": 200}, ["num_steps 100 -> 200"]),
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
  )
  workdir.refuse_mismatch(before, free)


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
