"""Two runs on one workdir: the second is refused; a lock that was left is not in the way."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import processes
import pytest
import tiny

from protojax import api, errors
from protojax.training import lock

pytestmark = pytest.mark.xdist_group("train")  # one worker trains `finished_run`
ROOT = pathlib.Path(__file__).parents[2]

# A run on another machine, which beats fast.
_ELSEWHERE = """
import pathlib, sys, time
from protojax import cli
from protojax.training import lock

lock.BEAT, lock._machine = 0.1, lambda: ["elsewhere"]

def run(argv):
  with lock.held(pathlib.Path(argv[0])):
    print("held", flush=True)
    time.sleep(60)

cli.guarded(run, sys.argv[1:])
"""


@pytest.fixture
def elsewhere(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", _ELSEWHERE, tmp_path],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n", process.communicate()
  yield process
  process.kill()
  process.communicate()


@pytest.fixture
def fast(monkeypatch):
  monkeypatch.setattr(lock, "STALE", 1.5)
  monkeypatch.setattr(lock, "_POLL", 0.3)


def _stated(pid):
  return rf"process {pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \w+"


@pytest.mark.survives(
  "two runs on one workdir; kill -9 and again on the same machine",
  "two programs, with --config.overwrite too",
  "host, process and since when, status 2; behind a killed run a line, and it goes on at once",
)
def test_a_second_run_is_refused_and_a_killed_one_is_followed_at_once(tmp_path, caplog):
  folder = tmp_path / "run"
  run = tiny.RUN | {"optim.warmup_steps": 1}
  flags = [f"--config.{key}={value}" for key, value in run.items()]
  recipe = f"--config={ROOT / 'configs' / 'quickstart.py'}:debug"
  first = subprocess.Popen(
    [sys.executable, "-m", "protojax.main", recipe, f"--workdir={folder}", *flags],
    cwd=ROOT,
    env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    limit = time.monotonic() + 240
    while not (folder / "train.log").exists():
      assert first.poll() is None and time.monotonic() < limit
      time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # it is there all the same
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(errors.UserError) as caught:
      api.train(tiny.run_config(changes=run, overwrite=True), folder)
    assert re.fullmatch(
      rf"workdir={folder} is in use by another run, {_stated(first.pid)}: wait for its end, end "
      "it, or choose another workdir",
      str(caught.value),
    )
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
  finally:
    first.kill()
    first.wait()
  with caplog.at_level("INFO"), lock.held(folder):
    pass
  assert "waiting" not in caplog.text
  assert re.search(rf"{_stated(first.pid)} had this workdir and is gone: its lock", caplog.text)
  assert not list(folder.glob(f"{lock.NAME}*"))


@pytest.mark.survives(
  "two runs on one workdir, on two machines",
  "a program that says it is elsewhere",
  "the same line, after a sign of life",
)
def test_a_run_that_lives_on_another_machine_is_seen_to_live(tmp_path, elsewhere, fast, caplog):
  with (
    caplog.at_level("INFO"),
    pytest.raises(errors.UserError, match=f"in use by another run, {_stated(elsewhere.pid)}, with"),
    lock.held(tmp_path),
  ):
    pass
  assert re.search("waiting up to 2 s for a sign of life, then going on in its place", caplog.text)
  assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == elsewhere.pid


@pytest.mark.survives(
  "a run killed on one machine and started on another",
  "a frozen program that thaws later",
  "a line, 60 s without a sign of life, then it goes on; the thawed one ends without writing",
)
def test_a_lock_that_another_machine_left_is_waited_for_and_taken(
  tmp_path, elsewhere, fast, caplog
):
  elsewhere.send_signal(signal.SIGSTOP)
  begun = time.monotonic()
  with caplog.at_level("INFO"), lock.held(tmp_path):
    assert lock.STALE < time.monotonic() - begun < lock.STALE + 5
    assert re.search(rf"no sign of life of {_stated(elsewhere.pid)}, for 2 s", caplog.text)
    # Thawed, it finds that the workdir is no longer its own, and writes nothing more.
    elsewhere.send_signal(signal.SIGCONT)
    _, log = elsewhere.communicate(timeout=60)
    assert elsewhere.returncode == 2
    assert re.fullmatch(r"protojax: another run has \S+ now, because .*\n", log)
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_lock_that_nobody_can_read_is_taken_after_a_while(tmp_path, fast, monkeypatch):
  monkeypatch.setattr(lock, "STALE", 0.2)
  for left in (b"", b"\xff\x00", b"[1]", b'{"pid": "x"}', b"[" * 100_000):
    (tmp_path / lock.NAME).write_bytes(left)
    with lock.held(tmp_path):
      assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_process_number_that_went_to_another_process_is_no_run(tmp_path):
  with lock.held(tmp_path):
    left = json.loads((tmp_path / lock.NAME).read_text())
  (tmp_path / lock.NAME).write_text(json.dumps(left | {"began": "1", "token": "x"}))
  with lock.held(tmp_path):
    pass
  assert not list(tmp_path.iterdir())


def test_of_two_that_find_it_left_one_takes_it(tmp_path):
  (tmp_path / lock.NAME).write_text('{"token": "left"}')
  slow, quick = lock._Lock(tmp_path), lock._Lock(tmp_path)
  left = lock._read(slow.path)
  quick._remove(left)
  assert quick.take() is None
  slow._remove(left)  # decided before the other was there
  assert slow.take().startswith("held")
  quick.leave()
  assert not list(tmp_path.iterdir())


@pytest.mark.survives(
  "a workdir that is not one folder for all hosts",
  "two folders of one name",
  "which process does not see it, on all of them, before the first step",
)
def test_a_workdir_that_is_another_folder_to_one_process_is_refused(tmp_path, monkeypatch, fast):
  monkeypatch.setattr(lock, "SHARED", 0.5)

  def hold(name):
    with lock.held(tmp_path / name):
      pass

  said = processes.together(monkeypatch, lambda: hold("a"), lambda: hold("b"))
  assert said[0] == said[1]
  assert said[0].startswith("process 1 does not see the lock that process 0 has written, on ")
  assert f": {tmp_path / 'b' / lock.NAME}: workdir must be one folder for all" in said[0]
  assert not list(tmp_path.glob("*/*")) and not (tmp_path / "b").exists()
  assert processes.together(monkeypatch, lambda: hold("a"), lambda: hold("a")) == ["", ""]
