"""What a run says: metrics one step late, one verdict a line, a summary at the end."""

import math
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
from absl import logging

from protojax import errors, progress
from protojax.data import pipeline, sources
from protojax.metrics import measures as table
from protojax.metrics import verdicts
from protojax.training import metric_writer, workdir


class RunLog:
  """Collects the metrics of the loop and writes them; a context manager.

  The scalars of step n are fetched after step n + 1 is under way, so the device never waits.

  Args:
    folder: workdir.
    config: resolved.
    start: first step of this process.
    describe: (row) -> name of a record, for corrupt images.

  Attributes:
    result: the latest value of every metric.
  """

  def __init__(self, folder, config, *, start: int, describe):
    self.result = {}
    self._folder, self._config = pathlib.Path(folder), config
    self._measured = None  # step of the latest collapse measures
    self._pending = None
    self._sums, self._count = {}, 0  # since the last line
    self._since, self._timed, self._waited = None, 0, 0.0  # since the clock was last set
    self._skipped = pipeline.SkippedLog(describe)
    self._writer = metric_writer.Writer(folder, total_steps=config.num_steps, start_step=start)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._writer.__exit__(*error)

  def step(self, step: int, metrics: dict[str, jax.Array], *, skipped, waited: float) -> None:
    """Takes the metrics of update `step` and handles those of the one before.

    Raises:
      UserError: if the loss of the update before is not finite.
    """
    for name in self._skipped.update(skipped):
      logging.warning("skipped corrupt image %s (%d so far)", name, self._skipped.count)
    self._waited += waited
    self.flush()
    self._pending = (step + 1, metrics)
    if self._since is None:  # the first step waits for the compiler, not for the machine
      self._since, self._timed, self._waited = time.perf_counter(), 0, 0.0

  def sync(self) -> None:
    """`flush`, and everything written so far is on the disk."""
    self.flush()
    self._writer.flush()

  def lines(self, lines: Sequence[str]) -> None:
    """Says lines for people."""
    for line in lines:
      self._writer.line(line)

  def flush(self) -> None:
    """Handles the metrics that are still on the device."""
    if self._pending is None:
      return
    done, metrics = self._pending
    self._pending = None
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if not math.isfinite(metrics["train/loss"]):
      self._writer.write(done, metrics)
      raise errors.UserError(
        f"the loss is {metrics['train/loss']} after step {done}: lower config.optim.lr or use "
        "config.precision=float32; the last checkpoint is from before this step"
      )
    for key, value in metrics.items():
      self._sums[key] = self._sums.get(key, 0.0) + value
    self._count += 1
    self._timed += 1
    self._writer.progress(done)
    if done % self._config.log_every == 0 or done in (1, self._config.num_steps):
      self._line(done)

  def _line(self, done: int) -> None:
    means = {k: v / self._count for k, v in self._sums.items()}
    now = time.perf_counter()
    if self._timed > 1 and self._since is not None:
      seconds = now - self._since
      means["time/img_per_s"] = self._timed * self._config.batch_size / seconds
      means["time/data_wait"] = min(1.0, self._waited / seconds)
    if self._skipped.count:
      means["data/skipped"] = self._skipped.count
    self.result |= means
    self._writer.write(done, means)
    if "time/img_per_s" in means:
      speed, wait = means["time/img_per_s"], means["time/data_wait"]
      note = f"img/s {speed:.0f}  wait {wait:.0%}"
      self._writer.progress(done, rate=speed / self._config.batch_size, note=note)
    self._say(done)
    self._sums, self._count = {}, 0
    self._since, self._timed, self._waited = time.perf_counter(), 0, 0.0

  def measures(self, done: int, values: dict[str, float]) -> None:
    """Writes collapse measures and accuracies of the state after `done` updates, and says them."""
    self.result |= values
    self._measured = done
    self._writer.write(done, values)
    self._say(done, full=True)
    self._since, self._timed, self._waited = None, 0, 0.0  # evaluating is not training

  def verdict(self, done: int) -> verdicts.Verdict:
    """The verdict on the latest measures, as of the step they are of: early ones do not age."""
    step = done if self._measured is None else self._measured
    return verdicts.of_run(self.result, config=self._config, step=step)

  def _say(self, done: int, full: bool = False) -> None:
    verdict = self.verdict(done)
    self._writer.line(log_line(done, self.result, verdict, config=self._config))
    if full and verdict.label != "ok":
      self._writer.line(f"  {verdict.label}: {verdict.sentence}")

  def summary(self, result: dict[str, float], *, bank: sources.Source) -> None:
    """The last words: verdict, accuracies, where the report lies or how to have it written.

    Args:
      result: the measures of the final state.
      bank: what k-NN searched.
    """
    self.result |= result
    verdict = self.verdict(int(result["step"]))
    lines = [f"verdict   {verdict.label}: {verdict.sentence}"]
    if "probe/knn" in result:
      probe, size = self._config.probe, workdir.bank_size(self._config, bank)
      lines.append(
        f"k-NN      {result['probe/knn']:.1%} (k={probe.k}, T={probe.temperature}, cosine, "
        + (f"bank {size}, " if " of " in size else "")
        + f"{probe.train_split} -> {probe.test_split})"
      )
    if "probe/linear_fitted" in result:
      lines.append(f"linear    {result['probe/linear_fitted']:.1%} (fitted on frozen features)")
    page = self._folder / workdir.REPORT
    again = f"python -m protojax.report --workdir={self._folder}"
    lines.append(f"report    {page if page.exists() else again}")
    for line in lines:
      self._writer.line(line)


def log_line(
  step: int, measures: Mapping[str, float | None], verdict: verdicts.Verdict, *, config
) -> str:
  """The line of a step; what was not measured is left out.

  step 1200/5000  eta 3:12  loss 7.91 (ln K 8.32)  H 6.10  unique 100%  used 61%  rank 143
  knn 71.2%  img/s 1630  wait 1%  [ok]

  H is the entropy of the targets in nats; CE is the cross entropy, where the loss has more terms;
  the measures of collapse are those with a short name in `metrics.measures.MEASURES`.

  Args:
    step: updates done.
    measures: the latest value of every metric, by its name in metrics.jsonl.
    verdict: from `verdicts.of_run`.
    config: resolved; reads num_steps and batch_size.
  """
  speed, chance = measures.get("time/img_per_s"), measures.get("train/ln_k")
  cross_entropy = measures.get("train/cross_entropy")
  at_chance = "loss" if cross_entropy is None else "CE"  # what would be ln K
  eta = (config.num_steps - step) * config.batch_size / speed if speed else None
  parts = [f"step {step}/{config.num_steps}"]
  for name, value, form in (
    ("eta", None if eta is None else progress.clock(eta), ""),
    ("loss", measures.get("train/loss"), ".2f"),
    ("CE", cross_entropy, ".2f"),
    ("H", measures.get("train/target_entropy"), ".2f"),
    *((row.short, row.value(measures), row.form) for row in table.MEASURES if row.short),
    ("knn", measures.get("probe/knn"), ".1%"),
    ("img/s", speed, ".0f"),
    ("wait", measures.get("time/data_wait"), ".0%"),
  ):
    if value is not None:
      known = name == at_chance and chance is not None
      parts.append(f"{name} {value:{form}}" + (f" (ln K {chance:.2f})" if known else ""))
  return "  ".join([*parts, f"[{verdict.label}]"])
