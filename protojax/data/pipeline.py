"""Host batches as a pure function of (seed, step, global batch size).

The global stream of rows is indexed first: position p = step * B + r holds row r of batch `step`,
and process h of H owns the contiguous rows r in [h B / H, (h + 1) B / H) and decodes no others. So
batches are equal for any number of worker processes and hosts, and a run resumes by its step alone.
"""

import atexit
import contextlib
import functools
import gc
import math
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags, logging
from grain import experimental

from protojax import errors
from protojax.data import decoding, sources

_TRIES = 100


def batches(
  source: sources.Source,
  *,
  seed: int,
  step: int,
  batch_size: int,
  image_size: int,
  num_workers: int | None = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Endless shuffled batches from `step` on, the part of one process.

  Every epoch has an order of its own and covers each row once; a batch may end one epoch and begin
  the next. A corrupt record is replaced by the next readable row of the source.

  Args:
    source: from `sources.build`.
    seed: any integer; different seeds give unrelated orders.
    step: number of the first batch.
    batch_size: B, global.
    image_size: S; every image lies at the top left of a square of S x S, see `decoding.store`.
    num_workers: processes that decode; 0 uses threads of this one; None chooses, see
      `decoding.plan`.
    process_index: h.
    process_count: H; must divide B.

  Returns:
    A generator (`close()` stops threads and processes) of {"image": uint8 [b, S, S, C], "index":
    int32 [b], row in the source, "size": int32 [b, 2], height and width of the
    original, "label": int32 [b], -1 where there is none,
    "skipped": int32 [b], the corrupt row that was replaced, or -1}, b = B / H, C the source's
    channels. Reading on raises UserError if 100 records in a row are corrupt.

  Raises:
    UserError: if image_size or num_workers is out of range.
  """
  _check(image_size, num_workers)
  order = shuffled(len(source), seed)
  chunks = _Chunks(source, order, image_size, batch_size, process_index, process_count)
  return _stream(chunks, step, _workers(chunks, source, num_workers, None))


def shuffled(num_records: int, seed: int) -> grain.MapDataset:
  """The endless order of rows that `batches` walks through: `[p]` is the row at position p.

  Args:
    num_records: N of the source.
    seed: as in `batches`.
  """
  return grain.MapDataset.range(num_records).shuffle(seed=_shuffle_seed(seed)).repeat()


def shuffled_rows(num_records: int, seed: int, start: int, count: int) -> np.ndarray:
  """`shuffled(num_records, seed)[p]` of the positions from `start` on, several times as fast.

  Returns:
    int32 [count].
  """
  first = _shuffle_seed(seed)
  rows = np.empty(count, np.int32)
  for i in range(count):
    epoch, place = divmod(start + i, num_records)
    epoch_seed = (first + epoch) % 2**32  # as `grain.MapDataset.shuffle` has it
    rows[i] = experimental.index_shuffle(
      place, max_index=num_records - 1, seed=epoch_seed, rounds=4
    )
  return rows


def _shuffle_seed(seed: int) -> int:
  # Nearby seeds must not share epochs: grain shuffles epoch e with seed + e.
  return int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])


def sequential(
  source: sources.Source,
  *,
  batch_size: int,
  image_size: int,
  limit: int | None = None,
  num_workers: int | None = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """One pass in the order of the source, for evaluation; the part of one process.

  Args:
    source: from `sources.build`.
    batch_size: B, global.
    image_size: S, as in `batches`.
    limit: at most so many rows, evenly spread over the source; None takes all.
    num_workers: as in `batches`.
    process_index: h.
    process_count: H; must divide B.

  Returns:
    As `batches`, and "mask": bool [b], True where the row counts: False in the padding that fills
    the last batch (index and label -1) and where a corrupt record has been replaced.

  Raises:
    UserError: as `batches`.
  """
  rows = spread(len(source), limit)
  return ordered(
    source,
    rows,
    batch_size=batch_size,
    image_size=image_size,
    num_workers=num_workers,
    process_index=process_index,
    process_count=process_count,
  )


def spread(num_records: int, limit: int | None) -> np.ndarray:
  """int [n]: all rows of a source of `num_records`, or `limit` that are evenly spread over it."""
  if limit is None or limit >= num_records:
    return np.arange(num_records)
  return np.arange(limit) * num_records // limit


def ordered(
  source: sources.Source,
  rows: np.ndarray,
  *,
  batch_size: int,
  image_size: int,
  num_workers: int | None = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """One pass over `rows`, int [n], of the source, in that order; everything else is `sequential`'s.

  A row of -1 is padding.
  """
  _check(image_size, num_workers)
  order = np.pad(rows, (0, -len(rows) % batch_size), constant_values=-1)
  chunks = _Chunks(source, order, image_size, batch_size, process_index, process_count)
  return _masked(_stream(chunks, 0, _workers(chunks, source, num_workers, len(rows))))


@functools.cache
def tell_unreadable(name: str) -> None:
  """Warns of an image that cannot be read, once: training, looks and report meet the same ones."""
  logging.warning("%s cannot be read and is left out", name)


class SkippedLog:
  """Counts and names the corrupt records that were replaced in the batches it is shown.

  Attributes:
    count: corrupt records so far, each once, however often it was drawn.

  Args:
    describe: name of a row, `Source.describe`.
  """

  def __init__(self, describe: Callable[[int], str]):
    self._describe = describe
    self._named: set[int] = set()

  @property
  def count(self) -> int:
    return len(self._named)

  def update(self, skipped: np.ndarray) -> list[str]:
    """Takes "skipped" [b] of a batch; returns the names of rows that it did not name before."""
    rows = [int(row) for row in skipped if row >= 0]
    new = [row for row in dict.fromkeys(rows) if row not in self._named]
    self._named.update(new)
    return [self._describe(row) for row in new]


class _Chunks:
  """Random access to the batches of one process, in pieces of at most `decoding.CHUNK` rows."""

  def __init__(self, source, order, image_size, batch_size, process_index, process_count):
    if batch_size % process_count:
      raise ValueError(f"{process_count} processes do not divide a batch of {batch_size}")
    self._source, self._order, self.image_size = source, order, image_size
    self.batch_size, self.local = batch_size, batch_size // process_count
    self._first = process_index * self.local
    self.per_batch = math.ceil(self.local / decoding.CHUNK)

  def __len__(self):
    return len(self._order) // self.batch_size * self.per_batch

  def __getitem__(self, index):
    step, piece = divmod(int(index), self.per_batch)
    begin, end = piece * decoding.CHUNK, min((piece + 1) * decoding.CHUNK, self.local)
    start = step * self.batch_size + self._first
    rows = [int(self._order[start + r]) for r in range(begin, end)]
    real = self._source.read([row for row in rows if row >= 0])
    records = [self._prepare(row, next(real) if row >= 0 else None) for row in rows]
    return {key: np.stack([record[key] for record in records]) for key in records[0]}

  def _prepare(self, row: int, record) -> dict[str, np.ndarray]:
    if record is None:  # padding; a size of 0 would divide by zero later
      image = np.zeros((self.image_size, self.image_size, self._source.channels), np.uint8)
      return _record(image, row, image.shape[:2], -1, -1)
    readable, record = self._readable(row, record)
    image = record["image"]
    skipped = -1 if readable == row else row
    stored = decoding.store(image, record["size"], self.image_size)
    return _record(stored, readable, record["size"], record["label"], skipped)

  def _readable(self, row: int, record) -> tuple[int, dict]:
    """The first of row, row + 1, ... that is not corrupt, and its record."""
    tries = min(_TRIES, len(self._source))
    for offset in range(tries):
      candidate = (row + offset) % len(self._source)
      record = next(self._source.read([candidate])) if offset else record
      if not isinstance(record, sources.CorruptImage):
        return candidate, record
    raise errors.UserError(
      f"{tries} images in a row of {self._source.name} cannot be read, lastly {record}: check the "
      "files"
    )


def _record(image, row, shape, label, skipped) -> dict[str, np.ndarray]:
  numbers = {"index": row, "size": shape, "label": label, "skipped": skipped}
  return {"image": image} | {key: np.array(value, np.int32) for key, value in numbers.items()}


_open = weakref.WeakSet()  # streams of worker processes


def _workers(chunks: _Chunks, source, num_workers: int | None, images: int | None) -> int:
  options = {"image_size": chunks.image_size, "batch_size": chunks.local}
  if num_workers is not None:
    return decoding.fit(num_workers, asked=True, channels=source.channels, **options)
  part = chunks.local / chunks.batch_size
  return decoding.plan(source, images=images and round(images * part), **options).workers


def _stream(chunks: _Chunks, step: int, num_workers: int) -> Iterator[dict[str, np.ndarray]]:
  """Whole batches from pieces that threads or processes load ahead."""
  stream = _pieced(chunks, step, num_workers)
  if num_workers:
    _open.add(stream)
  return stream


@atexit.register
def _close_all() -> None:
  """Closes what nobody has closed, as after Ctrl-C, while Python can still free shared memory."""
  for stream in list(_open):
    with contextlib.suppress(ValueError):  # a thread reads from it
      stream.close()


def _free_shared_memory() -> None:
  """Frees what grain would leave to the end of the program, which Python reports as leaked.

  The last piece of every worker hangs in a cycle with the worker's StopIteration, and all others
  are freed by a thread that may not come to the last ones.
  """
  gc.collect()
  pool = getattr(grain.multiprocessing.SharedMemoryArray, "_del_thread_pool", None)
  if pool is not None:
    with contextlib.suppress(ValueError):  # it has ended
      pool.apply(int)


def _pieced(chunks: _Chunks, step: int, num_workers: int) -> Iterator[dict[str, np.ndarray]]:
  data = grain.MapDataset.source(chunks)[step * chunks.per_batch :]
  if num_workers:
    _let_grain_read_its_flags()
    buffer = decoding.ahead(chunks.per_batch, num_workers)
    options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=buffer)
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    data = data.mp_prefetch(options, worker_init_fn=_start_worker)
  else:
    threads = min(os.cpu_count() or 1, 8)
    buffer = max(2 * chunks.per_batch, threads)
    data = data.to_iter_dataset(grain.ReadOptions(threads, buffer))
  # Put together by a thread, one batch ahead, so that whoever trains does not wait for the copying.
  data = data.batch(chunks.per_batch, batch_fn=_joined)
  iterator = iter(grain.experimental.ThreadPrefetchIterDataset(data, prefetch_buffer_size=1))
  try:
    yield from iterator
  except RuntimeError as error:
    raise _of_worker(error) from None
  except errors.UserError as error:  # some versions of grain put the worker's traceback before it
    line = str(error).strip().splitlines()[-1]
    raise errors.UserError(line.removeprefix("protojax.errors.UserError: ")) from None
  finally:
    iterator.close()
    iterator = None
    if num_workers:
      _free_shared_memory()


def _joined(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """A batch from its pieces; copied in any case: those of a worker lie in memory grain takes back.

  NumPy copies without holding the interpreter.
  """
  return {key: np.concatenate([np.asarray(p[key]) for p in pieces]) for key in pieces[0]}


def _of_worker(error: RuntimeError) -> Exception:
  """What grain says when a process of its is gone, as what to do about it; else `error` itself."""
  code = re.search(r"Worker process .* exit code (-?\d+)", str(error))
  if not code:
    return error
  reason = {
    -signal.SIGTERM: "told to stop, as the whole job was: the same command goes on",
    -signal.SIGBUS: "no shared memory was left for its images: give more, in Docker --shm-size=8g "
    "or --ipc=host, or set config.data.num_workers=0",
    -signal.SIGKILL: "killed, perhaps for want of memory: lower config.data.num_workers",
  }.get(int(code[1]), f"exit code {code[1]}: config.data.num_workers=0 decodes in this process")
  return errors.UserError(f"a process that decodes images has died ({reason})")


def _masked(stream: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
  try:
    for batch in stream:
      yield batch | {"mask": (batch["index"] >= 0) & (batch["skipped"] < 0)}
  finally:
    stream.close()


def _start_worker(index: int, count: int) -> None:
  """Ctrl-C and a hang-up reach the whole group, Slurm's SIGTERM the whole job.

  The main process needs data to stop in order. With it this one ends, too.
  """
  del index, count
  for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(1.0)
  os._exit(0)


def _let_grain_read_its_flags() -> None:
  """grain reads absl flags when it starts workers; a program without absl never parses them.

  Its own flags count as given, with their defaults; all others keep complaining, and a later
  parse works as ever.
  """
  if not flags.FLAGS.is_parsed():
    for name in flags.FLAGS:
      if name.startswith("grain_"):
        flags.FLAGS[name].present = max(1, flags.FLAGS[name].present)


def _check(image_size: int, num_workers: int | None) -> None:
  if image_size < 1:
    raise errors.UserError(f"data.image_size={image_size} must be at least 1 pixel")
  if num_workers is not None and num_workers < 0:
    raise errors.UserError(
      f"data.num_workers={num_workers} must not be negative (0: threads; left out: chosen)"
    )
