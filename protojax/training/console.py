"""What a run says: metrics one step late, one verdict a line, a summary at the end."""

import collections
import contextlib
import functools
import json
import math
import pathlib
import textwrap
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from protojax import errors, files, progress
from protojax.data import pipeline, sources
from protojax.metrics import measures as table
from protojax.metrics import rules, verdicts
from protojax.training import metric_writer, opening, optim, wandb_run, workdir

_COLUMNS = 80
_RECENT, _JUMP = 100, 8.0  # losses that a new one is compared with; standard deviations


class RunLog:
  """Collects the metrics of the loop and writes them; a context manager.

  The scalars of step n are fetched after step n + 1 is under way, so the device never waits.

  Args:
    folder: workdir.
    config: resolved.
    start: first step of this process.
    describe: (row) -> name of a record, for corrupt images.

  Attributes:
    result: the latest value of every metric; of a run that goes on its floors, "floor/NAME".
  """

  def __init__(self, folder, config, *, start: int, describe):
    self._folder, self._config = pathlib.Path(folder), config
    self.result = floors(self._folder) if start else {}
    self._measured = None  # step of the latest collapse measures
    self._alarm = ""  # label of the verdict at the latest look
    self._pending = None
    self._sums, self._count = {}, 0  # since the last line
    self._since, self._timed, self._waited = None, 0, 0.0  # since the clock was last set
    self._trained = (0, 0.0)  # steps and seconds of this process, on lines that had a speed
    self._skipped = pipeline.SkippedLog(describe)
    self._not_finite = 0  # updates in a row
    self._recent = collections.deque(maxlen=_RECENT)  # losses
    self._rate = optim.learning_rate(
      config, num_steps=config.num_steps, batch_size=config.batch_size
    )
    online = None
    if config.wandb:
      online = functools.partial(
        wandb_run.WandbRun, config.wandb, self._folder, settings=config.to_dict()
      )
    self._writer = metric_writer.Writer(
      folder, total_steps=config.num_steps, start_step=start, online=online
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if isinstance(error, errors.UserError | errors.Interrupted):
      with contextlib.suppress(OSError):  # the program says it, too, and its disk may be full
        self._writer.line(str(error), shown=False)
    self._writer.__exit__(kind, error, traceback)

  def step(self, step: int, metrics: dict[str, jax.Array], *, skipped, waited: float) -> None:
    """Takes the metrics of update `step` and handles those of the one before.

    Raises:
      UserError: if the loss or the gradient of the update before is not finite, as of more of them
        in a row than `optim.skip_nonfinite`.
    """
    for name in self._skipped.update(skipped):
      pipeline.tell_unreadable(name)
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

  def copy(self, line: str) -> None:
    """Writes a line to train.log that the terminal has had already."""
    self._writer.line(line, shown=False)

  def resumed(self, step: int, devices: int | None) -> None:
    """Says where the run goes on, and again what accuracies are without training.

    Args:
      step: updates done.
      devices: on how many the checkpoint was made; None where it does not say.
    """
    here, other = jax.device_count(), ""
    if devices not in (None, here):
      other = f", saved on {devices} devices and now on {here}: equal to rounding, not to the bit"
    self._writer.line(f"resumed at step {step}{other}")
    if floors := _beside(self.result, "k-NN ", "knn"):
      self._floors(floors)

  def flush(self) -> None:
    """Handles the metrics that are still on the device."""
    if self._pending is None:
      return
    done, metrics = self._pending
    self._pending = None
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    left_out = metrics.pop("train/skipped", 0.0)
    finite = all(math.isfinite(metrics.get(f"train/{k}", 0.0)) for k in ("loss", "grad_norm"))
    if left_out or not finite:
      self._bad(done, metrics)
      return
    self._not_finite = 0
    self._watch(done, metrics["train/loss"])
    for key, value in metrics.items():
      self._sums[key] = self._sums.get(key, 0.0) + value
    self._count += 1
    self._timed += 1
    self._writer.progress(done)
    if done % self._config.log_every == 0 or done in (1, self._config.num_steps):
      self._line(done)

  def _bad(self, done: int, metrics: dict[str, float]) -> None:
    """Keeps what is known of an update that is not finite; ends the run where it may not go on."""
    self._writer.write(done, metrics)
    self._not_finite += 1
    loss, norm = metrics["train/loss"], metrics.get("train/grad_norm", math.nan)
    if jax.process_index() == 0:
      self._record_bad(done, loss, norm)
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    again = f"protojax replay --workdir={self._folder} --step={done} names the layer"
    allowed = self._config.optim.skip_nonfinite
    if self._not_finite > allowed:
      often = f", {self._not_finite} updates in a row" if allowed else ""
      raise errors.UserError(
        f"{what} after step {done}{often}: lower config.optim.lr or use config.precision=float32; "
        f"the last checkpoint is from before this step; {again}"
      )
    self._writer.line(
      f"step {done} left out: {what} ({self._not_finite} in a row, {allowed} allowed); {again}"
    )

  def _record_bad(self, done: int, loss: float, norm: float) -> None:
    config = self._config
    order = pipeline.shuffled(config.data.num_records, config.seed)
    start = (done - 1) * config.batch_size
    rows = [int(order[start + row]) for row in range(config.batch_size)]
    record = {"step": done, "loss": str(loss), "grad_norm": str(norm), "index": rows}
    with open(self._folder / workdir.BAD_STEPS, "a", encoding="utf-8") as file:
      file.write(json.dumps(record) + "\n")

  def _watch(self, done: int, loss: float) -> None:
    """Says when a loss is far above those before it."""
    if len(self._recent) == _RECENT:
      mean, deviation = np.mean(self._recent), np.std(self._recent)
      if loss > mean + max(_JUMP * deviation, 0.05 * abs(mean)):
        self._writer.line(
          f"step {done}: the loss jumped to {loss:.3f}; the {_RECENT} before it: {mean:.3f} "
          f"+- {deviation:.3f}"
        )
        self._recent.clear()
    self._recent.append(loss)

  def _line(self, done: int) -> None:
    means = {k: v / self._count for k, v in self._sums.items()}
    with jax.transfer_guard("allow"):  # the step's number
      means["train/learning_rate"] = float(self._rate(done - 1))
    if done == 1:  # of the net before its first update
      means["floor/loss_start"] = means.get("train/cross_entropy", means["train/loss"])
    now = time.perf_counter()
    if self._timed > 1 and self._since is not None:
      seconds = now - self._since
      means["time/img_per_s"] = self._timed * self._config.batch_size / seconds
      means["time/data_wait"] = min(1.0, self._longest_wait() / seconds)
      self._trained = self._trained[0] + self._timed, self._trained[1] + seconds
    if self._skipped.count:
      means["data/skipped"] = self._skipped.count
    self.result |= means
    self._writer.write(done, means)
    if "time/img_per_s" in means:
      note = f"img/s {means['time/img_per_s']:.0f}  wait {means['time/data_wait']:.0%}"
      self._writer.progress(done, rate=self._pace, note=note)
    looked_at = done == self._config.num_steps or not all(
      done % every for every in (self._config.monitor.every, self._config.eval_every)
    )
    # A look at the same step has the verdict in its own line.
    self._say(done, means, None if looked_at else self.verdict(done))
    self._sums, self._count = {}, 0
    self._since, self._timed, self._waited = time.perf_counter(), 0, 0.0

  def _longest_wait(self) -> float:
    """Seconds that the process which waited most has waited for images: the others wait for it."""
    if jax.process_count() == 1:
      return self._waited
    with jax.transfer_guard("allow"):
      return float(multihost_utils.process_allgather(np.asarray(self._waited)).max())

  @property
  def _pace(self) -> float | None:
    """Steps a second so far: the time left must not jump with every line of a busy machine."""
    steps, seconds = self._trained
    return steps / seconds if seconds else None

  def floors(self, values: dict[str, float]) -> None:
    """Takes accuracies without training, see `evaluation.Snapshot.floors`; before the first step.

    They are part of `result` and written at step 0, where a run that goes on finds them.
    """
    if not values:
      return
    self.result |= values
    self._writer.write(0, values)
    self._floors(_beside(values, "k-NN ", "knn"))

  def _floors(self, beside: str) -> None:
    """Says the floors, and of how many images they are."""
    bank, test = (self.result.get(f"floor/{of}_images") for of in ("bank", "test"))
    if bank is not None and test is not None:
      beside += f"; bank {bank:,.0f}, test {test:,.0f}"
    self._paragraph(f"{'floors':<{opening.INDENT}}", beside)

  def measures(self, done: int, values: dict[str, float]) -> None:
    """Writes collapse measures and accuracies of the state after `done` updates, and says them."""
    self.result |= values
    self._measured = done
    self._writer.write(done, values)
    verdict = self.verdict(done)
    self._say(done, values, verdict)
    news = verdicts.is_alarm(verdict) and verdict.label != self._alarm
    if news and done < self._config.num_steps:  # the end has its summary
      self._paragraph("  ", f"{verdict.label}: {verdict.sentence}")
    self._alarm = verdict.label
    self._since, self._timed, self._waited = None, 0, 0.0  # evaluating is not training

  def verdict(self, done: int) -> rules.Verdict:
    """The verdict on the latest measures, as of the step they are of: early ones do not age."""
    step = done if self._measured is None else self._measured
    return verdicts.of_run(self.result, config=self._config, step=step)

  def _say(self, done: int, values: dict[str, float], verdict: rules.Verdict | None) -> None:
    pace = self._pace if "time/img_per_s" in values else None
    self._writer.line(log_line(done, values, verdict, config=self._config, pace=pace))

  def _paragraph(self, head: str, text: str) -> None:
    for line in textwrap.wrap(
      text,
      _COLUMNS,
      initial_indent=head,
      subsequent_indent=" " * len(head),
      break_long_words=False,  # a path is copied
      break_on_hyphens=False,
    ):
      self._writer.line(line)

  def _on_floors(self, name: str) -> None:
    """Says an accuracy on the images that the floors beside it are of, where these are fewer."""
    bank, test = (self.result.get(f"floor/{of}_images") for of in ("bank", "test"))
    value = self.result.get(name)
    if value is not None and bank is not None and test is not None:
      images = f"{bank:.0f} bank and {test:.0f} test images"
      self._paragraph("          ", f"of the {images} of the floors: {value:.1%}")

  def summary(self, result: dict[str, float], *, bank: sources.Source) -> None:
    """The last words: verdict, accuracies and floors, where the report lies or how to write it.

    Args:
      result: the measures of the final state.
      bank: what k-NN searched.
    """
    self.result |= result
    verdict = self.verdict(int(result["step"]))
    self._paragraph("verdict   ", f"{verdict.label}: {verdict.sentence}")
    if "probe/knn" in result:
      probe, size = self._config.probe, workdir.bank_size(self._config, bank)
      beside = _beside(self.result, "", "knn")
      self._paragraph(
        "k-NN      ",
        f"{result['probe/knn']:.1%}"
        + (f" ({beside})" if beside else "")
        + f"; k={probe.k}, T={probe.temperature}, cosine, "
        + (f"bank {size}, " if " of " in size else "")
        + f"{probe.train_split} -> {probe.test_split}",
      )
      self._on_floors("floor/knn")
    if "probe/linear_fitted" in result:
      beside = _beside(self.result, "", "linear")
      self._paragraph(
        "linear    ",
        f"{result['probe/linear_fitted']:.1%}"
        + (f" ({beside})" if beside else "")
        + "; fitted on frozen features",
      )
      self._on_floors("floor/linear")
    lacking = [
      f"{n:,.0f} of the {of} images"
      for of in ("bank", "test")
      if (n := result.get(f"data/unreadable_{of}"))
    ]
    if lacking:
      self._paragraph("left out  ", f"{' and '.join(lacking)}, which cannot be read")
    page = self._folder / workdir.REPORT
    again = f"protojax report --workdir={self._folder}"
    self._writer.line(f"report    {page if page.exists() else again}")  # a path is copied: no fold


def floors(folder: pathlib.Path) -> dict[str, float]:
  """What the first steps of a run wrote about its floors; {} of a run that knew none."""
  path, found = folder / "metrics.jsonl", {}
  for line in files.json_lines(path)[0] if path.exists() else ():
    if line.get("step") in (0, 1):
      found |= {k: v for k, v in line.items() if k.startswith("floor/") and v is not None}
  return found


def _beside(values: Mapping[str, float], head: str, kind: str) -> str:
  """ "raw pixels 97.7%, untrained 43.4%", what is known of it."""
  names = {"pixels": "raw pixels", "untrained": "untrained", "start": "at the start"}
  known = {word: values.get(f"floor/{kind}_{name}") for name, word in names.items()}
  return ", ".join(f"{head}{word} {v:.1%}" for word, v in known.items() if v is not None)


def log_line(
  step: int,
  measures: Mapping[str, float | None],
  verdict: rules.Verdict | None = None,
  *,
  config,
  pace: float | None = None,
) -> str:
  """The line of a step, of what was measured at this step; folded at 80 columns.

  step 1200/5000  eta 3:12  loss 7.91 (ln K 8.32)  H 6.10  img/s 1630  wait 1%
  step 1200/5000  unique.25 100%  used 61%  rank 143  knn 71.2%  [ok]

  The first is of training, the second of a look at the state. H is the entropy of the targets in
  nats; CE is the cross entropy, where the loss has more terms; the measures of collapse are those
  with a short name in `metrics.measures.MEASURES`.

  Args:
    step: updates done.
    measures: values of this step, by their names in metrics.jsonl.
    verdict: from `verdicts.of_run`; None leaves it out.
    config: resolved; reads num_steps.
    pace: steps a second, for the time that is left; None leaves it out.
  """
  speed, chance = measures.get("time/img_per_s"), measures.get("train/ln_k")
  cross_entropy = measures.get("train/cross_entropy")
  at_chance = "loss" if cross_entropy is None else "CE"  # what would be ln K
  size = config.method.get("partition_size")  # CARP's K is that of a block
  of = f"ln of a block's {size}:" if size else "ln K"
  eta = (config.num_steps - step) / pace if pace else None
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
      parts.append(f"{name} {value:{form}}" + (f" ({of} {chance:.2f})" if known else ""))
  if verdict is not None:  # beside a number, where a line is folded
    parts[-1] += f"  [{verdict.label}]"
  lines = [parts[0]]
  for part in parts[1:]:
    if len(lines[-1]) + 2 + len(part) <= _COLUMNS:
      lines[-1] += f"  {part}"
    else:
      lines.append(f"  {part}")
  return "\n".join(lines)
