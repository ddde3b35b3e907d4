"""What a plan comes to: the largest batch that fits, and what to change first."""

import math
import re
from typing import NamedTuple

from protojax.planning import chips, compiled, counting, prediction, targets

_MANY_BYTES = 0.25  # of all messages, in that of the M-step's sums
_HIGHEST = "f32 x f32, highest"


class Largest(NamedTuple):
  """The largest batch that fits.

  Attributes:
    batch_size: of all devices; 0 where not even one image a device fits.
    how: how that was found, in words.
  """

  batch_size: int
  how: str


def largest(
  step: compiled.Step, limit: float, other: compiled.Step | None = None
) -> Largest | None:
  """The largest batch whose step fits, a multiple of what the mesh splits it by.

  Of one step the temporary memory is taken in proportion to the batch, of two it is a line through
  both. None where no step was compiled.

  Args:
    step: with memory.
    limit: bytes of a device.
    other: the same step of another batch.
  """
  known = [one for one in (step, other) if one is not None and one.memory is not None]
  if not known:
    return None
  rows = math.prod(step.mesh.values())
  sizes = [one.config.batch_size for one in known]
  peaks = [one.memory.peak for one in known]
  if len(known) == 2 and peaks[0] != peaks[1]:
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    fixed = peaks[0] - slope * sizes[0]
    how = f"on a line through batches of {min(sizes):,} and {max(sizes):,}"
  else:
    slope = known[0].memory.temporary / sizes[0]
    fixed = peaks[0] - known[0].memory.temporary
    how = "with temporary memory in proportion to the batch; --fit compiles a second one"
  most = (limit - fixed) / max(slope, 1e-9)
  return Largest(max(int(most // rows * rows), 0), how)


def dearest(
  counts: counting.Counts, chip: chips.Chip | None, most: int = 6
) -> list[tuple[str, float, float, float]]:
  """[(where JAX made it, seconds, operations, bytes)] of what takes longest, blocks together.

  Args:
    counts: of a step.
    chip: None sorts by bytes, and seconds are 0.
    most: how many.
  """
  total: dict[str, list[float]] = {}
  for item in counts.items:
    entry = total.setdefault(place(item.op_name), [0.0, 0.0, 0.0])
    entry[0] += max(prediction.times(item, chip)) if chip else 0.0
    entry[1] += sum(item.flops.values())
    entry[2] += item.bytes
  ranked = sorted(total.items(), key=lambda pair: (pair[1][0], pair[1][2]), reverse=True)
  return [(name, *entry) for name, entry in ranked[:most]]


def place(op_name: str) -> str:
  """A readable name of where an operation was made, the same for every block; of several the first.

  >>> place("jit(train_step)/transpose(jvp(ViT))/blocks_3/mlp/fc1/dot_general")
  'backward: ViT/blocks/mlp/fc1/dot_general'
  >>> place("jit(train_step)/update/while/body/closed_call/reduce_max")
  'update: reduce_max'
  """
  where = counting.origin(op_name)
  if where in ("state", "other"):
    return where
  several = re.sub(r"^jit\(train_step\)/\(?", "", op_name)
  name = re.split("[:;]", several)[0]
  name = re.sub(r"\b(transpose|jvp|vmap|jit|checkpoint|rematted_computation)\(|\)", "", name)
  parts = [re.sub(r"_\d+$", "", part) for part in name.split("/")]
  dropped = ("", where, "while", "body", "closed_call", "checkpoint", "rematted_computation")
  return f"{where}: " + "/".join(part for part in parts if part not in dropped)


def first(
  step: compiled.Step,
  limit: float | None,
  predicted: prediction.Prediction | None,
  target: targets.Target,
) -> str:
  """What to change first, one sentence.

  Args:
    step: compiled.
    limit: bytes of a device, None where nobody knows.
    predicted: None where the chip is not known.
    target: what the step was compiled for.
  """
  config, mesh, chip = step.config, step.mesh, target.chip
  if step.memory is None or (limit and step.memory.peak > limit):
    return _to_fit(step)
  if predicted is None:
    return (
      "name a slice of TPUs by --topology, or run this where the GPUs are: that says what bounds it"
    )
  share = f"{100 * (1 - predicted.efficiency):.0f} % of the step"
  if predicted.bound == "network" or predicted.efficiency < 0.9:
    longest = max(
      step.counts.collectives,
      key=lambda one: one.times * prediction.seconds(one, chip, target.sides, len(target.devices)),
    )
    if 0 < longest.group <= mesh["model"] < len(target.devices):
      return f"messages take {share}, most within the groups of config.mesh.model: lower it"
    if side := _side(step, target):
      return (
        f"messages take {share}, many of their bytes the M-step's sums for all prototypes: split "
        f"these over groups of {side} chips, --mesh=data:{len(target.devices) // side},model:{side}"
      )
    return (
      f"messages take {share}, the longest of them the {longest.kind} of "
      f"{next(iter(longest.origins), 'other')}, and take as long for more images: raise "
      "config.batch_size, as far as the memory goes"
    )
  name, taken, *_ = dearest(step.counts, chip, 1)[0]
  most = f"most of it, {100 * taken / predicted.step:.0f} % of the step, in {name}"
  if predicted.bound == "memory":
    if config.precision == "float32":
      return f"memory bounds it, {most}: set config.precision=bfloat16"
    return f"memory bounds it, {most}: that is the operation to fuse or to make smaller"
  highest = step.counts.flops.get(_HIGHEST, 0.0) / chip.rate(_HIGHEST)
  if highest > 0.3 * predicted.matrix and config.method.precision == "highest":
    return (
      f"products bound it, and {100 * highest / predicted.matrix:.0f} % of their time is float32 "
      "at highest precision: set config.method.precision=high (docs/scale.md has its errors), or "
      "lower config.method.num_prototypes"
    )
  return f"products bound it, {most}: that is as it should be"


def _side(step: compiled.Step, target: targets.Target) -> int:
  """Over how many chips, a side of the slice, to split prototypes for smaller messages; else 0."""
  sums = [
    one.bytes
    for one in step.counts.collectives
    if any(origin.startswith("update") for origin in one.origins)
  ]
  whole = sum(one.times * one.bytes for one in step.counts.collectives)
  num = step.config.method.num_prototypes
  if not num or not sums or max(sums) < _MANY_BYTES * whole:
    return 0
  sides = (s for s in target.sides if step.mesh["model"] < s < len(target.devices))
  return max((s for s in sides if num % s == 0), default=0)


def _to_fit(step: compiled.Step) -> str:
  config = step.config
  state = sum(size for name, size in step.parts.items() if name != "batch")
  needed = step.refused[0] if step.refused else step.memory.peak
  says = "it does not fit"
  if step.parts["prototypes"] > 0.25 * needed:
    return f"{says}, and prototypes are most of it: split them by config.mesh.model"
  if state > 0.5 * needed:
    transformer = config.model.name.startswith("vit")
    how = "config.mesh.fsdp=True" if transformer else 'config.mesh.rules=((".*", "fsdp"),)'
    return f"{says}, and the state is most of it: split it, {how}"
  if config.model.name.startswith("vit") and not config.model.remat:
    return f"{says}: set config.model.remat=True, which computes the blocks twice"
  return f"{says}: raise config.accum_steps from {config.accum_steps}, or lower config.batch_size"
