"""Whether all processes of a run were started alike: one that was not would train another net."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from protojax import __version__, errors, trees

# What each machine may have its own way: where images lie, and who decodes them.
_OWN = ("data.data_dir", "data.num_workers", "probe.data_dir")
_BYTES = 1024  # of a line that goes around


def require_same(config) -> None:
  """Compares the settings of all processes, and which protojax and JAX they run. All call it.

  Args:
    config: resolved.

  Raises:
    UserError: in every process, with what differs in the first one that differs from process 0.
  """
  if jax.process_count() == 1:
    return
  mine = _started_with(config)
  text = json.dumps(mine).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
  first = multihost_utils.broadcast_one_to_all(
    np.frombuffer(text[:size].ljust(size, b" "), np.uint8)
  )
  theirs = json.loads(bytes(np.asarray(first, np.uint8)))
  differing = ", ".join(
    f"{key} {json.dumps(mine.get(key))} instead of {json.dumps(theirs.get(key))}"
    for key in sorted(mine.keys() | theirs.keys())
    if mine.get(key) != theirs.get(key)
  )
  if (found := first_to_say(differing)) is not None:
    raise errors.UserError(
      f"process {found[0]} was not started as process 0 was: {errors.in_line(found[1])}: give "
      "every process the same command, recipe and version"
    )


def first_to_say(own: str) -> tuple[int, str] | None:
  """(process, its line) of the first that says anything but "", in every process; None of none."""
  line = np.frombuffer(own.encode()[:_BYTES].ljust(_BYTES, b"\0"), np.uint8)
  lines = np.asarray(multihost_utils.process_allgather(line), np.uint8).reshape(-1, _BYTES)
  said = [bytes(found).rstrip(b"\0").decode(errors="ignore") for found in lines]
  return next(((index, text) for index, text in enumerate(said) if text), None)


def _started_with(config) -> dict[str, Any]:
  settings = {key: value for key, value in trees.flat(config).items() if key not in _OWN}
  return json.loads(
    json.dumps({"protojax": __version__, "jax": jax.__version__, **settings}, default=str)
  )
