"""Where the numbers of a run go: metrics.jsonl, TensorBoard events, train.log and the terminal.

Step n is "after n updates". Only process 0 writes. Every record is on its way to the disk when the
call returns, on the calling thread, so a full disk is an OSError here and not a stuck thread later.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping

import jax
from absl import logging

from protojax import files, progress
from protojax.training import wandb_run


def _until(path: pathlib.Path, step: int) -> None:
  """Drops the lines of a metrics.jsonl after `step`, and torn ones; whole or not at all."""
  records, torn = files.json_lines(path)
  numbered = [r for r in records if isinstance(r.get("step"), int)]
  if dropped := len(torn) + len(records) - len(numbered):
    logging.warning("%s: dropped %d unreadable line%s", path, dropped, "s" * (dropped > 1))
  kept = [json.dumps(r) + "\n" for r in numbered if r["step"] <= step]
  files.write(path, "".join(kept))


class Writer:
  """The outputs of a run; a context manager.

  On resuming, metrics.jsonl loses what an interrupted run wrote beyond the checkpoint, so that it
  ends up as an uninterrupted run would have written it; TensorBoard is told to forget the same.
  train.log keeps its history.

  Args:
    workdir: existing folder.
    total_steps: end of the run, for its progress.
    start_step: step of the restored state, 0 for a new run.
    stream: text stream of the terminal; None takes stderr.
    lead: whether this process writes; None asks whether it is process 0.
    online: makes, where this process writes, what gets every record too and is closed at the end;
      see `wandb_run.WandbRun`.

  Raises:
    OSError: here and in every method, if the disk is full or the folder not writable.
  """

  def __init__(
    self,
    workdir,
    *,
    total_steps: int,
    start_step: int = 0,
    stream=None,
    lead: bool | None = None,
    online: Callable[[], wandb_run.WandbRun] | None = None,
  ):
    self._lead = jax.process_index() == 0 if lead is None else lead
    self._stream = sys.stderr if stream is None else stream
    self._events, self._online = None, None
    self._progress = progress.Line(
      "step", total_steps, done=start_step, stream=stream, lead=self._lead
    )
    self._files = contextlib.ExitStack()
    if not self._lead:
      return
    workdir = pathlib.Path(workdir)
    metrics = workdir / "metrics.jsonl"
    resumed = start_step > 0 and metrics.exists()
    if resumed:
      _until(metrics, start_step)

    def opened(path, mode):
      return self._files.enter_context(open(path, mode, encoding="utf-8"))

    with contextlib.ExitStack() as undo:
      undo.callback(self._files.close)
      self._metrics = opened(metrics, "a" if resumed else "w")
      self._text = opened(workdir / "train.log", "a")
      self._open_events(workdir, start_step)
      if online is not None:
        self._online = online()
        self._files.callback(self._online.close)
      undo.pop_all()
    self._files.enter_context(self._progress)

  def _open_events(self, workdir: pathlib.Path, start_step: int) -> None:
    # tensorboardX is imported here: `import protojax` stays light.
    # Not SummaryWriter: its thread dies of a full disk and then blocks whoever flushes or closes.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    earlier = any(workdir.glob("events.out.tfevents.*"))
    # The suffix keeps two starts within one second apart.
    self._events = event_file_writer.EventsWriter(
      str(workdir / "events"), filename_suffix=f".{start_step}.{os.getpid()}"
    )
    self._files.callback(self._events.close)
    self._event, self._scalar = event_pb2.Event, summary.scalar
    if earlier:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._events.write_event(
        self._event(wall_time=time.time(), step=start_step + 1, session_log=start)
      )
    self._events.flush()

  def __enter__(self):
    return self

  def __exit__(self, kind, *unused):
    # A full disk fails again when its buffers are closed: the first error is the one to see.
    with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
      self.close()

  def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
    """Appends {"step": step, **metrics} as one line, and every finite number to TensorBoard.

    Args:
      step: updates done, int.
      metrics: {name: scalar (Python, NumPy or jax) or text}. NaN and infinities are written as
        null, their names under "non_finite": a line is always JSON.
    """
    if not self._lead:
      return
    values = {k: v if isinstance(v, str) else float(v) for k, v in metrics.items()}
    numbers = {k: v for k, v in values.items() if not isinstance(v, str)}
    bad = [k for k, v in numbers.items() if not math.isfinite(v)]
    record = {"step": int(step), **values, **dict.fromkeys(bad)}
    if bad:
      record["non_finite"] = bad
    self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
    self._metrics.flush()
    now, finite = time.time(), {k: v for k, v in numbers.items() if k not in bad}
    for name, value in finite.items():
      event = self._event(wall_time=now, step=int(step), summary=self._scalar(name, value))
      self._events.write_event(event)
    self._events.flush()
    if self._online is not None:
      self._online.write(int(step), finite)

  def line(self, text: str, *, shown: bool = True) -> None:
    """One line for people: to train.log with the time of day and, if `shown`, to the terminal.

    Args:
      text: may be folded for a terminal, further parts indented; a file and a pipe get it whole.
      shown: whether the terminal gets it.
    """
    if not self._lead:
      return
    whole = text.replace("\n", "")
    self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {whole}\n")
    self._text.flush()
    if shown:
      progress.write(text if self._stream.isatty() else whole, self._stream)

  def progress(self, step: int, *, rate: float | None = None, note: str | None = None) -> None:
    """Says how far the run is, see `progress.Line.to`; every step may.

    Args:
      step: updates done.
      rate: steps a second, for the time that is left.
      note: what else to show; both stay until they are given again.
    """
    self._progress.to(step, rate=rate, note=note)

  def flush(self) -> None:
    """Everything written so far is on the disk, also after a power cut."""
    if self._lead:
      for file in (self._metrics, self._text):
        file.flush()
        os.fsync(file.fileno())

  def close(self) -> None:
    """Closes all outputs; a second call does nothing."""
    self._files.close()
