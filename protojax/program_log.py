"""The log of the program: which lines are for the user, how they look, a copy for a run."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from absl import logging as absl_logging


class Plain(logging.Formatter):
  """A line of the log as a run's own lines are: no clock, no file; a warning is called one."""

  def format(self, record: logging.LogRecord) -> str:
    head = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    return head + super().format(record)


def ours(record: logging.LogRecord) -> bool:
  """Whether a line of the log is for the user: a note of another library is not."""
  # Below site-packages: an environment may lie in a clone that is called protojax.
  _, installed, inside = record.pathname.rpartition("/site-packages/")
  return record.levelno >= logging.WARNING or not installed or inside.startswith("protojax/")


class Heard(logging.Handler):
  """Keeps the lines for the user, and hands them over from `to` on; a context manager.

  What is said while a run is prepared, such as that its newest checkpoint is damaged, comes before
  there is a file to write it to.
  """

  def __init__(self):
    super().__init__()
    self.setFormatter(Plain())
    self.addFilter(ours)
    self._early: list[str] = []
    self._write: Callable[[str], None] | None = None

  def __enter__(self):
    absl_logging.get_absl_logger().addHandler(self)
    return self

  def __exit__(self, *unused):
    absl_logging.get_absl_logger().removeHandler(self)

  @contextlib.contextmanager
  def to(self, write: Callable[[str], None]) -> Iterator[None]:
    """Within this every line goes to `write`, those that were kept first."""
    for line in self._early:
      write(line)
    self._early, self._write = [], write
    try:
      yield
    finally:
      self._write = None

  def emit(self, record: logging.LogRecord) -> None:
    line = self.format(record)
    if self._write is None:
      self._early.append(line)
    else:
      self._write(line)
