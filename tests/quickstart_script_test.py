"""launch/quickstart.sh: two runs side by side, told apart, stopped together, and then compared.

Its environment is there before, and the python in it only says how it was called: what it calls is
tested elsewhere, and `docs_test.py` runs the whole with PROTOJAX_TEST_ALL.
"""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
_PYTHON = """#!/bin/bash
case "$*" in
  "-m protojax.main"*quickstart.py:joint*) {joint} ;;
  "-m protojax.main"*) {decoupled} ;;
  "-m protojax.report"*) echo "compared: $*" ;;
  *) exec {python} "$@" ;;
esac
"""
_TRAINED = 'echo "trained: $*"'
# Started under nohup, as these tests may be, a script could not hear a hang-up.
_HEARS = (
  "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
  "os.execvp(sys.argv[1], sys.argv[1:])"
)


def _script(folder, **runs):
  """The script as a process, with what its two runs do."""
  venv = folder / "venv"
  (venv / "bin").mkdir(parents=True)
  (venv / "pyvenv.cfg").touch()
  python = shlex.quote(sys.executable)
  (venv / "bin" / "python").write_text(_PYTHON.format(python=python, **runs))
  (venv / "bin" / "python").chmod(0o755)
  names = f"source launch/venv.sh; wanted {python} -c launch/floors.txt -e ."
  wanted = subprocess.check_output(["bash", "-c", names], cwd=ROOT, text=True)
  (venv / "installed").write_text(wanted)
  return subprocess.Popen(
    [sys.executable, "-c", _HEARS, "bash", str(ROOT / "launch" / "quickstart.sh")]
    + [str(folder / "out"), "--config.seed=3"],
    env={**os.environ, "PROTOJAX_VENV": str(venv), "PROTOJAX_PYTHON": sys.executable},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_both_runs_are_labelled_and_compared(tmp_path):
  done = _script(tmp_path, joint=_TRAINED, decoupled=_TRAINED)
  said, errors = done.communicate(timeout=60)
  out = tmp_path / "out"
  assert done.returncode == 0, errors
  main = "trained: -m protojax.main --config=configs/quickstart.py"
  assert set(said.splitlines()) == {
    f"joint     | {main}:joint --workdir={out}/joint --config.seed=3",
    f"decoupled | {main} --workdir={out}/decoupled --config.seed=3",
    f"compared: -m protojax.report --workdir={out}/joint --workdir={out}/decoupled "
    f"--out={out}/comparison.html",
  }


def test_lines_are_there_when_they_are_said(tmp_path):
  waits = (
    f"echo begun; for i in $(seq 200); do [ -e {tmp_path}/go ] && exit; sleep .05; done; exit 1"
  )
  script = _script(tmp_path, joint=waits, decoupled=_TRAINED)
  said = {script.stdout.readline()[:11], script.stdout.readline()[:11]}
  assert said == {"joint     |", "decoupled |"}
  (tmp_path / "go").touch()
  script.communicate(timeout=60)
  assert script.returncode == 0


def test_a_run_that_fails_is_named_and_nothing_is_compared(tmp_path):
  done = _script(tmp_path, joint='echo "protojax: no" >&2; exit 2', decoupled=_TRAINED)
  said, errors = done.communicate(timeout=60)
  assert done.returncode == 1 and "compared" not in said
  assert "joint     | protojax: no" in said and "decoupled | trained" in said
  assert errors.count("\n") == 1 and "a run did not end" in errors


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_both_runs_are_told_to_stop_and_waited_for(tmp_path, sent):
  waits = (
    f"trap 'sleep .3; touch {tmp_path}/saved-$$; exit 143' TERM; touch {tmp_path}/begun-$$; "
    "while :; do sleep .05; done"
  )
  script = _script(tmp_path, joint=waits, decoupled=waits)
  deadline = time.monotonic() + 60
  while len(list(tmp_path.glob("begun-*"))) < 2:
    assert time.monotonic() < deadline and script.poll() is None
    time.sleep(0.05)
  script.send_signal(sent)
  said, _ = script.communicate(timeout=60)
  assert script.returncode == 130 and "compared" not in said
  assert len(list(tmp_path.glob("saved-*"))) == 2
