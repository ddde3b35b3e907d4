"""launch/slurm.sh under a Slurm of this machine: a job that is stopped goes on, to the bit.

Takes minutes and Debian's packages of munge and Slurm: bash launch/test.sh --all runs it where they
are.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import tiny

from protojax.verifying import comparing, killing

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = [
  pytest.mark.skipif("PROTOJAX_TEST_ALL" not in os.environ, reason="not without --all"),
  pytest.mark.skipif(
    any(
      shutil.which(n, path=f"{os.environ['PATH']}:/usr/sbin") is None for n in ("munged", "slurmd")
    ),
    reason="no Slurm here: apt-get install munge slurm-wlm",
  ),
]
_CHANGES = tiny.RUN | {
  "num_steps": 150,
  "save_every": 1000,
  "log_every": 10,
  "eval_every": 150,
  "monitor.every": 45,
}


def _sbatch(folder: pathlib.Path, name: str) -> str:
  """Submits a run of two processes; the number of the job."""
  flags = [f"--config.{k}={v}" for k, v in _CHANGES.items()]
  command = [
    "sbatch",
    "--parsable",
    "--nodes=1",
    "--ntasks-per-node=2",
    f"--output={folder}/{name}.log",
  ]
  command += ["launch/slurm.sh", "--config=quickstart:debug", f"--workdir={folder / name}", *flags]
  return subprocess.run(
    command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE
  ).stdout.strip()


def _job(number: str) -> dict[str, str]:
  """What Slurm knows of a job: JobState, ExitCode, Restarts, ..."""
  command = ["scontrol", "--oneliner", "show", "job", number]
  for _ in range(20):  # a busy machine's controller hangs up now and then
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE)
    if done.returncode == 0:
      return dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)
    time.sleep(1.0)
  raise AssertionError(f"no answer to {command}")


def _until(done, what: str, seconds: float = 600.0):
  limit = time.monotonic() + seconds
  while not done():
    assert time.monotonic() < limit, what
    time.sleep(0.3)


def _ended(number: str) -> bool:
  return _job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def inside(folder: pathlib.Path) -> None:
  """What runs beside the cluster."""
  whole, stopped = _sbatch(folder, "whole"), None
  _until(lambda: _ended(whole), "the whole run")
  assert _job(whole)["ExitCode"] == "0:0", (folder / "whole.log").read_text()

  stopped = _sbatch(folder, "stopped")
  for restarts, (step, command) in enumerate(
    [
      (10, ["scancel", "--signal=TERM", stopped]),  # as of a job that is preempted
      (40, ["scancel", "--signal=USR1", "--batch", stopped]),  # as at the end of its time
    ],
    1,
  ):
    _until(lambda step=step: killing.step_of(folder / "stopped") >= step, f"step {step}")
    subprocess.run(command, check=True)
    _until(lambda n=restarts: _job(stopped)["Restarts"] == str(n), f"restart {restarts}")
  _until(lambda: _ended(stopped), "the stopped run")
  log = (folder / "stopped.log").read_text()
  assert _job(stopped)["ExitCode"] == "0:0", log
  assert log.count("slurm.sh: status 143, queued again") == 2, log
  assert log.count("resumed at step") == 2 and log.count("protojax: stopped at step") == 4, log
  assert comparing.differences(folder / "whole", folder / "stopped")[0] == []

  cancelled = _sbatch(folder, "cancelled")
  _until(lambda: killing.step_of(folder / "cancelled") >= 10, "a job to cancel")
  subprocess.run(["scancel", cancelled], check=True)
  _until(lambda: _ended(cancelled), "the cancelled job")
  log = (folder / "cancelled.log").read_text()
  assert _job(cancelled)["JobState"] == "CANCELLED" and "queued again" not in log, log
  assert "protojax: stopped at step" in log, log

  command = ["sbatch", "--parsable", "--ntasks-per-node=2", f"--output={folder}/wrong.log"]
  command += ["launch/slurm.sh", "--config=nonsense", f"--workdir={folder / 'wrong'}"]
  wrong = subprocess.run(
    command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE
  ).stdout.strip()
  _until(lambda: _ended(wrong), "the mistaken job")
  assert _job(wrong)["ExitCode"] == "2:0" and _job(wrong)["Restarts"] == "0"


@pytest.mark.survives(
  "a job of Slurm that is preempted",
  "two tasks on a real slurmctld and slurmd",
  "queued again by itself; the end of an uninterrupted run",
)
def test_a_job_that_is_stopped_goes_on_by_itself_and_ends_as_a_whole_one(tmp_path):
  done = subprocess.run(
    ["bash", ROOT / "tests" / "slurm_cluster.sh", sys.executable, __file__, tmp_path],
    env={
      **os.environ,
      "VIRTUAL_ENV": sys.prefix,
      "JAX_NUM_CPU_DEVICES": "1",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
    check=False,
    capture_output=True,
    text=True,
    timeout=2400,
  )
  assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
  inside(pathlib.Path(sys.argv[1]))
