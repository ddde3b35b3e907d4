"""Resuming to the bit: with other workers, after SIGTERM and kill -9; one process and two."""

import errno
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from protojax import errors
from protojax.metrics import rules
from protojax.training import (
  checkpoint,
  console,
  datasets,
  evaluation,
  export,
  loop,
  metric_writer,
  programs,
  stopping,
  workdir,
)

pytestmark = pytest.mark.xdist_group("train")  # one worker: they share the run `whole`

ROOT = pathlib.Path(__file__).parents[2]
# Takes a minute: bash launch/test.sh --all.
long = pytest.mark.skipif("PROTOJAX_TEST_ALL" not in os.environ, reason="not without --all")


# Clusters are refreshed before steps 2 and 4.
PCL = tiny.RUN | {
  "steps_per_epoch": 2,
  "method.warmup_epochs": 1,
  "method.coarse_clusters": (8,),
}


@functools.cache
def _target(recipe):
  """What a checkpoint of a run of `recipe` with its changes is restored into."""
  config = tiny.run_config(recipe, PCL if recipe == "pcl_cifar10" else tiny.RUN)
  resolved = loop.resolving.resolve(config, len(datasets.of_run(config)[0]))
  return programs.Program(resolved, 10).restore_target()


def _final(folder, recipe="quickstart"):
  """The last checkpoint's leaves as NumPy."""
  saved = checkpoint.Checkpoints(folder)
  step, state, _ = saved.restore_latest(_target(recipe))
  saved.close()
  return step, jax.device_get(state.replace(key=jax.random.key_data(state.key)))


@pytest.fixture
def whole(finished_run):
  return finished_run


def _stop_after(monkeypatch, step):
  """Sends SIGTERM to this process once `step` steps are done."""
  original = console.RunLog.step

  def stepping(self, number, *args, **kwargs):
    original(self, number, *args, **kwargs)
    if number + 1 == step:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(console.RunLog, "step", stepping)


def _stop_in(monkeypatch, name):
  """Sends SIGTERM to this process once it is within this method of `evaluation.Snapshot`."""
  original = getattr(evaluation.Snapshot, name)

  def stopping(self, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args, **kwargs)

  monkeypatch.setattr(evaluation.Snapshot, name, stopping)


def _losses(folder, file="metrics.jsonl"):
  lines = [json.loads(line) for line in (folder / file).read_text().splitlines()]
  return {r["step"]: r["train/loss"] for r in lines if "train/loss" in r}


def _floors(folder):
  """The floors in metrics.jsonl, each written once, and in result.json."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  written = [(k, v) for line in lines for k, v in line.items() if k.startswith("floor/")]
  assert len(dict(written)) == len(written) == 6 and lines[0]["step"] == 0
  measures = json.loads((folder / "eval" / "final" / "result.json").read_text())["measures"]
  assert {k: measures[k] for k in dict(written)} == dict(written)
  return dict(written)


def _streams(patch):
  """[(source, images) of every stream of batches that a run trains on], filled as it opens them."""
  opened, original = [], programs.Program.batches

  def batches(self, data, **options):
    opened.append((data.name, options["batch_size"]))
    return original(self, data, **options)

  patch.setattr(programs.Program, "batches", batches)
  return opened


@pytest.mark.survives(
  "SIGTERM between two steps",
  "with a decoding process before, with the images on the devices after",
  "`stopped at step 3`; equal to the bit",
)
def test_stopped_and_resumed_run_equals_the_whole_one_to_the_bit(
  whole, tmp_path, monkeypatch, caplog
):
  """With a worker that decodes up to step 3, then with the images on the devices."""
  folder = tmp_path / "run"
  with monkeypatch.context() as patch:
    _stop_after(patch, 3)
    streams = _streams(patch)
    patch.setattr(datasets.sources.Source, "in_memory", False)
    with pytest.raises(errors.Interrupted, match="stopped at step 3"):
      loop.run(tiny.run_config(**{"data.num_workers": 1}), str(folder))
  assert streams == [("digits/train", 16)]  # whose images the probe learns from, too
  said = (folder / "train.log").read_text()
  assert said.count("worker decodes") == 1
  assert re.search(r"1 worker decodes about [\d,]+ img/s; this step takes [\d,]+", said)
  caplog.set_level("INFO")
  with monkeypatch.context() as patch:
    # Its floors are read back.
    patch.setattr(evaluation.Snapshot, "floors", lambda *_: pytest.fail("measured again"))
    result = loop.run(tiny.run_config(**{"data.cache": "device"}), str(folder))
  assert "digits/train lies on the devices: 1442 images" in caplog.text
  assert "lies on the devices" not in (whole / "train.log").read_text()
  assert _floors(folder) == _floors(whole)
  step, state = _final(folder)
  expected_step, expected = _final(whole)
  assert step == expected_step == 6
  chex.assert_trees_all_equal(state, expected)
  assert _losses(folder) == _losses(whole)
  known = json.loads((whole / "eval" / "final" / "result.json").read_text())["measures"]
  same = {k for k in known if k.startswith(("probe/", "collapse/"))}
  assert same and {k: result[k] for k in same} == {k: known[k] for k in same}


def test_run_that_is_done_reports_again_and_changes_nothing(finished_run, tmp_path):
  whole = shutil.copytree(finished_run, tmp_path / "run")
  names = ("metrics.jsonl", "eval/final/result.json", "exported/encoder.safetensors")
  before = [(whole / name).read_bytes() for name in names]
  result = loop.run(tiny.run_config(), str(whole))
  assert [(whole / name).read_bytes() for name in names] == before
  assert result["step"] == 6 and "probe/knn" in result
  result_file = whole / "eval" / "final" / "result.json"
  result_file.rename(whole / "eval" / "away.json")  # as if stopped right after the last checkpoint
  again = loop.run(tiny.run_config(), str(whole))
  assert again["probe/knn"] == result["probe/knn"] and result_file.exists()


def test_a_run_that_was_ended_before_its_page_writes_it_again(whole, tmp_path, monkeypatch):
  folder, written = shutil.copytree(whole, tmp_path / "run"), []

  def report(*_, **others):
    if not written:
      written.append(None)
      raise KeyboardInterrupt
    written.append((_[0], sorted(_[3])))

  loop.run(tiny.run_config(), str(folder), report=report)
  assert not written  # the page is of this result
  result = folder / "eval" / "final" / "result.json"
  result.rename(folder / "result.json")
  with pytest.raises(KeyboardInterrupt, match=r"after step 6, .*all steps are saved; run the same"):
    loop.run(tiny.run_config(), str(folder), report=report)
  assert result.exists()
  loop.run(tiny.run_config(), str(folder), report=report)
  assert written[1][0] == folder and "spectrum" in written[1][1]
  (folder / "report.html").unlink()  # ended before there was one
  loop.run(tiny.run_config(), str(folder), report=report)
  assert len(written) == 3


@pytest.mark.survives(
  "SIGTERM after the last step",
  "before the result is written",
  "that all steps are saved, and the command for the rest",
)
def test_a_stop_after_the_last_step_says_that_all_are_saved(whole, tmp_path, monkeypatch):
  folder = shutil.copytree(whole, tmp_path / "run")
  (folder / "eval" / "final" / "result.json").unlink()
  monkeypatch.setattr(stopping.Stop, "ended", lambda self, step: True)
  with pytest.raises(errors.Interrupted, match="step 6, the last one: all steps are saved"):
    loop.run(tiny.run_config(), str(folder))


@pytest.mark.survives(
  "SIGTERM during an evaluation",
  "within a look at the state",
  "saved at once; the run that goes on makes the look first",
)
def test_a_stop_within_a_look_saves_at_once_and_the_look_is_made_when_the_run_goes_on(
  whole, tmp_path, monkeypatch
):
  folder = tmp_path / "run"
  config = tiny.run_config(**{"monitor.every": 3})
  with monkeypatch.context() as patch:
    _stop_in(patch, "monitor")
    with pytest.raises(errors.Interrupted, match="stopped at step 3"):
      loop.run(config, str(folder))
  assert "collapse/" not in (folder / "metrics.jsonl").read_text()
  with monkeypatch.context() as patch:  # and once, if that run is lost before it saves
    _stop_after(patch, 4)
    patch.setattr(checkpoint.Checkpoints, "save", lambda *unused: None)
    with pytest.raises(errors.Interrupted, match="stopped at step 4"):
      loop.run(config, str(folder))
  loop.run(config, str(folder))
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [r["step"] for r in lines if any(k.startswith("collapse/") for k in r)] == [3, 6]
  assert [r["step"] for r in lines] == sorted(r["step"] for r in lines)
  chex.assert_trees_all_equal(_final(folder)[1], _final(whole)[1])
  assert _losses(folder) == _losses(whole)


def test_a_collapsed_run_is_saved_and_ends_where_that_is_asked_for(whole, tmp_path, monkeypatch):
  folder = shutil.copytree(whole, tmp_path / "run")
  shutil.rmtree(folder / "checkpoints" / "6")
  shutil.rmtree(folder / "eval")
  verdict = rules.Verdict("uniform collapse", "all alike", collapsed=True)
  monkeypatch.setattr(console.RunLog, "verdict", lambda self, step: verdict)
  changes = {"monitor.every": 5, "monitor.stop_on_collapse": True}
  with pytest.raises(errors.UserError, match="stopped at step 5, uniform collapse: all alike"):
    loop.run(tiny.run_config(**changes), str(folder))
  assert (folder / "checkpoints" / "5").is_dir()


def test_a_probe_may_change_when_a_run_goes_on_and_the_encoder_does_not_feel_it(
  whole, tmp_path, caplog, monkeypatch
):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / "checkpoints" / "6")
  shutil.rmtree(folder / "eval")
  streams = _streams(monkeypatch)
  caplog.set_level("INFO")
  swapped = {"probe.train_split": "test", "probe.test_split": "train"}
  loop.run(tiny.run_config(**swapped, **{"probe.k": 5}), str(folder))
  assert (
    "the online linear probe starts fresh: config.probe.train_split was train at step 4; measured "
    "on digits/test from here on"
  ) in caplog.text
  assert streams == [("digits/train", 16), ("digits/test", 16)]
  state, expected = _final(folder)[1], _final(whole)[1]
  for part in ("encoder", "prototypes", "teacher", "opt_state"):
    chex.assert_trees_all_equal(getattr(state, part), getattr(expected, part))
  assert (state.carry["probe"]["seen"], expected.carry["probe"]["seen"]) == (2, 6)
  assert json.loads((folder / "config.json").read_text())["probe"]["k"] == 5


def test_a_checkpoint_is_restored_whatever_probe_it_has(whole, tmp_path):
  config = loop.resolving.resolve(tiny.run_config(), 1442)
  with_ten, without, with_seven = (programs.Program(config, n) for n in (10, 0, 7))
  before = {"name": "digits", "train_split": "train"}

  def restored(folder, program):
    saved = checkpoint.Checkpoints(folder)
    try:
      step, state, _ = saved.restore_latest(program.restore_target)
      return step, *program.with_own_probe(state, before)
    finally:
      saved.close()

  step, state, said = restored(whole, with_ten)
  assert step == 6 and said == "" and state.carry["probe"]["seen"] == 6
  _, state, said = restored(whole, with_seven)
  assert said.endswith("starts fresh: the one before was of another number of classes")
  assert state.carry["probe"]["params"]["bias"].shape == (7,)
  _, state, said = restored(whole, without)
  assert said == "the online linear probe ends" and "probe" not in state.carry
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(6, state, {})
  saved.close()
  assert not [name for name in checkpoint.leaves(tmp_path) if name.startswith("carry/probe")]
  _, state, said = restored(tmp_path, with_ten)
  assert said.endswith("starts fresh: there was none") and state.carry["probe"]["seen"] == 0
  chex.assert_trees_all_equal_shapes_and_dtypes(state, with_ten.abstract)
  assert restored(tmp_path, without)[2] == ""


def test_a_run_says_what_it_is_before_it_starts(whole):
  lines = [line[20:] for line in (whole / "train.log").read_text().splitlines()]
  lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("step 1/6"))]
  assert all(len(line) <= 80 for line in lines if str(whole) not in line)
  said = " ".join(" ".join(lines).split())
  names = ("method", "prototypes", "encoder", "images", "length", "optimizer", "devices")
  starts = [line.split()[0] for line in lines if not line.startswith(" ")]
  assert starts == [*names, "workdir", "disk", "floors", "memory"]
  assert "method dino, with a teacher prototypes mixture, 32 of 16 dimensions" in said
  tensors, _ = export.read(whole / "exported")
  backbone = sum(x.size for name, x in tensors.items() if name.startswith("params.backbone"))
  assert f"vit_tiny of width 48, depth 2; backbone {backbone / 1e6:.3g} M, head " in said
  assert "1,442 of digits/train; tested on 355 of digits/test, 10 classes" in said
  assert "6 steps of 16 images, 0.0667 epochs" in said and "frozen" not in said
  assert "8 x cpu, mesh data 8 x model 1" in said
  assert re.search(r"memory [\d.]+ [MG]iB for the step, of [\d.]+ GiB a device", said)


def test_a_longer_run_goes_on_from_the_last_step_when_it_is_asked_for(whole, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  with open(folder / "metrics.jsonl", "a") as file:
    file.write('{"step": 7, "train/l')  # where somebody's disk was full
  longer = {"num_steps": 8, "eval_every": 8, "monitor.every": 8}
  result = loop.run(tiny.run_config(**longer, resume="extend"), str(folder))
  losses = _losses(folder)
  assert list(losses) == list(range(1, 9))
  assert {k: v for k, v in losses.items() if k <= 6} == _losses(whole)
  assert result["step"] == 8 and workdir.read_result(folder)["step"] == 8
  before = json.loads((folder / "eval" / "step_6" / "result.json").read_text())["measures"]
  assert before == workdir.read_result(whole)
  said = (folder / "train.log").read_text()
  assert "extended at step 6, from here on with the schedules of 8" in said
  assert "metrics.jsonl: dropped 1 unreadable line" in said  # said before there was a log
  assert json.loads((folder / "config.json").read_text())["num_steps"] == 8


def test_every_file_of_a_run_is_there(whole):
  for name in (
    "config.json",
    "env.json",
    "metrics.jsonl",
    "train.log",
    "report.png",
    "report.html",
    "exported/encoder.safetensors",
    "exported/config.json",
    "eval/final/result.json",
  ):
    assert (whole / name).stat().st_size > 0, name
  assert list(whole.glob("events.out.tfevents.*"))
  assert len(list((whole / "checkpoints").iterdir())) >= 2
  assert json.loads((whole / "exported" / "config.json").read_text())["weights"] == "teacher"


def test_exported_encoder_is_the_teacher_and_starts_another_run(whole):
  _, state = _final(whole)
  saved = safetensors.numpy.load_file(whole / "exported" / "encoder.safetensors")
  leaves = jax.tree.leaves((state.teacher["encoder"], state.carry["batch_stats"]["teacher"]))
  assert sum(leaf.size for leaf in leaves) == sum(v.size for v in saved.values())
  program = programs.Program(tiny.config())
  with pytest.raises(errors.UserError, match="encoder.safetensors"):
    export.load(whole / "exported", program.abstract.encoder)
  fresh = programs.Program(loop.resolving.resolve(tiny.run_config(), 1000)).init(7)
  exported = whole / "exported"
  stats = export.load_stats(exported, fresh.carry["batch_stats"]["student"])
  started = workdir.warm_start(fresh, export.load(exported, fresh.encoder), stats)
  started, measured = jax.device_get(started), state.carry["batch_stats"]["teacher"]
  assert jax.tree.leaves(measured)
  for found in started.encoder, started.teacher["encoder"]:
    chex.assert_trees_all_equal(found, state.teacher["encoder"])
  for net in "student", "teacher":
    chex.assert_trees_all_equal(started.carry["batch_stats"][net], measured)


def _command(folder, recipe="quickstart", changes=tiny.RUN):
  flags = [f"--config.{k}={v}" for k, v in changes.items()]
  config = ROOT / "configs" / f"{recipe}.py:debug"
  return [
    sys.executable,
    "-m",
    "protojax.main",
    f"--config={config}",
    f"--workdir={folder}",
    *flags,
  ]


def _kill_after_a_checkpoint(folder, step, **recipe):
  """Runs the program until it has saved `step`, then kill -9."""
  environment = {
    **os.environ,
    "JAX_NUM_CPU_DEVICES": "8",
  }
  process = subprocess.Popen(
    _command(folder, **recipe),
    cwd=ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.time() + 240
  # A checkpoint is complete when it is there: orbax renames it at the end.
  while not (folder / "checkpoints" / str(step)).exists():
    assert process.poll() is None and time.time() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()


@pytest.mark.survives(
  "kill -9 of a training",
  "the program, killed behind checkpoint 2 of 6 steps",
  "nothing; the same command goes on, and every array and line is that of a whole run",
)
@long
def test_killed_run_resumes_to_the_bit(whole, tmp_path):
  folder = tmp_path / "run"
  _kill_after_a_checkpoint(folder, 2)
  loop.run(tiny.run_config(), str(folder))
  chex.assert_trees_all_equal(_final(folder)[1], _final(whole)[1])
  assert _losses(folder) == _losses(whole)


@pytest.mark.survives(
  "a stop or kill -9 around a refresh of clusters",
  "PCL, stopped and killed at the step of a refresh",
  "the clusters are made again; equal to the bit",
)
@long
def test_run_with_clusters_stopped_and_killed_around_a_refresh_resumes_to_the_bit(
  tmp_path, monkeypatch
):
  config, whole = tiny.run_config("pcl_cifar10", PCL), tmp_path / "whole"
  loop.run(config, str(whole))
  _, expected = _final(whole, "pcl_cifar10")
  # Both refreshes happened: the first prototypes are gone, images have clusters.
  assert set(expected.prototypes) == {"clusters8", "prototypes"}
  assert len(np.unique(expected.carry["clusters"][1])) > 16

  stopped = tmp_path / "stopped"
  for step in (2, 3):  # right before a refresh, and between two
    with monkeypatch.context() as patch:
      _stop_after(patch, step)
      with pytest.raises(errors.Interrupted, match=f"stopped at step {step}"):
        loop.run(config, str(stopped))
  with monkeypatch.context() as patch:  # in the middle of one
    _stop_in(patch, "embeddings")
    with pytest.raises(errors.Interrupted, match="stopped at step 4"):
      loop.run(config, str(stopped))
  killed = tmp_path / "killed"
  _kill_after_a_checkpoint(killed, 4, recipe="pcl_cifar10", changes=PCL)
  for folder in (stopped, killed):
    loop.run(config, str(folder))
    step, state = _final(folder, "pcl_cifar10")
    assert step == 6
    chex.assert_trees_all_equal(state, expected)
    assert _losses(folder) == _losses(whole)


# One of two processes: it trains, takes the last two steps away and does them again from step 4.
# JAX lets the first process alone keep what it has compiled; here both do, for the next time.
_TWICE = """
import shutil, sys
from unittest import mock
import jax
from jax._src import compiler, distributed
from jax.experimental import multihost_utils
from protojax import cli, main
from protojax.training import loop, stopping

def keep(*program, write=compiler._cache_write):
  with mock.patch.object(distributed.global_state, "process_id", 0):
    write(*program)

compiler._cache_write = keep
folder, *arguments = sys.argv[1:]
arguments.append(f"--workdir={folder}")
cli.guarded(main.main, arguments)
if jax.process_index() == 0:
  shutil.copy(f"{folder}/metrics.jsonl", f"{folder}/first.jsonl")
  shutil.rmtree(f"{folder}/checkpoints/6")
multihost_utils.sync_global_devices("taken away")
loop.run(main.parse([*arguments, "--config.data.cache=device"])[0], folder)
"""


def _two_processes(code, folder, **changes):
  """Two processes of two devices each that run `code`."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  flags = [f"--config.{k}={v}" for k, v in (tiny.RUN | changes).items()]
  flags += [f"--config={ROOT / 'configs' / 'quickstart.py:debug'}", "--num_processes=2"]
  flags.append(f"--coordinator_address=127.0.0.1:{port}")
  return [
    subprocess.Popen(
      [sys.executable, "-c", code, str(folder), *flags, f"--process_id={i}"],
      cwd=ROOT,
      env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for i in range(2)
  ]


@pytest.mark.survives(
  "the same number of hosts",
  "two processes, resumed by two",
  "goes on as one process would",
)
def test_two_processes_train_and_resume_as_one(whole, tmp_path):
  folder = tmp_path / "run"
  processes = _two_processes(_TWICE, folder)
  for index, process in enumerate(processes):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "\ndigits/train lies on the devices" in output
    assert ("\nresumed at step 4\n" in output) == (index == 0)  # who keeps the log says it
  losses = _losses(folder)
  assert set(losses) == set(range(1, 7)) and losses == _losses(folder, "first.jsonl")
  for step, loss in _losses(whole).items():
    np.testing.assert_allclose(losses[step], loss, rtol=1e-4 if step > 1 else 1e-5)
  _goes_on_alone(folder, whole)


def _goes_on_alone(folder, whole):
  """A run of two processes, resumed on one and another number of devices: equal to rounding."""
  shutil.rmtree(folder / "checkpoints" / "6")
  loop.run(tiny.run_config(), str(folder))
  text = (folder / "train.log").read_text()
  assert "resumed at step 4, saved on 4 devices and now on 8: equal to rounding" in text
  losses = _losses(folder)
  for step, loss in _losses(whole).items():
    np.testing.assert_allclose(losses[step], loss, rtol=1e-4)
  (step, state), (_, expected) = _final(folder), _final(whole)
  assert step == 6
  # Adam moves by its whole step what has no gradient but rounding, as biases before a norm.
  kernels = [jax.tree.map(lambda x: x if x.ndim > 1 else 0, s.encoder) for s in (state, expected)]
  chex.assert_trees_all_close(*kernels, rtol=0, atol=1e-6)


_ONCE = """
import sys
from protojax import cli, main
folder, *arguments = sys.argv[1:]
cli.guarded(main.main, [*arguments, f"--workdir={folder}"])
"""


@pytest.mark.survives(
  "SIGTERM on one of several hosts, fewer hosts after it",
  "process 1 of 2; then one process goes on",
  "all save and end with 143; equal to rounding",
)
@long
def test_sigterm_on_the_second_process_saves_on_both_and_one_process_goes_on(tmp_path):
  folder = tmp_path / "run"
  changes = {"num_steps": 300, "save_every": 1000, "eval_every": 1000, "monitor.every": 1000}
  zero, one = _two_processes(_ONCE, folder, **changes)
  for line in zero.stdout:
    if line.startswith("step 5/"):
      one.send_signal(signal.SIGTERM)
      break
  output, log = zero.communicate(timeout=600)[0], one.communicate(timeout=600)[0]
  assert zero.returncode == one.returncode == 143, output + log
  stopped = re.search(r"\nprotojax: stopped at step (\d+); run the same command", output)
  assert stopped and stopped[0] in log and int(stopped[1]) % 10 == 0
  config = tiny.run_config(**changes)
  assert loop.run(config, str(folder))["step"] == 300
  said = f"resumed at step {stopped[1]}, saved on 4 devices and now on 8: equal to rounding"
  assert said in (folder / "train.log").read_text()


_TOLD_IN_A_LOOK = """
import os, signal, sys
import jax
from protojax import cli, main
from protojax.training import evaluation

def monitor(*arguments, original=evaluation.Snapshot.monitor):
  if jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGTERM)
  return original(*arguments)

evaluation.Snapshot.monitor = monitor
folder, *arguments = sys.argv[1:]
cli.guarded(main.main, [*arguments, f"--workdir={folder}"])
"""


@pytest.mark.survives(
  "SIGTERM on one host during an evaluation",
  "process 1 of 2 within a look",
  "all save and end with 143",
)
@long
def test_sigterm_on_the_second_process_within_a_look_saves_on_both(tmp_path):
  changes = {"num_steps": 8, "eval_every": 1000, "monitor.every": 3, "monitor.images": 512}
  for process in _two_processes(_TOLD_IN_A_LOOK, tmp_path, **changes):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 143, output
    assert "\nprotojax: stopped at step 3; run the same command" in output
  assert checkpoint.steps(tmp_path)[-1] == 3
  assert "collapse/" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.survives(
  "more hosts than before",
  "one process, then two",
  "goes on; equal to rounding",
)
@long
def test_a_run_of_one_process_goes_on_with_two(whole, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / "checkpoints" / "6")
  for process in _two_processes(_ONCE, folder):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
  assert "resumed at step 4, saved on 8 devices and now on 4" in (folder / "train.log").read_text()
  losses = _losses(folder)
  for step, loss in _losses(whole).items():
    np.testing.assert_allclose(losses[step], loss, rtol=1e-4)


def _full(*unused, **options):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read_only(path, *unused):
  raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def _fed_by_a_dead_process(*unused, **options):
  raise errors.UserError("a process that decodes images has died")
  yield


_LAST = r"run the same command again; checkpoint 4 is intact"


@pytest.mark.survives(
  "a full or read-only disk",
  "a log line, opening the log, the result; the disk's errors put in their place",
  "one line: what, where, which checkpoint is intact; status 2",
)
@pytest.mark.parametrize(
  ("owner", "name", "broken", "line"),
  [
    (
      metric_writer.Writer,
      "write",
      _full,
      rf"no space left on device .*free some space and {_LAST}",
    ),
    (metric_writer, "_until", _read_only, rf"Read-only file system .*metrics.jsonl: .*{_LAST}"),
    (workdir, "write_result", _full, r"no space left .*again; checkpoint 6 is intact"),
    (
      programs.Program,
      "batches",
      _fed_by_a_dead_process,
      "step 4: a process that decodes images has died; checkpoint 4 is intact",
    ),
  ],
  ids=["metrics", "opened", "result", "images"],
)
def test_a_disk_or_a_worker_that_fails_is_one_line_with_what_is_intact(
  whole, tmp_path, monkeypatch, owner, name, broken, line
):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / "checkpoints" / "6")
  monkeypatch.setattr(owner, name, broken)
  with pytest.raises(errors.UserError, match=line) as caught:
    loop.run(tiny.run_config(), str(folder))
  assert "\n" not in str(caught.value)


@pytest.mark.survives(
  "a save that fails behind the training",
  "orbax's thread",
  "the same line at the next step",
)
def test_a_save_that_failed_in_the_background_ends_the_run_at_the_next_step(
  whole, tmp_path, monkeypatch
):
  folder, asked = tmp_path / "run", []
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / "checkpoints" / "6")

  def failed(self):
    asked.append(1)
    raise errors.UserError("no space left")

  monkeypatch.setattr(checkpoint.Checkpoints, "check_errors", failed)
  with pytest.raises(errors.UserError, match="no space left"):
    loop.run(tiny.run_config(), str(folder))
  assert len(asked) == 1 and max(_losses(folder)) == 4


@pytest.mark.survives(
  "no room for one checkpoint",
  "before the first step",
  "one line, no step in vain",
)
def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
  tmp_path, monkeypatch
):
  room = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
  said = r"a checkpoint takes up to \d.\d+ MB and 1 MB of the disk of .*run are free: free some"
  with pytest.raises(errors.UserError, match=said):
    loop.run(tiny.run_config(), str(tmp_path / "run"))
  left = {path.name for path in (tmp_path / "run").iterdir()}
  assert left == {"config.json", "env.json"}  # the log of a run that goes on is as it was
