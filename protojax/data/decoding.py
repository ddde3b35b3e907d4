"""How images become those of a batch, how fast that is here, and how many processes it takes."""

import math
import os
import pathlib
import time
import weakref
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from protojax import errors
from protojax.data import sources

CHUNK = 64  # rows that a thread or process decodes at a time
_MOST = 16  # processes, each of some hundred MB
_THREADS = 8
_SHORT = 20.0  # seconds of decoding that are over before processes have helped
_MEASURED = 32  # images at most, and .3 s
_SHARED = pathlib.Path("/dev/shm")  # where processes hand their images over, in Linux

_rates: weakref.WeakKeyDictionary[Any, dict[int, float]] = weakref.WeakKeyDictionary()


class Plan(NamedTuple):
  """Who decodes: `workers` processes, or threads of this one where it is 0; `rate` images/s."""

  workers: int
  rate: float

  def __str__(self) -> str:
    who = f"{self.workers} worker{'s' * (self.workers > 1)}" if self.workers else "threads"
    verb = "decodes" if self.workers == 1 else "decode"
    return f"{who} {verb} about {_rounded(self.rate)} img/s"

  def beside(self, step: float) -> str:
    """One line of `self` and a step that takes `step` images/s, with what to do if it waits."""
    line = f"{self}; this step takes {_rounded(step)}"
    if self.rate >= step:
      return line
    more = "more CPU cores" if self.workers else "config.data.num_workers"
    return f"{line}, so it waits for images: {more} or `protojax prepare` would help"


def _rounded(rate: float) -> str:
  """Two digits count."""
  digits = max(0, math.floor(math.log10(max(rate, 1))) - 1)
  return f"{round(rate, -digits):,.0f}"


def cores() -> int:
  """CPU cores that this process may use, also where a container allows fewer than there are."""
  count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  try:
    quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
    return max(1, min(count, math.ceil(int(quota) / int(period))))
  except (OSError, ValueError):  # no such file, or "max"
    return count


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """uint8 [H, W, C] -> [height, width, C], Pillow's bicubic; one of that shape is left alone."""
  if image.shape[:2] == (height, width):
    return image

  def one(x):
    return np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC))

  if image.shape[2] == 3:
    return one(image)
  return np.stack([one(image[..., c]) for c in range(image.shape[2])], axis=-1)


def stored_shape(size: tuple[int, int], image_size: int) -> tuple[int, int]:
  """(height, width) at which an original of `size` lies in the square: each side S at most."""
  return min(size[0], image_size), min(size[1], image_size)


def store(image: np.ndarray, size: tuple[int, int], image_size: int) -> np.ndarray:
  """An image as it goes into a batch, at the top left of a square that is black elsewhere.

  A side longer than S is shrunk to S, by itself, so that as much as possible of the original is
  kept; crops are drawn in its shape, which undoes that. An image of S x S or less stays as it is.

  Args:
    image: uint8 [H, W, C].
    size: height and width of the original, of which `image` may be a copy of another shape.
    image_size: S, pixels.

  Returns:
    uint8 [S, S, C].
  """
  height, width = stored_shape(size, image_size)
  image = resized(image, height, width)
  if (height, width) == (image_size, image_size):
    return image
  square = np.zeros((image_size, image_size, image.shape[2]), np.uint8)
  square[:height, :width] = image
  return square


def rate(source: sources.Source, image_size: int) -> float:
  """Images a second that one core reads, decodes and stores, measured once on a few of them.

  Args:
    source: from `sources.build`.
    image_size: S of `pipeline.batches`.
  """
  known = _rates.setdefault(source, {})
  if image_size not in known:
    rows = np.unique(np.linspace(0, len(source) - 1, _MEASURED + 1).astype(int)).tolist()
    start = end = time.perf_counter()
    for done, record in enumerate(next(source.read([row])) for row in rows):
      if isinstance(record, dict):
        store(record["image"], record["size"], image_size)
      end = time.perf_counter()
      if not done and len(rows) > 1:
        start = end  # the first finds nothing open
      elif end - start > 0.3:
        break
    known[image_size] = max(1, done) / max(end - start, 1e-9)
  return known[image_size]


def plan(
  source: sources.Source,
  *,
  image_size: int,
  batch_size: int,
  asked: int | None = None,
  images: int | None = None,
  share: float = 1.0,
) -> Plan:
  """Who decodes a stream of images.

  Unless asked: threads where the images lie in memory, the step itself runs on the CPU or the
  stream is over before processes have started; else a process a core but one, at most 16, and no
  more than the shared memory is enough for.

  Args:
    source: from `sources.build`.
    image_size: S, pixels.
    batch_size: rows of one process.
    asked: `data.num_workers`; None chooses.
    images: of the whole stream, None of an endless one.
    share: of the cores, where there are streams beside it.

  Raises:
    UserError: if the shared memory is too small for the processes that were asked for.
  """
  if asked is None and source.in_memory:
    return Plan(0, math.inf)
  of_one = rate(source, image_size)
  workers = _choose(of_one, images, share) if asked is None else asked
  shape = {"batch_size": batch_size, "image_size": image_size, "channels": source.channels}
  workers = fit(workers, asked=asked is not None, **shape)
  return Plan(workers, of_one * (workers or min(cores(), _THREADS)))


def fit(workers: int, *, asked: bool, batch_size: int, image_size: int, channels: int) -> int:
  """As many of these processes as the shared memory is enough for.

  Args:
    workers: processes.
    asked: by the user, so that fewer are a mistake; else it is said.
    batch_size: rows of one process.
    image_size: S, pixels.
    channels: of every image.

  Raises:
    UserError: if it is too small for processes that were asked for.
  """
  room, wanted, shape = _room(), workers, (batch_size, image_size, channels)
  while room is not None and workers and needed(workers, *shape) > room:
    workers -= 1
  if workers < wanted:
    line = (
      f"{wanted} workers take {_mib(needed(wanted, *shape))} of shared memory and {_SHARED} has "
      f"{_mib(room or 0)} (Docker gives 64 MiB unless told --shm-size=8g or --ipc=host)"
    )
    if asked:
      raise errors.UserError(f"{line}: give it more or set config.data.num_workers={workers}")
    logging.warning("%s: %s", line, f"{workers} are used" if workers else "threads decode")
  return workers


def _choose(of_one: float, images: int | None, share: float) -> int:
  import jax  # whoever only writes files needs none

  if jax.default_backend() == "cpu":
    return 0
  if images is not None and images / of_one / min(cores(), _THREADS) < _SHORT:
    return 0
  return math.ceil(share * max(1, min(cores() - 1, _MOST)))


def ahead(pieces: int, workers: int) -> int:
  """Pieces that each of so many processes keeps ready, of batches of so many pieces."""
  return math.ceil(pieces / workers)


def needed(workers: int, batch_size: int, image_size: int, channels: int) -> int:
  """Bytes of shared memory that so many processes fill while whoever trains is the slower one."""
  pieces = math.ceil(batch_size / CHUNK)
  waiting = workers * (ahead(pieces, workers) + 1)
  return (waiting + pieces) * min(batch_size, CHUNK) * image_size**2 * channels


def _room() -> int | None:
  """Free bytes of shared memory; None where it has no folder of its own."""
  try:
    about = os.statvfs(_SHARED)
  except OSError:
    return None
  return about.f_bavail * about.f_frsize


def _mib(size: int) -> str:
  return f"{size / 2**20:,.0f} MiB"
