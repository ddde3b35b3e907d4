"""Processes of one run that do not come, are killed, freeze or fail: one line on all the others."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from protojax import errors, hosts

ROOT = pathlib.Path(__file__).parents[1]
long = pytest.mark.skipif("PROTOJAX_TEST_ALL" not in os.environ, reason="not without --all")

# A run without JAX; of process `bad` the end is `how`.
_BARE = """
import sys, time
from protojax import cli, errors, hosts

def run(argv):
  address, count, index, bad, how = argv
  others = hosts.join(address, int(count), int(index), start_timeout={start}, timeout={timeout},
                      intact=lambda: "checkpoint 30 is intact")
  with hosts.told(others):
    print("up", flush=True)
    if index != bad:
      time.sleep(1 if how == "done" else 60)
    elif how == "mistake":
      raise errors.UserError("no space left on device")
    elif how == "fault":
      raise KeyError("a fault")
    elif how != "done":
      time.sleep(60)

cli.guarded(run, sys.argv[1:])
"""
# What training does with JAX: exchanges between the processes, all the time.
_JAX = """
import sys, time
from protojax import cli, hosts, main

def run(argv):
  args = main.parse(argv)[1]
  with hosts.told(main._connect(args)):
    import numpy as np
    from jax.experimental import multihost_utils
    for step in range(2000):
      multihost_utils.process_allgather(np.ones(3))
      if step == 1:
        print("up", flush=True)
      time.sleep(0.05)

cli.guarded(run, sys.argv[1:])
"""


@pytest.fixture
def address():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def start():
  """Starts `python -c CODE ARGUMENTS` and ends what is left of it."""
  started = []

  def start(code, *arguments):
    started.append(
      subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.communicate()


def _bare(start, address, indices, *, bad=-1, how="hang", count=3, patience=30, silence=30):
  code = _BARE.format(start=patience, timeout=silence)
  return [start(code, address, count, index, bad, how) for index in indices]


def _last(process, status):
  """The last line on stderr of a process that ends with this status."""
  output, log = process.communicate(timeout=60)
  assert process.returncode == status, output + log
  assert "Traceback" not in log and "Fatal" not in log
  return log.splitlines()[-1]


def _up(processes):
  for process in processes:
    assert "up\n" in iter(process.stdout.readline, ""), process.communicate()  # Gloo speaks too


@pytest.mark.survives(
  "a host that is killed",
  "process 0 and process 2 of 3",
  "`process 2 on HOST is gone`, on all others, status 75",
)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_is_named_by_all_others(start, address, victim):
  processes = _bare(start, address, range(3))
  _up(processes)
  processes[victim].kill()
  for process in processes[:victim] + processes[victim + 1 :]:
    line = _last(process, errors.LOST)
    assert re.fullmatch(
      rf"protojax: process {victim} on \S+ is gone: killed, or its machine went down\. Start the "
      r"same command on all hosts again: checkpoint 30 is intact",
      line,
    )


@pytest.mark.survives(
  "a host that freezes (SIGSTOP)",
  "process 0 and process 1 of 2",
  "`has not been heard of for 60 s`, on all others, status 75",
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_is_named_and_ends_too_when_it_thaws(start, address, victim):
  processes = _bare(start, address, range(2), count=2, silence=2)
  _up(processes)
  processes[victim].send_signal(signal.SIGSTOP)
  said = rf"protojax: process {victim} on \S+ has not been heard of for \d s\. Start the same .*"
  assert re.fullmatch(said, _last(processes[1 - victim], errors.LOST))
  processes[victim].send_signal(signal.SIGCONT)
  assert f"process {1 - victim if victim == 0 else 1}" in _last(processes[victim], errors.LOST)


@pytest.mark.survives(
  "hosts that do not come",
  "2 of 4",
  "their numbers, status 75",
)
def test_processes_that_do_not_come_are_named(start, address):
  zero, one = _bare(start, address, [0, 1], count=4, patience=3)
  for process in (zero, one):
    line = _last(process, errors.LOST)
    assert re.search(r"process 2, 3 of 4 did not come within 3 s: look why .* reaches port", line)


@pytest.mark.survives(
  "the first host does not come",
  "process 0",
  "its address, status 75",
)
def test_a_missing_first_process_is_named(start, address):
  (one,) = _bare(start, address, [1], patience=2)
  line = _last(one, errors.LOST)
  assert f"process 0 at {address} did not come within 2 s (Connection refused): look" in line


@pytest.mark.parametrize(
  ("indices", "words"),
  [((0, 1, 1), "two processes say that they are process 1: give each its own process_id")],
)
def test_an_index_that_is_given_twice_is_said(start, address, indices, words):
  for process in _bare(start, address, indices):
    assert _last(process, 2) == f"protojax: {words}"


@pytest.mark.survives(
  "one host ends of a mistake or a full disk",
  "process 0 and process 1 of 3",
  "its line there and on all others",
)
@pytest.mark.parametrize("bad", [0, 1])
def test_what_ends_one_process_is_said_by_the_others(start, address, bad):
  processes = _bare(start, address, range(3), bad=bad, how="mistake")
  for index, process in enumerate(processes):
    line = _last(process, 2)
    if index == bad:
      assert line == "protojax: no space left on device"
    else:
      assert re.fullmatch(rf"protojax: process {bad} .*has ended: no space left on device", line)


def test_a_fault_of_one_process_is_its_traceback_there_and_a_line_elsewhere(start, address):
  zero, one = _bare(start, address, range(2), bad=1, how="fault", count=2)
  assert re.fullmatch(r"protojax: process 1 on \S+ has ended: KeyError: 'a fault'", _last(zero, 1))
  _, log = one.communicate(timeout=60)
  assert one.returncode == 1 and "Traceback" in log


@pytest.mark.parametrize("first", [0, 1])
def test_a_process_that_is_done_is_not_lost(start, address, first):
  for process in _bare(start, address, range(2), bad=first, how="done", count=2):
    _, log = process.communicate(timeout=60)
    assert (process.returncode, log) == (0, "")


def test_who_knocks_without_a_name_is_left_outside(start, address):
  (zero,) = _bare(start, address, [0], count=2)
  host, port = address.split(":")
  for _ in range(100):
    try:
      with socket.create_connection((host, int(port)), timeout=1) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
      break
    except OSError:
      time.sleep(0.1)
  (one,) = _bare(start, address, [1], count=2)
  _up([zero, one])


@pytest.mark.survives(
  "a host lost within JAX's own exchanges",
  "kill -9 and SIGSTOP of process 0 and 1",
  "the same line, no native crash",
)
@pytest.mark.parametrize(
  ("victim", "sent"),
  [
    (0, signal.SIGKILL),
    pytest.param(1, signal.SIGKILL, marks=long),
    pytest.param(0, signal.SIGSTOP, marks=long),
    pytest.param(1, signal.SIGSTOP, marks=long),
  ],
)
def test_jax_does_not_crash_when_a_process_is_lost(start, address, tmp_path, victim, sent):
  recipe = ROOT / "configs" / "quickstart.py:debug"
  flags = [f"--config={recipe}", f"--workdir={tmp_path}", "--host_timeout=5", "--num_processes=2"]
  flags.append(f"--coordinator_address={address}")
  processes = [start(_JAX, *flags, f"--process_id={i}") for i in range(2)]
  _up(processes)
  processes[victim].send_signal(sent)
  line = _last(processes[1 - victim], errors.LOST)
  assert re.match(rf"protojax: process {victim} on \S+ (is gone|has not been heard of)", line)
  assert line.endswith("there is no checkpoint yet")


def test_an_address_without_a_port_is_a_mistake():
  with pytest.raises(errors.UserError, match="coordinator_address=here: give host:port"):
    hosts.join("here", 2, 0, start_timeout=1, timeout=1, intact=str)


@pytest.mark.survives(
  "a host that is slow to start",
  "JAX's own wait for the others, which ends after 30 s",
  "a line and status 75: again",
)
def test_processes_that_miss_each_other_are_to_be_started_again():
  told = []

  class Others:
    def broken(self, error):
      pass

    def failed(self, status, text):
      told.append((status, text))

  with pytest.raises(errors.Missing, match="did not meet in the time .*: start it again"):
    with hosts.told(Others()):
      raise RuntimeError("Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue()")
  assert told[0][0] == errors.LOST
  with pytest.raises(ZeroDivisionError), hosts.told(Others()):
    raise ZeroDivisionError
  assert told[1][0] == 1
  with pytest.raises(errors.Missing), hosts.told(Others()):
    raise errors.Missing("a disk is away")
  assert told[2] == (errors.LOST, "a disk is away")
