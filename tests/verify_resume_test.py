"""verify-resume: what it waits for, what it compares, and a real run that is killed (--all)."""

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest
import tiny

from protojax import errors, verify_resume
from protojax.training import checkpoint
from protojax.verifying import comparing, killing

pytestmark = pytest.mark.xdist_group("train")  # one worker trains `finished_run`
ROOT = pathlib.Path(__file__).parents[1]
# Takes minutes: bash launch/test.sh --all.
long = pytest.mark.skipif("PROTOJAX_TEST_ALL" not in os.environ, reason="not without --all")

_STANDS_STILL = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1])
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(sys.argv[2])
time.sleep(60)
"""


@pytest.mark.parametrize(
  "moment, file, text",
  [
    ("start", "train.log", ""),
    ("step", "metrics.jsonl", '{"step": 8}\n{"st'),
    ("look", "metrics.jsonl", '{"step": 12}\n'),
    ("save", "checkpoints/8.orbax-checkpoint-tmp/state/x", ""),
    ("before the seal", "checkpoints/8.orbax-checkpoint-tmp/metadata/x", ""),
    ("sealed, not yet named", "checkpoints/8.orbax-checkpoint-tmp/seal.json", "{}"),
  ],
)
def test_a_training_is_killed_when_its_files_say_that_the_moment_has_come(
  tmp_path, moment, file, text
):
  if moment == "before the seal":
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  with subprocess.Popen(
    [sys.executable, "-c", _STANDS_STILL, tmp_path / file, text], start_new_session=True
  ) as process:
    assert killing.kill_at(process, moment, tmp_path, step=7, looks=6, delay=0.0)
    assert process.returncode == -signal.SIGKILL
  if moment != "start":
    assert [path for path in tmp_path.rglob("*") if path.name != "state"]  # not before


def test_what_ends_before_its_moment_is_not_said_to_have_been_killed(tmp_path):
  with subprocess.Popen(
    [sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True
  ) as process:
    assert not killing.kill_at(process, "save", tmp_path, step=1, looks=6, delay=0.0)
    assert process.returncode == 3


def test_a_copy_is_equal_and_each_kind_of_difference_is_named(finished_run, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(finished_run, copy)
  wrong, compared = comparing.differences(finished_run, copy)
  assert wrong == [] and re.match(r"\d+ arrays of the state, \d+ numbers of the log, 3 ", compared)
  assert comparing.largest(finished_run, copy)[0] == 0.0

  lines = (copy / "metrics.jsonl").read_text().splitlines()
  changed = json.loads(lines[2])
  changed |= {"train/loss": changed["train/loss"] * (1.0 + 1e-9), "time/img_per_s": 0.0}
  (copy / "metrics.jsonl").write_text(
    "\n".join([*lines[:2], json.dumps(changed), *lines[3:]]) + "\n"
  )
  (copy / "exported" / "config.json").write_text("{}")
  step = changed["step"]
  wrong, _ = comparing.differences(finished_run, copy)
  assert wrong == [f"train/loss of step {step}", "exported/config.json"]


def test_arrays_that_differ_in_one_bit_or_in_their_type_alone_differ(tmp_path):
  ones = {"a": jnp.ones((3, 2)), "b": jnp.arange(4)}
  states = {
    "one": ones,
    "bit": ones | {"a": ones["a"].at[1, 1].set(jnp.nextafter(1.0, 2.0))},
    "type": ones | {"b": jnp.arange(4.0)},
  }
  for name, state in states.items():
    checkpoints = checkpoint.Checkpoints(tmp_path / name)
    checkpoints.save(3, state, {})
    checkpoints.close()
    (tmp_path / name / "metrics.jsonl").write_text("")
  assert comparing.differences(tmp_path / "one", tmp_path / "bit")[0] == ["state a"]
  assert comparing.differences(tmp_path / "one", tmp_path / "type")[0] == ["state b"]
  apart, leaf = comparing.largest(tmp_path / "one", tmp_path / "bit")
  assert leaf == "a" and 0.0 < apart < 1e-6


def _left(folder, state, losses):
  """A run's folder with this state and these losses, as `largest` reads it."""
  checkpoints = checkpoint.Checkpoints(folder)
  checkpoints.save(3, state, {})
  checkpoints.close()
  lines = [json.dumps({"step": i, "train/loss": value}) for i, value in enumerate(losses)]
  (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  return folder


def test_rounding_that_adam_makes_steps_of_is_not_a_difference_and_what_matters_is(tmp_path):
  def state(kernel=1.0, bias=1e-9, means=1.0):
    head = {"kernel": jnp.full((8, 4), kernel), "bias": jnp.full(4, bias)}
    encoder = {"encoder": {"head": {"fc1": head}}}
    return encoder | {"prototypes": {"means": jnp.full((2, 3), means)}}

  whole = _left(tmp_path / "whole", state(), [2.0, 1.0])
  for name, changed, losses, apart, what in (
    ("rounding", state(bias=-3e-9), [2.0, 1.0], 1e-6, "encoder"),
    ("kernel", state(kernel=1.01), [2.0, 1.0], 2e-2, "encoder"),
    ("means", state(means=1.05), [2.0, 1.0], 6e-2, "prototypes/means"),
    ("loss", state(), [2.0, 1.1], 6e-2, "the loss in metrics.jsonl"),
  ):
    found, where = comparing.largest(whole, _left(tmp_path / name, changed, losses))
    assert where == what and found < apart, (name, found, where)
    assert name == "rounding" or found > apart / 3, (name, found)
  short = _left(tmp_path / "short", state(), [2.0])
  assert comparing.largest(whole, short)[0] == math.inf


def test_mistakes_are_one_line(tmp_path):
  recipe = f"--config={ROOT / 'configs' / 'quickstart.py'}:debug"
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").touch()
  for flags, line in {
    (f"--workdir={tmp_path / 'full'}",): "is not empty",
    (f"--workdir={tmp_path / 'a'}", "--kills=0"): "kills=0",
    (f"--workdir={tmp_path / 'b'}", "--launcher=/no/such"): "cannot start /no/such",
    (f"--workdir={tmp_path / 'c'}", "--config.num_epochs=2"): "config.num_steps",
    (f"--workdir={tmp_path / 'd'}", "--launcher=false"): "ended with status 1",
  }.items():
    with pytest.raises(errors.UserError, match=re.escape(line)) as caught:
      verify_resume.main([recipe, *flags])
    assert "\n" not in str(caught.value)


def test_a_run_that_ends_before_all_kills_is_followed_by_another(tmp_path, monkeypatch, capsys):
  given = []

  def killed(runs, run, *, kills, said, **options):
    given.append((run.name, kills, said))
    return ["step", "save"][:kills]

  monkeypatch.setattr(killing, "killed", killed)
  monkeypatch.setattr(killing.Runs, "to_the_end", lambda *args: None)
  monkeypatch.setattr(comparing, "differences", lambda *runs: ([], "all of it"))
  recipe = f"--config={ROOT / 'configs' / 'quickstart.py'}:debug"
  verify_resume.main([recipe, f"--workdir={tmp_path / 'runs'}", "--kills=3"])
  assert given == [("killed", 3, 0), ("killed_from_3", 1, 2)]
  assert "equal to the bit after 3 kills (step: 2, save: 1): all of it" in capsys.readouterr().out


_TRAINS = """
import pathlib, signal, sys, time
run = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
late = run.with_name("late")
def save(step, status):
  (run / "checkpoints" / str(step)).mkdir(parents=True)
  (run / "checkpoints" / str(step) / "seal.json").touch()
  raise SystemExit(status)
run.mkdir()
(run / "metrics.jsonl").write_text('{"step": 12}\\n')
if not late.exists():
  late.touch()
  save(24, 0)
while not asked:
  time.sleep(.01)
save(12, 143)
"""


def test_a_run_that_was_too_fast_to_be_stopped_is_made_again(tmp_path):
  run = tmp_path / "moved"
  runs = killing.Runs([], [sys.executable, "-c", _TRAINS], tmp_path)
  killing.stop_half_way(runs, run, 24)
  assert (tmp_path / "late").exists() and checkpoint.steps(run) == [12]
  fast = killing.Runs([], [sys.executable, "-c", _TRAINS.replace("late.touch()", "")], tmp_path)
  (tmp_path / "late").unlink()
  with pytest.raises(errors.UserError, match="give it more steps"):
    killing.stop_half_way(fast, tmp_path / "never", 24)


@pytest.mark.survives(
  "kill -9 at six kinds of moments",
  "start, step, look, save, before the seal, before the name",
  "equal to the bit, by `protojax verify-resume`",
)
@long
def test_a_run_that_is_killed_at_each_moment_and_moved_ends_as_a_whole_one(tmp_path):
  changes = {k: v for k, v in tiny.RUN.items() if k not in verify_resume._USUAL}
  done = subprocess.run(
    [
      *(sys.executable, "-m", "protojax", "verify-resume"),
      *("--config=quickstart:debug", f"--workdir={tmp_path / 'runs'}", "--kills=6"),
      *(f"--config.{key}={value}" for key, value in changes.items()),
      "--launcher=env JAX_NUM_CPU_DEVICES=4 " + sys.executable + " -m protojax.main",
      "--then=env JAX_NUM_CPU_DEVICES=2 " + sys.executable + " -m protojax.main",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  assert "equal to the bit after 6 kills" in done.stdout
  assert re.search(r"stopped half-way, gone on with .*: \d\.\de-\d+ of its length", done.stdout)
