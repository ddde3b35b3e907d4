"""Runs that commit 4216e27 began and this code ends: checkpoints_4216e27, by make.py.txt there.

Each folder is a run of six steps on the digits that SIGTERM stopped after three, less its log, its
events and its export. expected.json holds what the run in one go had at 4216e27: the SHA-256 of
every leaf's bytes and the loss of every step. If the state changes its form on purpose, a run can
no longer be resumed: say so in the release's notes, and replace the folders.
"""

import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import config as configs
from protojax.training import checkpoint, loop

pytestmark = pytest.mark.xdist_group("old_checkpoints")

DATA = pathlib.Path(__file__).parent / "checkpoints_4216e27"
EXPECTED = json.loads((DATA / "expected.json").read_text())


class _Ended(Exception):
  """The last checkpoint is written: what the loop measures after it is other tests' matter."""


def _digests(state):
  """{"encoder/head/...": SHA-256 of the leaf's bytes}; of a typed key, those of its data."""

  def digest(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    return hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()

  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): digest(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def _losses(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return {str(r["step"]): r["train/loss"] for r in lines if "train/loss" in r}


@pytest.mark.parametrize("name", EXPECTED)
def test_run_of_an_older_commit_is_restored_to_the_bit_and_goes_on(name, tmp_path, monkeypatch):
  known, folder, seen = EXPECTED[name], tmp_path / "run", {}
  shutil.copytree(DATA / name, folder)
  restore, save = checkpoint.Checkpoints.restore_latest, checkpoint.Checkpoints.save

  def restoring(self, *args, **kwargs):
    step, state, metadata = restore(self, *args, **kwargs)
    seen.update(step=step, leaves=_digests(state))  # now: the first step takes its buffers
    return step, state, metadata

  def saving(self, step, *args, **kwargs):
    save(self, step, *args, **kwargs)
    if step == known["last"]:
      raise _Ended

  monkeypatch.setattr(checkpoint.Checkpoints, "restore_latest", restoring)
  monkeypatch.setattr(checkpoint.Checkpoints, "save", saving)
  config = configs.restored(json.loads((folder / "config.json").read_text()))
  with pytest.raises(_Ended):
    loop.run(config, str(folder))
  assert seen == {"step": known["step"], "leaves": known["leaves"]}
  losses = _losses(folder)
  assert losses.keys() == known["losses"].keys()
  before = {k: v for k, v in known["losses"].items() if int(k) <= known["step"]}
  assert {k: losses[k] for k in before} == before
  for step in losses.keys() - before.keys():  # another CPU's code may round otherwise
    np.testing.assert_allclose(losses[step], known["losses"][step], rtol=1e-5, err_msg=step)
