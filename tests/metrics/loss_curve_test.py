import json
import math

import numpy as np
import pytest

from protojax import errors
from protojax.metrics import loss_curve

# Of the thread dino#280, and DINO's usual end.
_HEALTHY = [7.29, 9.18, 7.32, 5.97, 5.30, 4.92, 4.63, 4.39, 4.20, 4.04, 3.90, 3.5, 3.2, 3.0, 2.86]


def _write(path, lines):
  path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
  return path


def _dino(tmp_path, losses):
  rows = [{"train_loss": x, "train_lr": 1e-4, "epoch": i} for i, x in enumerate(losses)]
  return _write(tmp_path / "log.txt", rows)


def _words(path) -> list[str]:
  said = loss_curve.words(loss_curve.read(path))
  assert not any("\n" in sentence for sentence in said)
  return said


def test_the_rise_after_the_first_epoch_is_normal(tmp_path):
  log = loss_curve.read(_dino(tmp_path, _HEALTHY))
  assert (log.kind, log.unit) == ("DINO", "epoch")
  said = loss_curve.words(log)
  assert said[0].startswith("ok") and "7.29 to 2.86" in said[0]
  assert len(said) == 2 and "is normal" in said[1] and "7.29 to 9.18" in said[1]
  table = loss_curve.reference(log)
  assert len(table) == 10 and table[2].split() == ["1", "9.18", "9.18", "to", "9.56"]
  early = _words(_dino(tmp_path, _HEALTHY[:2]))
  assert early[0].startswith("ok") and "by epoch 4" in early[1]


def test_a_hair_of_a_rise_at_ln_k_is_not_called_normal(tmp_path):
  said = _words(_dino(tmp_path, [8.3178 + 1e-4 * i for i in range(10)]))
  assert len(said) == 1 and said[0].startswith("uniform collapse")


@pytest.mark.parametrize("size, printed", [(4096, "8.318"), (65_536, "11.090"), (1024, "6.931")])
def test_a_plateau_at_ln_k_is_named_with_k_and_its_start(tmp_path, size, printed):
  losses = [*np.linspace(math.log(size) + 2, math.log(size) + 0.1, 7), *[math.log(size) + 1e-3] * 9]
  said = _words(_dino(tmp_path, losses))
  assert len(said) == 1 and said[0].startswith("uniform collapse")
  assert f"ln {size} " in said[0] and printed[:-1] in said[0] and "since epoch 7" in said[0]
  assert "teacher" in said[0].split("In this order")[1].split(",")[1]


@pytest.mark.parametrize("loss", [8.3, 7.0, 5.0])
def test_a_plateau_elsewhere_is_not_taken_for_it(tmp_path, loss):
  said = _words(_dino(tmp_path, [9.0, *[loss] * 9]))
  assert said[0].startswith("ok") and "is not ln K" in said[1]


def test_a_loss_that_passes_ln_k_on_its_way_down_is_fine(tmp_path):
  losses = np.linspace(math.log(4096) + 0.5, math.log(4096), 40)
  assert _words(_dino(tmp_path, losses)) == [_words(_dino(tmp_path, losses))[0]]
  assert _words(_dino(tmp_path, losses))[0].startswith("ok")


def test_a_loss_that_falls_to_nothing_is_one_hot(tmp_path):
  said = _words(_dino(tmp_path, [8.0, 5.0, 1.0, 0.3, 0.08, 0.05, 0.05]))
  assert said[0].startswith("one-hot collapse") and "8.00 to 0.050" in said[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_is_not_finite_is_named_with_its_place(tmp_path, bad):
  said = _words(_dino(tmp_path, [8.0, 7.0, bad, bad]))
  assert len(said) == 1 and said[0].startswith("non-finite") and "epoch 2 (2 of 4" in said[0]


def test_a_late_rise_is_told_from_the_first_one(tmp_path):
  said = _words(_dino(tmp_path, [*_HEALTHY, 3.4, 3.6]))
  assert said[0].startswith("ok") and "is normal" in said[1]
  assert "0.74 above its least, of epoch 14" in said[2]


def test_dinov2_is_judged_by_its_parts(tmp_path):
  chance, patches = math.log(65_536), math.log(8192)
  rows = [
    {
      "iteration": 10 * i,
      "total_loss": chance + patches / 4 + 0.1 * i,
      "dino_local_crops_loss": chance * 16 / 18,
      "dino_global_crops_loss": chance * 2 / 18,
      "koleo_loss": 0.1 * i,
      "ibot_loss": patches / 4,
    }
    for i in range(12)
  ]
  log = loss_curve.read(_write(tmp_path / "training_metrics.json", rows))
  assert (log.kind, log.unit) == ("DINOv2", "iteration")
  said = loss_curve.words(log)
  assert "ln 65536" in said[0] and "9.858" in said[0] and "1.232" in said[0]
  assert "1/4 ln 8192" in said[1]


def test_a_rise_within_the_noise_is_not_the_published_one(tmp_path):
  losses = [7.29, 7.35, *_HEALTHY[2:]]
  assert not any("is normal" in sentence for sentence in _words(_dino(tmp_path, losses)))


def test_any_text_with_losses_is_read(tmp_path):
  lines = [
    f"Epoch: [0/100]  [{i}/2502]  eta: 1:00:00  loss: {x:.4f} (9.9)  lr: 0.1"
    for i, x in enumerate([9.0, *[8.3178] * 12])
  ]
  log = loss_curve.read(_write(tmp_path / "slurm.out", ["| distributed init", *lines]))
  assert (log.kind, log.unit, len(log.loss)) == ("text", "line", 13)
  assert "ln 4096" in loss_curve.words(log)[0]
  swav = "INFO - 01/02/20 - Epoch: [0][50]\tTime 1.2\tLoss nan (8.0063)"
  assert _words(_write(tmp_path / "train.log", [swav]))[0].startswith("non-finite")
  with pytest.raises(errors.UserError, match="no loss in it"):
    loss_curve.read(_write(tmp_path / "x.txt", ["nothing lost here"]))
