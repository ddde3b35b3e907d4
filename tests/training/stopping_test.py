"""A run that is asked to stop."""

import os
import signal

import pytest

from protojax import errors, progress
from protojax.training import stopping


def test_a_signal_after_the_training_ends_the_program_at_once_and_says_what_is_saved():
  """Before the final evaluation, which may be long: nobody asks for it there any more."""
  before = signal.getsignal(signal.SIGTERM)
  with stopping.Stop() as stop:
    assert not stop.asked(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.ended(12) and stop.number == signal.SIGTERM
    with pytest.raises(errors.Interrupted, match="stopped at step 12, the last one: all steps"):
      os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_leaves_long_work_at_its_next_report():
  with stopping.Stop() as stop, progress.watched(stop.look):
    numbers = progress.over([0, 1, 2], "counting")
    assert next(numbers) == 0 and next(numbers) == 1
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(stopping.Asked):
      next(numbers)
  assert list(progress.over([0, 1], "counting")) == [0, 1]


@pytest.mark.survives(
  "a closed terminal (SIGHUP)",
  "with and without nohup",
  "saved, status 129; under nohup nothing",
)
def test_a_closed_terminal_asks_to_save_unless_it_was_told_not_to_matter():
  before = signal.getsignal(signal.SIGHUP)
  try:
    for handler in (signal.SIG_DFL, signal.SIG_IGN):  # the latter is what nohup leaves
      signal.signal(signal.SIGHUP, handler)
      with stopping.Stop() as stop:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert ignored == (handler == signal.SIG_IGN)  # else the next line ends the tests
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked(0) != ignored
        assert ignored or stop.number == signal.SIGHUP
      assert signal.getsignal(signal.SIGHUP) == handler
  finally:
    signal.signal(signal.SIGHUP, before)
