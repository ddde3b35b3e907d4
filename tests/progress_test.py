"""On a terminal one bar that moves, elsewhere a line a minute at most; log lines stay whole."""

import io
import logging
import sys
import threading

import pytest

from protojax import progress


class _Terminal(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True


@pytest.fixture
def now(monkeypatch):
  """A clock that stands until it is moved: now[0] = seconds."""
  seconds = [1000.0]
  monkeypatch.setattr(progress, "_now", lambda: seconds[0])
  monkeypatch.setenv("COLUMNS", "80")
  yield seconds
  progress.end()


def _screen(text: str) -> list[str]:
  """The lines that a terminal shows after `text`."""
  lines = [""]
  for part in text.replace("\n", "\r\n").split("\r"):
    if part.startswith("\n"):
      lines, part = [*lines, ""], part[1:]
    lines[-1] = part + lines[-1][len(part) :]
  return [line.rstrip() for line in lines]


def _work(stream, now, total, seconds, what="encoding cells", **options):
  with progress.Line(what, total, stream=stream, lead=True, **options) as line:
    for _ in range(total):
      now[0] += seconds
      line.step()
      yield stream.getvalue()


def test_in_a_pipe_there_is_a_line_a_minute_with_what_is_left(now):
  stream = io.StringIO()
  list(_work(stream, now, 100, 2.5))
  lines = stream.getvalue().splitlines()
  assert lines == [
    "encoding cells 24/100  eta 3:10",
    "encoding cells 48/100  eta 2:10",
    "encoding cells 72/100  eta 1:10",
    "encoding cells 96/100  eta 0:10",
  ]


def test_in_a_pipe_work_of_less_than_a_minute_says_nothing(now):
  stream = io.StringIO()
  for _ in range(9):
    list(_work(stream, now, 100, 0.5))
    now[0] += 300.0  # of something else
  assert not stream.getvalue()


def test_on_a_terminal_the_bar_moves_and_is_gone_at_the_end(now):
  stream = _Terminal()
  seen = [_screen(text) for text in _work(stream, now, 40, 0.2, done=0)]
  assert seen[1] == [""]  # nothing in the first half second
  assert all(len(lines) == 1 for lines in seen)  # always the same line
  assert seen[9][0].startswith("encoding cells 10/40   25% |██") and "eta 0:06" in seen[9][0]
  assert all(len(line) < 80 for (line,) in seen)
  assert len(set(map(str, seen))) > 30  # with each step
  assert _screen(stream.getvalue()) == [""]


def test_a_bar_is_not_drawn_more_than_ten_times_a_second(now):
  stream = _Terminal()
  list(_work(stream, now, 10_000, 0.001))
  assert 80 < stream.getvalue().count("\r") < 120


def test_a_given_rate_and_note_are_those_of_the_line(now):
  stream = _Terminal()
  with progress.Line("step", 100, done=40, stream=stream, lead=True) as line:
    now[0] += 1.0
    line.to(50, rate=0.5, note="img/s 1630  wait 1%")
    (shown,) = _screen(stream.getvalue())
    assert shown.startswith("step 50/100   50% |") and shown.endswith(
      "eta 1:40  img/s 1630  wait 1%"
    )
    now[0] += 1.0
    line.to(52)
    assert _screen(stream.getvalue())[0].endswith("eta 1:36  img/s 1630  wait 1%")


def test_what_was_restored_took_no_time_and_neither_did_compiling(now):
  stream = _Terminal()
  with progress.Line("step", 100, done=50, stream=stream, lead=True) as line:
    now[0] += 600.0
    line.to(51)
    now[0] += 1.0
    line.to(52)
  assert "eta 0:48" in stream.getvalue()


def test_lines_are_printed_where_the_bar_was_and_it_comes_back_below(now):
  stream = _Terminal()
  with progress.Line("step", 10, stream=stream, lead=True) as line:
    now[0] += 1.0
    line.to(5)
    progress.write("step 5/10  loss 1.00", stream)
    assert _screen(stream.getvalue()) == ["step 5/10  loss 1.00", ""]
    now[0] += 1.0
    line.to(6)
    first, second = _screen(stream.getvalue())
    assert first == "step 5/10  loss 1.00" and second.startswith("step 6/10   60%")


def test_a_line_in_a_pipe_counts_as_the_one_of_its_minute(now):
  stream = io.StringIO()
  with progress.Line("step", 1000, stream=stream, lead=True) as line:
    for step in range(1, 61):
      now[0] += 2.0
      line.to(step)
      if step % 10 == 0:
        progress.write(f"step {step}/1000  loss 1.00", stream)
  assert len(stream.getvalue().splitlines()) == 6 and "eta" not in stream.getvalue()


def test_log_records_step_around_the_bar(now):
  stream = _Terminal()
  handler = logging.StreamHandler(stream)
  logging.root.addHandler(handler)
  try:
    with progress.Line("step", 10, stream=stream, lead=True) as line:
      now[0] += 1.0
      line.to(5)
      logging.getLogger("grain").warning("a worker is slow")
      assert _screen(stream.getvalue()) == ["a worker is slow", ""]
    assert not handler.filters
  finally:
    logging.root.removeHandler(handler)


def test_work_inside_of_work_takes_the_one_line_and_gives_it_back(now):
  stream = _Terminal()
  with progress.Line("step", 10, stream=stream, lead=True) as outer:
    now[0] += 1.0
    outer.to(5)
    with progress.Line("encoding", 4, stream=stream, lead=True) as inner:
      now[0] += 1.0
      inner.to(1)
      outer.to(6)
      (shown,) = _screen(stream.getvalue())
      assert shown.startswith("encoding 1/4")
    assert _screen(stream.getvalue()) == [""]
    now[0] += 1.0
    outer.to(7)
    assert _screen(stream.getvalue())[0].startswith("step 7/10")


def test_over_gives_every_item_and_leaves_nothing_behind(now, monkeypatch):
  monkeypatch.setattr(sys, "stderr", stream := _Terminal())
  seen = []
  for item in progress.over("abcd", "reading {x}"):
    now[0] += 1.0
    seen.append(item)
    if item == "c":
      break
  assert seen == ["a", "b", "c"] and "reading {x} 2/4   50%" in stream.getvalue()
  assert not progress._lines and _screen(stream.getvalue()) == [""]
  assert list(progress.over(iter("ab"), "reading")) == ["a", "b"]  # of unknown length


def test_a_call_that_does_not_report_is_shown_with_its_time(monkeypatch):
  moves = threading.Event()

  class Stream(_Terminal):
    def write(self, text):
      moves.set()
      return super().write(text)

  monkeypatch.setattr(sys, "stderr", stream := Stream())
  with progress.during("compiling"):
    assert moves.wait(30)
  assert "compiling  0:0" in stream.getvalue() and _screen(stream.getvalue()) == [""]


def test_other_processes_and_mistakes_leave_the_terminal_alone(now):
  stream = _Terminal()
  with progress.Line("step", 10, stream=stream, lead=False) as line:
    now[0] += 100.0
    line.to(5)
  assert not stream.getvalue()
  with progress.Line("step", 10, stream=stream, lead=True) as line:
    now[0] += 1.0
    line.to(5)
    progress.end()
    assert _screen(stream.getvalue()) == [""]
    now[0] += 1.0
    line.to(6)
  assert _screen(stream.getvalue()) == [""]


def test_a_terminal_without_unicode_gets_plain_characters(now):
  stream = _Terminal()
  stream.encoding = "ANSI_X3.4-1968"
  list(_work(stream, now, 20, 0.5))
  assert stream.getvalue().isascii() and "#" in stream.getvalue()
