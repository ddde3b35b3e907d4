import errno
import io
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from protojax import progress
from protojax.training import metric_writer


def _lines(folder):
  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _events(folder):
  """Every event of every file, in the order of the files' start."""
  out = []
  for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      out.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return out


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def _make(folder, **options):
  return metric_writer.Writer(folder, **{"total_steps": 100, "stream": io.StringIO(), **options})


def test_a_line_is_the_step_and_the_metrics(tmp_path):
  with _make(tmp_path) as out:
    out.write(5, {"train/loss": jnp.float32(1.5), "time/wait": np.float64(0.25), "n": 3})
    # Nothing waits for close: whoever kills the run finds the line.
    assert _lines(tmp_path) == [{"step": 5, "train/loss": 1.5, "time/wait": 0.25, "n": 3}]
    out.write(6, {"monitor/verdict": "ok", "train/loss": 1.25})
  assert _lines(tmp_path)[1] == {"step": 6, "monitor/verdict": "ok", "train/loss": 1.25}


def test_nan_and_infinity_stay_valid_json_with_their_names(tmp_path):
  with _make(tmp_path) as out:
    out.write(1, {"a": float("nan"), "b": 2.0, "c": np.float32(-np.inf)})
  assert _lines(tmp_path) == [{"step": 1, "a": None, "b": 2.0, "c": None, "non_finite": ["a", "c"]}]
  values = {v.tag: v.simple_value for e in _events(tmp_path) for v in e.summary.value}
  assert values == {"b": 2.0}


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  whole.mkdir()
  parts.mkdir()
  with _make(whole) as out:
    for step in range(1, 11):
      out.write(step, {"loss": 1 / step})
  with _make(parts) as out:
    for step in range(1, 8):
      out.write(step, {"loss": 1 / step if step <= 4 else -1.0})
  with open(parts / "metrics.jsonl", "a") as file:
    file.write('{"step": 4, "lo')  # killed while writing
  with _make(parts, start_step=4) as out:
    assert [r["step"] for r in _lines(parts)] == [1, 2, 3, 4]
    for step in range(5, 11):
      out.write(step, {"loss": 1 / step})
  assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  assert not list(parts.glob("*.tmp"))


@pytest.mark.survives(
  "a line of metrics.jsonl that was cut",
  "the last one",
  "dropped with a warning",
)
def test_torn_last_line_of_a_kept_step_is_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n[2]\n{"step": 2}\n{"step": 3, "a')
  _make(tmp_path, start_step=3).close()
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_new_run_starts_an_empty_file(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 90}\n')
  _make(tmp_path).close()
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
  before = '{"step": 1}\n{"step": 9}\n'
  (tmp_path / "metrics.jsonl").write_text(before)

  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(metric_writer.os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    _make(tmp_path, start_step=5)
  assert (tmp_path / "metrics.jsonl").read_text() == before


def test_tensorboard_gets_scalars_and_is_told_what_to_forget(tmp_path):
  with _make(tmp_path) as out:
    out.write(3, {"train/loss": 2.0})
    out.write(4, {"train/loss": 1.0})
  with _make(tmp_path, start_step=3) as out:
    out.write(4, {"train/loss": 0.5})
  events = _events(tmp_path)
  scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  expected = [(3, "train/loss", 2.0), (4, "train/loss", 1.0), (4, "train/loss", 0.5)]
  assert scalars == expected
  purges = [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START]
  assert purges == [4]


@pytest.mark.survives(
  "a full disk under the log",
  "metrics.jsonl and train.log",
  "one line, at once",
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log"])
def test_full_disk_is_an_error_at_once_and_closing_does_not_hide_it(tmp_path, name):
  (tmp_path / name).symlink_to("/dev/full")

  def run():
    with _make(tmp_path) as out:
      out.line("hello")
      out.write(1, {"loss": 1.0})
      raise AssertionError("nobody noticed")

  with pytest.raises(OSError) as caught:
    run()
  assert caught.value.errno == errno.ENOSPC


def test_first_error_is_the_one_that_is_seen(tmp_path):
  (tmp_path / "train.log").symlink_to("/dev/full")
  with pytest.raises(KeyError, match="the cause"), _make(tmp_path) as out:
    out._text.write("fails once more when the file is closed")
    raise KeyError("the cause")


def test_full_disk_under_the_event_file_is_an_error_too(tmp_path, monkeypatch):
  out = _make(tmp_path)

  def full(event):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(out._events, "write_event", full)
  with pytest.raises(OSError, match="No space left"):
    out.write(1, {"loss": 1.0})
  out.close()


def test_without_a_terminal_there_are_plain_lines_and_no_bar(tmp_path):
  stream = io.StringIO()
  with _make(tmp_path, stream=stream) as out:
    out.progress(10, note="img/s 1630")
    out.line("step 10/100\n  loss 7.91")  # a fold is for a terminal
  assert stream.getvalue() == "step 10/100  loss 7.91\n"
  assert (tmp_path / "train.log").read_text().endswith(" step 10/100  loss 7.91\n")


def test_on_a_terminal_a_bar_moves_with_the_steps_below_the_lines(tmp_path, monkeypatch):
  seconds = [0.0]
  monkeypatch.setattr(progress, "_now", lambda: seconds[0])
  stream = _Terminal()
  with _make(tmp_path, stream=stream, start_step=40) as out:
    for step in range(41, 50):
      seconds[0] += 1.0
      out.progress(step)
      assert f"\rstep {step}/100   {step}% |" in stream.getvalue()
    seconds[0] += 1.0
    out.progress(50, rate=0.5, note="img/s 1630  wait 1%")
    out.line("step 50/100\n  loss 1.00")
  shown = stream.getvalue()
  assert "eta 1:40  img/s 1630  wait 1%" in shown
  assert shown.endswith(" \rstep 50/100\n  loss 1.00\n")


def test_train_log_keeps_its_history(tmp_path):
  for text in ("first", "second"):
    with _make(tmp_path, start_step=5) as out:
      out.line(text)
  lines = (tmp_path / "train.log").read_text().splitlines()
  assert [line.split()[-1] for line in lines] == ["first", "second"]


def test_other_processes_write_nothing(tmp_path):
  stream = _Terminal()
  with _make(tmp_path, lead=False, stream=stream) as out:
    out.write(1, {"loss": 1.0})
    out.line("hello")
    out.progress(1)
    out.flush()
  assert not list(tmp_path.iterdir()) and not stream.getvalue()


def test_closing_twice_is_harmless_and_flush_works(tmp_path):
  out = _make(tmp_path)
  out.write(1, {"loss": 1.0})
  out.flush()
  out.close()
  out.close()


def test_import_does_not_load_tensorboard():
  code = "import sys, protojax.training.metric_writer; sys.exit('tensorboardX' in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)
