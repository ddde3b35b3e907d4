"""Whose folder it is."""

import errno
import json

import numpy as np
import pytest
import tiny

from protojax import data, errors, files, resolving
from protojax.training import workdir


def _resolved(**changes):
  return resolving.resolve(tiny.unresolved(batch_size=50, **changes), 1000)


def test_every_machine_that_goes_on_with_a_run_is_written_down(tmp_path):
  for sessions in range(3):
    folder = workdir.claim(str(tmp_path / "run"), tiny.unresolved())
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
    workdir.claim(str(tmp_path), resolving.resolve(tiny.unresolved(batch_size=25), 1000))
  files.write(tmp_path / "checkpoints" / "20" / "metadata" / "metadata", "")
  with pytest.raises(errors.UserError, match="no checkpoint has its settings: bring it back from"):
    workdir.claim(str(tmp_path), config)


@pytest.mark.parametrize(("limit", "count"), [(0, "5"), (5, "5"), (9, "5"), (3, "3 of 5")])
def test_the_protocol_says_how_much_of_the_bank_was_used(limit, count):
  bank = data.Source("own/train", np.arange(5), list)
  told = workdir.protocol(tiny.unresolved(probe__limit=limit), bank, None)
  assert told["bank"] == f"own/train ({count} images)" and told["test"] is None


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
