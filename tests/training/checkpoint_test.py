"""Checkpoints: exact, never half-written, and honest about what is broken."""

import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protojax import errors
from protojax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
META = {"config": {"seed": 0, "batch_size": 16, "blur": [0.1, None]}, "version": "0.1.0"}


def _sharding(devices, *axes):
  mesh = jax.make_mesh(
    (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
  )
  return NamedSharding(mesh, PartitionSpec(*axes))


def _state(seed=0, devices=8, size=64):
  """Every kind of leaf a training state has; `w` is split over the devices."""
  key = jax.random.key(seed)
  state = {
    "step": jnp.int32(seed),
    "half": jnp.arange(6, dtype=jnp.bfloat16) / 3,
    "teacher": (),
    "codes": jnp.arange(-3, 3, dtype=jnp.int8),
    "key": jax.random.fold_in(key, 1),
    "opt": ({"mu": jax.random.normal(key, (5, 3))}, jnp.uint32(7)),
  }
  state = jax.device_put(state, _sharding(devices))
  w = jax.device_put(jax.random.normal(key, (size, 8)), _sharding(devices, "data"))
  return {**state, "w": w}


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _bits(tree):
  """Leaves as bytes, keys as their data."""

  def raw(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return x.shape, str(x.dtype), np.asarray(x).tobytes()

  return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def _write(folder, steps, **kwargs):
  saved = checkpoint.Checkpoints(folder, **kwargs)
  for step in steps:
    saved.save(step, _state(step), {**META, "step": step})
  saved.close()


def _read(folder, state=None):
  saved = checkpoint.Checkpoints(folder)
  out = saved.restore_latest(_abstract(_state(0) if state is None else state))
  saved.close()
  return out


def _steps(folder):
  return sorted(p.name for p in (folder / "checkpoints").iterdir())


def _truncate(folder, step):
  """Halves the largest file of a checkpoint."""
  files = [f for f in (folder / "checkpoints" / str(step)).rglob("*") if f.is_file()]
  largest = max(files, key=lambda f: f.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)
  return largest


def test_every_leaf_comes_back_to_the_bit(tmp_path):
  _write(tmp_path, [3])
  step, state, metadata = _read(tmp_path)
  assert step == 3 and metadata == {**META, "step": 3}
  assert jax.tree.structure(state) == jax.tree.structure(_state(3))
  assert _bits(state) == _bits(_state(3))
  assert state["w"].sharding == _sharding(8, "data")
  next_draw = jax.random.normal(jax.random.fold_in(state["key"], 5))
  assert next_draw == jax.random.normal(jax.random.fold_in(_state(3)["key"], 5))


@pytest.mark.survives(
  "other devices than before",
  "8 to 1, 1 to 8, 8 to 2",
  "the same arrays",
)
@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 2)])
def test_mesh_may_change_between_save_and_restore(tmp_path, before, after):
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, _state(5, before), META)
  saved.close()
  _, state, _ = _read(tmp_path, _state(0, after))
  assert _bits(state) == _bits(_state(5, before))
  assert len(state["w"].sharding.device_set) == after


def test_donating_the_state_right_after_save_changes_nothing(tmp_path):
  state = _state(1, size=4096)
  expected = _bits(state)
  step = jax.jit(
    lambda s: {**s, "w": s["w"] * 1.5, "opt": jax.tree.map(lambda x: x + 1, s["opt"])},
    donate_argnums=0,
  )
  saved = checkpoint.Checkpoints(tmp_path)
  target = _abstract(state)
  saved.save(1, state, META)
  for _ in range(20):
    state = step(state)
  jax.block_until_ready(state)
  saved.close()
  assert _bits(_read(tmp_path, target)[1]) == expected


def test_no_checkpoint_is_none_and_leaves_nothing_behind(tmp_path):
  assert _read(tmp_path / "run") is None
  saved = checkpoint.Checkpoints(tmp_path / "run")
  assert checkpoint.leaves(tmp_path / "run") is None
  saved.wait()
  saved.check_errors()
  saved.close()
  assert not (tmp_path / "run").exists()


def test_the_newest_are_kept_and_the_same_step_is_saved_once(tmp_path, monkeypatch):
  written = []
  original = checkpoint.Checkpoints._seal
  monkeypatch.setattr(
    checkpoint.Checkpoints, "_seal", lambda self: (written.append(1), original(self))
  )
  _write(tmp_path, [1, 2, 2, 5, 7, 7])
  assert _steps(tmp_path) == ["5", "7"] and len(written) == 4
  saved = checkpoint.Checkpoints(tmp_path)
  assert saved.restore_latest(_abstract(_state(0)))[0] == 7
  saved.save(7, _state(1), META)
  saved.close()
  assert len(written) == 4 and _read(tmp_path)[2]["step"] == 7


def test_a_step_before_the_newest_is_refused(tmp_path):
  _write(tmp_path, [5])
  saved = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(ValueError, match="holds step 5, later than 4"):
    saved.save(4, _state(4), META)
  saved.close()
  assert _steps(tmp_path) == ["5"]


def test_less_than_two_and_a_file_in_the_way_are_refused(tmp_path):
  with pytest.raises(errors.UserError, match="keep_checkpoints=1: keep at least 2"):
    checkpoint.Checkpoints(tmp_path, keep=1)
  (tmp_path / "checkpoints").write_text("notes")
  with pytest.raises(errors.UserError, match="checkpoints is not a folder: choose another"):
    checkpoint.Checkpoints(tmp_path)


@pytest.mark.survives(
  "a checkpoint cut short",
  "the newest, by half of a file",
  "a warning; the one before it is taken",
)
def test_truncated_newest_falls_back_says_so_and_is_replaced(tmp_path, caplog):
  _write(tmp_path, [4, 6])
  damaged = _truncate(tmp_path, 6)
  saved = checkpoint.Checkpoints(tmp_path)
  with caplog.at_level("WARNING"):
    step, state, _ = saved.restore_latest(_abstract(_state(0)))
  assert step == 4 and _bits(state) == _bits(_state(4))
  (line,) = [r.getMessage() for r in caplog.records]
  assert damaged.name in line and "checkpoint 6" in line and "from checkpoint 4" in line
  assert "\n" not in line and _steps(tmp_path) == ["4", "6"]  # reading removes nothing
  saved.save(5, _state(5), META)
  saved.save(6, _state(60), META)
  saved.close()
  assert _steps(tmp_path) == ["5", "6"]
  assert _bits(_read(tmp_path)[1]) == _bits(_state(60))


@pytest.mark.survives(
  "a damaged checkpoint",
  "a flipped bit, a missing file, metadata, the seal",
  "a warning that names the file; the one before it is taken",
)
@pytest.mark.parametrize("what", ["flip", "missing", "metadata", "seal"])
def test_every_kind_of_damage_is_noticed(tmp_path, what):
  """A flipped bit in the numbers is the one that orbax itself reads without complaint."""
  _write(tmp_path, [4, 6])
  folder = tmp_path / "checkpoints" / "6"
  if what == "flip":
    files = [f for f in (folder / "state").rglob("d/*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
  elif what == "missing":
    next((folder / "state").rglob("manifest*")).unlink()
  elif what == "metadata":
    (folder / "metadata" / "metadata").write_text("{}")
  else:
    (folder / "seal.json").write_text("{")
  step, _, metadata = _read(tmp_path)
  assert step == metadata["step"] == 4


@pytest.mark.survives(
  "a disk that fails while a checkpoint is read",
  "the newest one, which is whole",
  "one line; nothing is passed over and later deleted, the same command goes on from it",
)
@pytest.mark.parametrize("where", ["restore", "sum"])
def test_a_whole_checkpoint_that_cannot_be_read_now_is_not_passed_over(
  tmp_path, monkeypatch, where
):
  _write(tmp_path, [4, 6])
  place, name = (ocp.CheckpointManager, "restore") if where == "restore" else (checkpoint, "_sum")
  read = getattr(place, name)

  def away(*given, **options):  # (manager, step) or (file,): of the newest alone
    if given[-1] == 6 or "6" in getattr(given[0], "parts", ()):
      raise OSError(5, "Input/output error")
    return read(*given, **options)

  with monkeypatch.context() as patch:
    patch.setattr(place, name, away)
    with pytest.raises(
      errors.UserError, match="reading it failed .*Input/output error.*/6 to go on"
    ):
      _read(tmp_path)
  assert _read(tmp_path)[0] == 6 and _steps(tmp_path) == ["4", "6"]


@pytest.mark.survives(
  "all checkpoints damaged",
  "each of them",
  "one line that names all",
)
def test_nothing_readable_is_one_line_that_names_all(tmp_path):
  _write(tmp_path, [4, 6])
  for step in (4, 6):
    _truncate(tmp_path, step)
  (tmp_path / "checkpoints" / "8").mkdir()  # somebody else's
  with pytest.raises(errors.UserError, match=r"can be read: 8 \(.*6 \(.*4 \(.*overwrite") as caught:
    _read(tmp_path)
  assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
  assert _steps(tmp_path) == ["4", "6", "8"]


@pytest.mark.parametrize(
  ("other", "words"),
  [
    (lambda: {**_state(0), "more": jnp.ones(2)}, r"more is missing there and float32\[2\] here"),
    (lambda: _state(0, size=128), r"w is float32\[64, 8\] there and float32\[128, 8\] here, 1 "),
    (lambda: {**_state(0), "step": jnp.ones((), jnp.int16)}, r"step is int32\[\] there and int16"),
  ],
  ids=["leaf", "shape", "dtype"],
)
def test_state_of_another_program_is_one_line(tmp_path, other, words):
  _write(tmp_path, [4])
  with pytest.raises(errors.UserError, match=f"checkpoint 4 in .*{words}") as caught:
    _read(tmp_path, other())
  assert "\n" not in str(caught.value) and "another workdir" in str(caught.value)


_CHILD = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/training"]
import jax
jax.config.update("jax_num_cpu_devices", 8)
import checkpoint_test as t
from protojax import errors
from protojax.training import checkpoint
"""
_KILLED = """
t._write({folder!r}, [1])
def stop(self):
  print("now", flush=True)
  time.sleep(60)
checkpoint.Checkpoints._seal = stop
t._write({folder!r}, [2])
"""
_FILLED = """
saved = t._two_checkpoints({folder!r})
checkpoint.Checkpoints._require_space = lambda self, state: None
saved.save(3, t._state(3, size=40_000), t.META)
try:
  for _ in range(1000):  # as at log time: it does not wait, but it does not miss it either
    saved.check_errors()
    time.sleep(0.01)
except errors.UserError as error:
  print(error)
saved.close()
"""


def _child(code, folder):
  """A process of its own that runs `code` after _CHILD."""
  code = (_CHILD + code).format(root=str(ROOT), folder=str(folder))
  return subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


@pytest.mark.survives(
  "kill -9 in the middle of a save",
  "while files of it are written",
  "the checkpoint before it is intact",
)
def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
  with _child(_KILLED, tmp_path) as process:
    assert process.stdout.readline() == "now\n"
    process.kill()
  left = [name for name in _steps(tmp_path) if name != "1"]
  assert len(left) == 1 and "tmp" in left[0]
  saved = checkpoint.Checkpoints(tmp_path)
  step, state, _ = saved.restore_latest(_abstract(_state(0)))
  assert step == 1 and _bits(state) == _bits(_state(1))
  saved.save(3, _state(3), META)  # another step than the one that was cut short
  saved.close()
  assert _steps(tmp_path) == ["1", "3"]


@pytest.fixture
def small_disk(tmp_path):
  """A file system of one megabyte."""
  folder = tmp_path / "disk"
  folder.mkdir()
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=1m"):
    pytest.skip("mounting needs root")
  yield folder
  libc.umount2(bytes(folder), 2)  # lazily, whoever holds it


_FULL = (
  "no space left on device while saving checkpoint 3 in .*: free some space and run the same "
  "command again; checkpoint 2 is intact"
)


def _two_checkpoints(folder):
  saved = checkpoint.Checkpoints(folder)
  saved.save(1, _state(1), META)
  saved.save(2, _state(2), META)
  saved.wait()
  return saved


def _check_intact(folder):
  assert _steps(folder) == ["1", "2"]
  step, state, _ = _read(folder)
  assert step == 2 and _bits(state) == _bits(_state(2))


@pytest.mark.survives(
  "a disk that is full before a save",
  "a real file system of one megabyte",
  "one line; no checkpoint is lost",
)
def test_full_disk_is_one_line_and_costs_no_checkpoint(small_disk, capfd):
  saved = _two_checkpoints(small_disk / "run")
  with pytest.raises(errors.UserError, match=_FULL) as caught:
    saved.save(3, _state(3, size=40_000), META)  # 1.2 MB
  assert "\n" not in str(caught.value)
  saved.close()
  _check_intact(small_disk / "run")
  assert "Traceback" not in capfd.readouterr().err


@pytest.mark.survives(
  "a disk that fills up during a save",
  "a real file system of one megabyte",
  "the same line",
)
def test_disk_that_fills_up_during_a_save_is_the_same_line(small_disk):
  """In its own process: orbax (0.12.8) leaves writes behind that end in a closed event loop."""
  with _child(_FILLED, small_disk / "run") as process:
    output, log = process.communicate(timeout=60)
  assert process.returncode == 0 and re.fullmatch(_FULL + "\n", output)
  assert "ERROR" not in log
  _check_intact(small_disk / "run")


def test_disk_without_a_single_free_byte_is_the_same_line(small_disk):
  saved = checkpoint.Checkpoints(small_disk / "run")
  saved.save(1, _state(1), META)
  saved.wait()
  with open(small_disk / "fill", "wb", buffering=0) as file:
    try:
      while True:
        file.write(bytes(4096))
    except OSError:
      pass
  with pytest.raises(errors.UserError, match="no space left .* 2 in .*checkpoint 1 is intact"):
    saved.save(2, _state(2), META)
    saved.close()
  (small_disk / "fill").unlink()
  again = checkpoint.Checkpoints(small_disk / "run")
  again.save(2, _state(2), META)
  again.close()
  assert _read(small_disk / "run")[0] == 2


def test_failure_of_the_last_save_surfaces_at_close(tmp_path, monkeypatch):
  """Without root: the disk fills up at the last file of the checkpoint."""

  def full(self):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint.Checkpoints, "_seal", full)
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, _state(1), META)
  with pytest.raises(
    errors.UserError, match="no space left .* 1 in .*; there is no checkpoint yet"
  ):
    saved.close()
  assert _steps(tmp_path) == [] and _read(tmp_path) is None


def test_error_asked_for_early_costs_no_checkpoint(tmp_path, monkeypatch):
  """orbax deletes the oldest for a new one: not for one that failed, whoever heard of it first."""

  seal, finish = checkpoint.Checkpoints._seal, ocp.CheckpointManager._wait_for_checkpointers
  asked = threading.Event()

  def full(self):
    if self._newest == 3:
      raise OSError(28, "No space left on device")
    seal(self)

  def late(self):
    assert asked.wait(20)
    finish(self)

  monkeypatch.setattr(checkpoint.Checkpoints, "_seal", full)
  saved = _two_checkpoints(tmp_path)
  monkeypatch.setattr(ocp.CheckpointManager, "_wait_for_checkpointers", late)
  saved.save(3, _state(3), META)
  saved._manager._checkpointer._async_manager._thread.join()  # it has failed by now
  saved.check_errors()
  asked.set()
  with pytest.raises(errors.UserError, match=_FULL):
    saved.close()
  _check_intact(tmp_path)


def test_folder_may_move(tmp_path):
  _write(tmp_path / "here", [2])
  shutil.move(tmp_path / "here", tmp_path / "there")
  assert _bits(_read(tmp_path / "there")[1]) == _bits(_state(2))


def test_room_counts_what_is_kept_and_what_is_being_written(tmp_path, monkeypatch):
  saved = checkpoint.Checkpoints(tmp_path / "run", keep=3)
  state = {"w": jax.ShapeDtypeStruct((250, 1000), jnp.float32)}  # 1 MB
  disk = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=2_000_000))
  assert saved.room(state) == (4_000_000, 2_000_000)
  for step in ("1", "2", "3"):
    (tmp_path / "run" / "checkpoints" / step).mkdir(parents=True)
  assert saved.room(state) == (1_000_000, 2_000_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=900_000))
  with pytest.raises(errors.UserError, match="1 MB and 0.9 MB of the disk .* are free"):
    saved.room(state)
