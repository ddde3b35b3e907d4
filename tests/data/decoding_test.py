"""Who decodes: measured rates, chosen workers, and shared memory that is too small for them."""

import functools
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from protojax import errors
from protojax.data import decoding, pipeline, sources


@pytest.fixture
def files(tmp_path):
  for i in range(3):
    Image.new("RGB", (9, 7), (i, i, i)).save(tmp_path / f"{i}.png")
  return sources.build("folder", split=None, data_dir=tmp_path)


@pytest.fixture
def machine(monkeypatch):
  """Sets cores, backend, bytes of shared memory and images a second of one core."""

  def of(cores=8, backend="gpu", room=2**40, rate=100.0):
    monkeypatch.setattr(decoding, "cores", lambda: cores)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(decoding, "_room", lambda: room)
    monkeypatch.setattr(decoding, "rate", lambda source, size: rate)

  return of


def test_workers_are_a_core_each_but_one_shared_with_streams_beside(files, machine):
  plan = functools.partial(decoding.plan, files, image_size=256, batch_size=256)
  machine()
  assert plan() == (7, 700.0) and plan(share=0.1).workers == 1 and plan(asked=3) == (3, 300.0)
  machine(cores=64)
  assert plan().workers == 16
  machine(cores=1)
  assert plan().workers == 1


def test_threads_decode_where_processes_would_not_help(files, machine):
  plan = functools.partial(decoding.plan, image_size=32, batch_size=64)
  machine(backend="cpu", cores=2)
  assert plan(files) == (0, 200.0)
  machine()
  assert plan(files, images=2048).workers == 0  # 2.6 s with eight threads
  assert plan(files, images=1_000_000).workers == 7
  assert plan(sources.build("digits", split="test")) == (0, np.inf)


def test_small_shared_memory_is_named_and_fewer_workers_taken(files, machine, caplog):
  plan = functools.partial(decoding.plan, files, image_size=256, batch_size=256)
  machine(room=64 * 2**20)
  assert decoding.needed(1, 256, 256, 3) > 64 * 2**20  # a piece of 64 images has 12 MiB
  with caplog.at_level("WARNING"):
    assert plan().workers == 0
  assert "/dev/shm has 64 MiB" in caplog.text and "--shm-size" in caplog.text
  stream = pipeline.batches(files, seed=0, step=0, batch_size=2, image_size=8, num_workers=2)
  stream.close()  # small images fit
  with pytest.raises(errors.UserError, match="64 MiB.*--shm-size.*num_workers=0") as caught:
    pipeline.batches(files, seed=0, step=0, batch_size=256, image_size=256, num_workers=8)
  assert "\n" not in str(caught.value)
  machine(room=200 * 2**20)
  assert 0 < (of_colour := plan().workers) < 7
  files.channels = 5
  assert plan().workers < of_colour


def _die(records):
  del records
  os.kill(os.getpid(), signal.SIGBUS)  # what touching shared memory does when there is no more


@pytest.mark.survives(
  "a process that decodes images dies",
  "SIGBUS for real; SIGKILL and exit 3 as grain says them",
  "one line: the likely cause, what to lower",
)
def test_a_worker_that_dies_is_one_line():
  data = sources.Source("own", np.arange(4), _die)
  stream = pipeline.batches(data, seed=0, step=0, batch_size=2, image_size=4, num_workers=1)
  with pytest.raises(errors.UserError, match="--shm-size=8g.*num_workers=0") as caught:
    list(itertools.islice(stream, 1))
  assert "\n" not in str(caught.value)
  said = "Worker process was terminated unexpectedly with exit code {}. Search the logs"
  for code, words in ((-9, "lower config.data.num_workers"), (3, "exit code 3")):
    assert words in str(pipeline._of_worker(RuntimeError(said.format(code))))
  other = RuntimeError("another")
  assert pipeline._of_worker(other) is other


def _told_to_stop(records):
  os.kill(os.getpid(), signal.SIGTERM)
  return [(np.full((4, 4, 3), r, np.uint8), 0) for r in records]


@pytest.mark.survives(
  "SIGTERM to a whole job",
  "SIGTERM to a decoding process",
  "images until the run has saved",
)
def test_a_worker_outlives_the_signal_that_stops_the_whole_job():
  """The run takes more batches before it saves and ends."""
  data = sources.Source("own", np.arange(4), _told_to_stop)
  stream = pipeline.batches(data, seed=0, step=0, batch_size=2, image_size=4, num_workers=1)
  assert [len(batch["image"]) for batch in itertools.islice(stream, 2)] == [2, 2]
  stream.close()


_LEFT = """
import os
import sys
import numpy as np
from protojax.data import pipeline, sources

def read(records):
  open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
  return [(np.zeros((4, 4, 3), np.uint8), 0) for _ in records]

if __name__ == "__main__":
  data = sources.Source("own", np.arange(4), read)
  next(pipeline.batches(data, seed=0, step=0, batch_size=2, image_size=4, num_workers=1))
  os.kill(os.getpid(), 9)
"""


@pytest.mark.survives(
  "kill -9 of a training with decoding processes",
  "the trainer",
  "none of them is left",
)
def test_no_worker_outlives_a_trainer_that_is_killed(tmp_path):
  (tmp_path / "left.py").write_text(_LEFT)
  (tmp_path / "pids").mkdir()
  done = subprocess.run(
    [sys.executable, tmp_path / "left.py", tmp_path / "pids"], timeout=120, check=False
  )
  (worker,) = (int(path.name) for path in (tmp_path / "pids").iterdir())
  assert done.returncode == -9
  limit = time.monotonic() + 30.0
  while pathlib.Path(f"/proc/{worker}").exists() and time.monotonic() < limit:
    time.sleep(0.1)
  assert not pathlib.Path(f"/proc/{worker}").exists()


def test_the_rate_is_that_of_reading_decoding_and_resizing(files):
  found = decoding.rate(files, 16)
  assert 10 < found < 1e6 and decoding.rate(files, 16) == found  # measured once
  assert decoding.rate(files, 8) != found


def test_the_line_says_both_rates_and_what_to_do_when_the_step_waits():
  plan = decoding.Plan(8, 2634.0)
  assert str(plan) == "8 workers decode about 2,600 img/s"
  assert plan.beside(1421.0) == f"{plan}; this step takes 1,400"
  assert plan.beside(9000.0).startswith(f"{plan}; this step takes 9,000, so it waits for images")
  assert str(decoding.Plan(0, 87.6)) == "threads decode about 88 img/s"
  assert str(decoding.Plan(1, 5.0)) == "1 worker decodes about 5 img/s"


def test_cores_are_at_least_one_and_no_more_than_there_are():
  assert 1 <= decoding.cores() <= (os.cpu_count() or 1)
