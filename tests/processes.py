"""Several processes of one run, played by threads of this one: what they say to one another."""

import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from protojax import errors


def together(monkeypatch, *calls: Callable[[], object]) -> list[str]:
  """Calls each as the process of its place would; what each is refused with, "" if it is not.

  A collective of JAX between hosts waits for all: every one gives, every one gets what all gave.
  """
  count, given, own = len(calls), {}, threading.local()
  barrier = threading.Barrier(count)

  def exchange(x):
    given[own.index] = np.asarray(x)
    barrier.wait(10)
    found = [given[index] for index in range(count)]
    assert len({x.shape for x in found}) == 1
    barrier.wait(10)
    return found

  monkeypatch.setattr(jax, "process_count", lambda: count)
  monkeypatch.setattr(jax, "process_index", lambda: own.index)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: exchange(x)[0])
  monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.stack(exchange(x)))
  out: dict[int, object] = {}

  def one(index, call):
    own.index = index
    try:
      call()
      out[index] = ""
    except errors.UserError as error:
      out[index] = str(error)

  threads = [threading.Thread(target=one, args=item) for item in enumerate(calls)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return [out[index] for index in range(count)]
