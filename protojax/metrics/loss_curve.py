"""What the curve of a loss says by itself: other people's logs, and those of runs of protojax."""

import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from protojax import errors, files
from protojax.metrics import diagnosis, rules, wording

# Sizes that prototype layers have in published code; ln of one is recognised.
_SIZES = (
  *(2**n for n in range(7, 19)), 500, 1000, 1500, 3000, 5000, 10_000, 60_000, 98_304, 100_000,
)  # fmt: skip
_AT_CHANCE = 0.005  # nats; the logs have no entropy to confirm it with (rules.LIMITS)
_STUCK = 3  # records at the least that are a plateau; a fifth of all if there are more
_FLAT = 0.02  # nats between the largest and the least of a plateau
_GONE = 0.3  # nats: a loss that fell below it; a healthy one is 2.8 at epoch 50
_RISE = 0.1  # nats above the least so far
# Loss after each epoch of two published logs of DINO ViT-S/16, K = 65,536, batch 512 (dino#280 and
# dino#76).
_REFERENCE = {
  0: (7.29, 7.70), 1: (9.18, 9.56), 2: (7.32, 8.00), 3: (5.97, 6.88), 4: (5.30, 6.25),
  5: (4.92, 5.57), 6: (4.63, 5.03), 7: (4.39, 4.86), 8: (4.20, 4.64),
}  # fmt: skip
_NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)"
_TEXT = re.compile(rf"\b(?:train_)?loss\b[\s:=]*({_NUMBER})", re.IGNORECASE)
_UNITS = ("epoch", "step", "iteration", "global_step")
_LOSSES = ("train/loss", "train_loss", "total_loss", "loss")
# DINOv2 logs the same mean over 2 + 16 pairs of views in two parts.
_LOCAL, _GLOBAL, _PATCH = "dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss"


class Log(NamedTuple):
  """The losses of a file.

  Attributes:
    kind: whose file it looks like.
    unit: what is counted: "epoch", "step", "iteration" or "line".
    at: [n], ascending.
    loss: float64 [n], NaN where it was not finite.
    parts: {name: float64 [n]} of a loss that is logged in parts.
  """

  kind: str
  unit: str
  at: np.ndarray
  loss: np.ndarray
  parts: dict[str, np.ndarray]


def _number(value: Any) -> float:
  return float(value) if isinstance(value, int | float) else math.nan


def read(path: pathlib.Path) -> Log:
  """Reads the losses of a metrics.jsonl, DINO's log.txt, DINOv2's training_metrics.json or a text.

  Raises:
    UserError: if there is no loss in it.
  """
  records, others = files.json_lines(path)
  key = next((k for k in _LOSSES if any(k in r for r in records)), None)
  if key is not None:
    records = [r for r in records if key in r]
    unit = next((u for u in _UNITS if all(_finite(r.get(u)) for r in records)), "line")
    parts = [k for k in (_LOCAL, _GLOBAL, _PATCH) if all(k in r for r in records)]
    kind = {"train/loss": "protojax", "train_loss": "DINO", "total_loss": "DINOv2"}.get(key, "JSON")
    return Log(
      kind,
      unit,
      np.array([r.get(unit, i + 1) for i, r in enumerate(records)]),
      np.array([_number(r[key]) for r in records]),
      {k: np.array([_number(r[k]) for r in records]) for k in parts},
    )
  found = [match[1] for match in map(_TEXT.search, others) if match]
  if not found:
    raise errors.UserError(
      f'{path}: no loss in it: give metrics.jsonl, log.txt, or a text with lines like "loss: 7.91"'
    )
  losses = np.array([float(v) for v in found])
  return Log("text", "line", np.arange(1, len(losses) + 1), losses, {})


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def size_at(loss: float) -> int | None:
  """Recognises a loss at ln K of a usual number of prototypes: K, or None."""
  return next((k for k in _SIZES if abs(loss - math.log(k)) <= _AT_CHANCE), None)


def _tail(values: np.ndarray) -> np.ndarray:
  return values[-max(_STUCK, len(values) // 5) :]


def _plateau(values: np.ndarray) -> float | None:
  """The value at which the curve ends, if it ends flat."""
  tail = _tail(values)
  flat = len(tail) >= _STUCK and np.ptp(tail) <= _FLAT
  return float(np.median(tail)) if flat else None


def _shares(log: Log) -> str:
  """Of DINOv2, how its parts stand at uniform collapse."""
  if _LOCAL not in log.parts or _GLOBAL not in log.parts:
    return ""
  local, global_ = (float(np.median(_tail(log.parts[k]))) for k in (_LOCAL, _GLOBAL))
  return f" ({_LOCAL} {local:.3f} + {_GLOBAL} {global_:.3f}, at this point 16/18 and 2/18 of it)"


def _uniform(size: int, value: float, since: str, shares: str) -> str:
  return (
    f"uniform collapse: the loss is {value:.3f} = ln {size}{shares}{since}: every image gets all "
    f"{size:,} prototypes alike and nothing is learned. In this order, check that the teacher is a "
    "copy of the student and not the student itself (dinov2#407), that the optimizer moves the "
    "weights at all, that features and prototypes are normalised and the teacher's temperature is "
    "low (.04 to .07; .3 does this: dino#61), and that the batch is not far smaller than the "
    "recipe's (dinov2#298)"
  )


def words(log: Log) -> list[str]:
  """Says what the curve means and what to try: a few sentences, the verdict first."""
  unit, at, loss = log.unit, log.at, log.loss
  bad = np.flatnonzero(~np.isfinite(loss))
  if bad.size:
    return [
      f"non-finite: the loss is not a number at {unit} {at[bad[0]]:g} ({bad.size} of {len(loss)} "
      "records): train in float32 or bfloat16 instead of float16 (dino#58), lower the learning "
      "rate, clip gradients, and keep KoLeo away from batches of one image per device "
      "(dinov2#314); go on from a checkpoint before"
    ]
  ill, notes = [], []
  shares = _shares(log)
  # The two parts of DINOv2 together are what DINO calls the loss.
  cross = log.parts[_LOCAL] + log.parts[_GLOBAL] if shares else loss
  flat = _plateau(cross)
  size = None if flat is None else size_at(flat)
  if size is not None:
    off = np.flatnonzero(np.abs(cross - flat) > _FLAT)
    since = at[off[-1] + 1 if off.size else 0]
    ill.append(_uniform(size, flat, f" since {unit} {since:g}", shares))
  elif flat is not None and flat > _GONE:
    notes.append(
      f"it stays at {flat:.3f}, which is not ln K of a usual K (ln 4096 = 8.318, ln 65536 = "
      "11.090): not the uniform collapse; perhaps done, perhaps a learning rate near 0"
    )
  if _PATCH in log.parts and (patch := _plateau(log.parts[_PATCH])) is not None:
    if (patches := size_at(4 * patch)) is not None:
      ill.append(
        f"the patch loss is at chance: {_PATCH} {patch:.3f} = 1/4 ln {patches}, what uniform "
        "targets give where half of the crops are masked"
      )
  if len(cross) >= _STUCK and cross[-1] < _GONE < 1.0 < cross[0]:
    ill.append(
      f"one-hot collapse, most likely: the loss fell from {cross[0]:.2f} to {cross[-1]:.3f}, and "
      "that of a healthy run is still 2.8 after 50 epochs: all images get the same prototype with "
      "certainty (dino#272). See whether the centre is updated, by all devices, and raise the "
      "teacher's temperature"
    )
  late = 0
  rises = len(loss) > 1 and loss[1] - loss[0] > _RISE
  if unit == "epoch" and at[0] == 0 and rises and not ill:
    late = 1
    notes.append(
      f"the rise from epoch 0 to 1 ({loss[0]:.2f} to {loss[1]:.2f}) is normal where prototypes are "
      "frozen for the first epoch: every published log of DINO seen has it (7.29 to 9.18, dino#280)"
      + ("" if len(loss) > 4 else "; by epoch 4 the loss should be below that of epoch 0")
    )
  least = late + int(np.argmin(cross[late:]))
  if not ill and cross[-1] - cross[least] > _RISE:
    notes.append(
      f"it ends {cross[-1] - cross[least]:.2f} above its least, of {unit} {at[least]:g}: the loss "
      "rises with the entropy of its targets (teacher temperature warming up), which is harmless; "
      "if their entropy fell, lower the learning rate; a jump after a restart says that the centre "
      "was not saved (VISSL PR 436)"
    )
  well = (
    f"ok: the loss goes from {loss[0]:.2f} to {loss[-1]:.2f}, neither to ln K nor to 0; it does "
    "not say how good the features are: watch k-NN and the prototypes (dinov2#149)"
  )
  return [*(ill or [well]), *notes]


def reference(log: Log) -> list[str]:
  """Sets the first epochs beside two published runs, as lines; [] where they do not compare."""
  if log.kind != "DINO" or log.unit != "epoch":
    return []
  rows = [
    f"{epoch:5.0f}  {loss:10.2f}  {low:5.2f} to {high:5.2f}"
    for epoch, loss in zip(log.at, log.loss, strict=True)
    for low, high in [_REFERENCE.get(epoch, (None, None))]
    if low is not None
  ]
  return (
    ["epoch   this log  ViT-S/16, K 65,536, batch 512 (dino#280, dino#76)", *rows] if rows else []
  )


def diagnose(path: pathlib.Path) -> diagnosis.Diagnosis:
  """Says what the losses in a file mean; `read` tells which files.

  Raises:
    UserError: if there is no loss in it.
  """
  log = read(path)
  sentences = words(log)
  label, _, reason = sentences[0].partition(": ")
  lines = [
    f"log: {len(log.loss):,} losses ({log.kind}), {log.unit} {log.at[0]:g} to {log.at[-1]:g}: "
    f"first {log.loss[0]:.3f}, least {np.nanmin(log.loss):.3f}, last {log.loss[-1]:.3f}",
    *reference(log),
    *wording.bullets(sentences),
  ]
  result = {"kind": "log", "log": log.kind, "records": len(log.loss), "diagnosis": sentences}
  verdict = rules.Verdict(label, reason, label != "ok")
  return diagnosis.Diagnosis(verdict, {}, sentences, result, lines)
