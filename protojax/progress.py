"""Long work on one line: how far it is and how long it will take, on stderr.

    for batch in progress.over(batches, "reading"):
      ...
    with progress.during("compiling the step"):
      ...

On a terminal the line is a bar that moves; it comes after half a second, is gone when the work is
done, and steps aside for log lines. In a file or a pipe it is a line a minute at most, so work of
less than a minute says nothing. Work inside of work takes the line over until it is done. Only
process 0 speaks, and nobody once the terminal or the reader of the pipe is gone.
"""

import contextlib
import errno
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

_DELAY, _PAUSE = 0.5, 0.1  # seconds before a bar comes, and between its moves
_MINUTE = 60.0  # seconds between lines where there is no terminal

_now = time.monotonic
_lock = threading.RLock()
_lines: "list[Line]" = []  # the work under way, the innermost last
_drawn: "Line | None" = None  # whose bar the terminal shows
_said = 0.0  # when the last line was printed, or the outermost work began
_watch: "tuple[int, Callable[[], None]] | None" = None  # a thread, and what its reports call


def clock(seconds: float) -> str:
  """Hours, minutes, seconds.

  >>> clock(63.7), clock(8200)
  ('1:04', '2:16:40')
  """
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Line:
  """Work that says how far it is; a context manager.

  Args:
    what: a few words, "encoding digits/train".
    total: how much there is to do; None where nobody knows.
    done: how much was done before.
    stream: where to; None takes stderr.
    lead: whether this process speaks; None asks whether it is process 0.
  """

  def __init__(
    self,
    what: str,
    total: int | None = None,
    *,
    done: int = 0,
    stream: TextIO | None = None,
    lead: bool | None = None,
  ):
    self._what, self._total, self._done = what, total, done
    self._stream = sys.stderr if stream is None else stream
    self._lead = _is_lead() if lead is None else lead
    self._bar = self._stream.isatty()
    self._began = self._shown = _now()
    self._first: tuple[int, float] | None = None  # the first report: it waited for the compiler
    self._rate: float | None = None
    self._note = ""

  def __enter__(self) -> "Line":
    global _said
    if self._lead:
      with _lock:
        if not _lines:
          _said = self._began
          _listen(True)
        _lines.append(self)
    return self

  def __exit__(self, *unused: Any) -> None:
    with _lock:
      if self in _lines:
        if _drawn is self:
          _wipe()
        _lines.remove(self)
        if not _lines:
          _listen(False)

  def to(self, done: int, *, rate: float | None = None, note: str | None = None) -> None:
    """Says that so much is done now; costs a look at the clock where nothing is due.

    Args:
      done: of the total.
      rate: a second, for the time that is left; until it is given it is measured here, from the
        first report on.
      note: what else to show; both stay until they are given again.
    """
    now = _now()
    self._done = done
    self._rate = self._rate if rate is None else rate
    self._note = self._note if note is None else note
    if self._first is None:
      self._first = (done, now)
    if self._lead:
      self._show(now)
    if _watch is not None and _watch[0] == threading.get_ident():
      _watch[1]()

  def step(self) -> None:
    """One more is done."""
    self.to(self._done + 1)

  def _show(self, now: float) -> None:
    """Draws the bar, or prints the line, if that is due and no other work is inside of this."""
    global _drawn, _said
    if self._bar:
      if now - self._shown < _PAUSE or now - self._began < _DELAY:
        return
    elif now - _said < _MINUTE:
      return
    with _lock:
      if not _lines or _lines[-1] is not self:
        return
      self._shown = now
      if self._bar:
        width = shutil.get_terminal_size().columns - 1
        _put("\r" + self._text(now, width).ljust(width), self._stream)
        _drawn = self
      else:
        _said = now
        _put(self._text(now) + "\n", self._stream)

  def _text(self, now: float, width: int | None = None) -> str:
    if self._total is None:
      return f"{self._what}  {clock(now - self._began)}"[:width]
    left = f"{self._what} {self._done}/{self._total}"
    right = "".join(f"  {part}" for part in (self._eta(now), self._note) if part)
    if width is None:
      return left + right
    import tqdm  # here: `import protojax` stays light

    encoding = getattr(self._stream, "encoding", None) or "ascii"
    return tqdm.tqdm.format_meter(
      self._done,
      max(self._total, self._done),
      0.0,
      ncols=width,
      bar_format="{left}  {percentage:3.0f}% |{bar}|{right}",
      left=left,
      right=right,
      ascii=not encoding.lower().startswith("utf"),
    )

  def _eta(self, now: float) -> str:
    rate, (done, then) = self._rate, self._first or (0, now)
    if rate is None and self._done > done:
      rate = (self._done - done) / max(now - then, 1e-9)
    return f"eta {clock((self._total - self._done) / rate)}" if rate else ""


@contextlib.contextmanager
def watched(call: Callable[[], None]) -> Iterator[None]:
  """Within it every report of this thread's work calls `call`, which may raise to end the work.

  Not within itself.
  """
  global _watch
  _watch = threading.get_ident(), call
  try:
    yield
  finally:
    _watch = None


def over(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
  """Goes through `items` and says how many are done.

  Args:
    items: anything to loop over.
    what: a few words, "fitting".
    total: how many there are; None asks their length, and does without where they have none.
  """
  if total is None and isinstance(items, Sized):
    total = len(items)
  with Line(what, total) as line:
    for item in items:
      yield item
      line.step()


@contextlib.contextmanager
def during(what: str, total: int | None = None) -> Iterator[Line]:
  """Shows work although it does not report back for long, such as a compiler's.

  Args:
    what: a few words, "compiling".
    total: for work that reports its few parts; without, the line says how long it has taken.
  """
  with Line(what, total) as line:
    done = threading.Event()

    def tick() -> None:
      while not done.wait(1.0):
        line._show(_now())

    thread = threading.Thread(target=tick, daemon=True)
    if line._lead:
      thread.start()
    try:
      yield line
    finally:
      done.set()
      if line._lead:
        thread.join()


def write(text: str, stream: TextIO | None = None) -> None:
  """Prints a line (to stderr, if no stream is given) without tearing the bar."""
  global _said
  with _lock:
    _wipe()
    _said = _now()
    _put(f"{text}\n", sys.stderr if stream is None else stream)


def end() -> None:
  """Takes the bar away for good: the program ends, by a mistake perhaps."""
  with _lock:
    _wipe()
    _lines.clear()
    _listen(False)


def _wipe() -> None:
  """Takes the bar off the terminal; its next move draws it again."""
  global _drawn
  if _drawn is not None:
    width = shutil.get_terminal_size().columns - 1
    _put("\r" + " " * width + "\r", _drawn._stream)
    _drawn = None


def _put(text: str, stream: TextIO) -> None:
  """Writes; to where nobody reads any more, a closed pipe or terminal, it is silent for good."""
  try:
    stream.write(text)
    stream.flush()
  except OSError as error:
    if error.errno not in (errno.EPIPE, errno.EIO):
      raise
    discard(stream)


def discard(stream: TextIO) -> None:
  """Leads a stream that nobody reads any more into nothing, with what it still holds."""
  with contextlib.suppress(OSError):  # one that is no file has nothing to lead
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def _is_lead() -> bool:
  import jax  # asked without starting a backend, where there is one process

  return not jax.distributed.is_initialized() or jax.process_index() == 0


def _step_aside(record: logging.LogRecord) -> bool:
  """A filter of log handlers, which lets every record pass."""
  del record
  with _lock:
    _wipe()
  return True


def _listen(on: bool) -> None:
  """Has the bar step aside for log lines, or no longer."""
  for handler in (*logging.root.handlers, logging.lastResort):
    if handler is not None:
      handler.addFilter(_step_aside) if on else handler.removeFilter(_step_aside)
