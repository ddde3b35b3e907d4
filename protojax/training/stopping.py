"""A run that is asked to stop: what signals mean, and when all processes hear of it."""

import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from protojax import errors


class Asked(Exception):
  """Work between two steps is left, because a process was asked to stop."""


class Stop:
  """SIGTERM, SIGHUP or Ctrl-C asks for a checkpoint and a clean exit; a second Ctrl-C insists.

  SIGHUP, of a terminal that was closed, does so unless it was ignored before, as under nohup.
  """

  def __init__(self):
    self._asked, self._old, self._looks = False, {}, 0
    self.number = signal.SIGTERM  # by which this process was asked; another may have been

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      asking = [signal.SIGTERM, signal.SIGINT]
      asking += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
      self._old = {s: signal.signal(s, self._ask) for s in asking}
    return self

  def _ask(self, number, frame):
    del frame
    if self._asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked, self.number = True, number

  def __exit__(self, *unused):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def asked(self, step: int) -> bool:
    """Whether any process was asked to stop; every process gets the same answer.

    Several processes talk about it every tenth step only: the exchange waits for the device.
    """
    if jax.process_count() == 1:
      return self._asked
    if step % 10:
      return False
    return self._any_asked()

  def look(self) -> None:
    """For `progress.watched`: leaves work between two steps, on all processes at the same report.

    Several talk about it at every tenth report only.

    Raises:
      Asked: if any process was asked to stop.
    """
    self._looks += 1
    if self.asked(self._looks):
      raise Asked

  def ended(self, step: int) -> bool:
    """Whether any process was asked to stop by the end of the training, after `step` updates.

    From here on a signal ends this process at once; of a run of one process in the line that says
    what is saved.
    """
    asking = set(self._old) - {signal.SIGINT}
    self.__exit__()
    if jax.process_count() > 1:
      self._old = {}
      return self._any_asked()

    def leave(number, frame):
      del frame
      raise errors.Interrupted(step, number, trained=True, broken_off=True)

    for number in asking:
      signal.signal(number, leave)
    return self._asked

  def _any_asked(self) -> bool:
    return bool(multihost_utils.process_allgather(np.asarray(self._asked)).any())
