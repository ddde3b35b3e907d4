"""What the program says, kept for a run's own log."""

import logging

import pytest
from absl import logging as absl_logging

from protojax import program_log


def test_lines_that_come_before_there_is_a_file_are_kept_for_it():
  lines = []
  with program_log.Heard() as heard:
    absl_logging.warning("checkpoint 6 is damaged:\ngoing on from checkpoint 4")
    with heard.to(lines.append):
      assert lines == ["warning: checkpoint 6 is damaged:\ngoing on from checkpoint 4"]
      absl_logging.warning("b.png cannot be read")
    absl_logging.warning("of the end")  # the file is closed
  absl_logging.warning("after it")
  assert lines[1:] == ["warning: b.png cannot be read"]


@pytest.mark.parametrize(
  ("path", "level", "shown"),
  [
    ("/venv/site-packages/protojax/data/cache.py", logging.INFO, "a note"),
    ("/clone/protojax/data/cache.py", logging.WARNING, "warning: a note"),
    ("/protojax/.venv/site-packages/tensorflow_datasets/info.py", logging.INFO, None),
    ("/protojax/protojax/data/cache.py", logging.INFO, "a note"),
    ("/venv/site-packages/orbax/checkpoint.py", logging.WARNING, "warning: a note"),
  ],
)
def test_the_log_is_plain_lines_of_ours_and_warnings_of_others(path, level, shown):
  record = logging.LogRecord("absl", level, path, 7, "a %s", ("note",), None)
  line = program_log.Plain("%(message)s").format(record)
  assert (line if program_log.ours(record) else None) == shown
