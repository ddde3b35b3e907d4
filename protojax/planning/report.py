"""A plan as lines to read and as JSON."""

import math
from typing import Any, NamedTuple

from protojax.planning import advice, chips, compiled, counting, prediction, targets

_GIB, _MIB = 2**30, 2**20
# What most of the step is spent on; see `prediction.Prediction.bound`.
_BOUNDS = {
  "matrix": "most of the step in operations whose products take longer than their bytes",
  "memory": "most of the step in operations whose bytes take longer than their products",
  "network": "most of the step in messages that nothing runs beside",
}


class Plan(NamedTuple):
  """All that is known of a step on some devices.

  Attributes:
    name: of the recipe.
    target: devices.
    num_images, num_classes: of the images that training would see.
    step: compiled.
    limit: bytes that a program gets on a device; None where nobody knows.
    predicted: None without a chip, or where the step does not fit.
    largest: None where no step was compiled.
    first: what to change first.
  """

  name: str
  target: targets.Target
  num_images: int
  num_classes: int
  step: compiled.Step
  limit: float | None
  predicted: prediction.Prediction | None
  largest: advice.Largest | None
  first: str


def make(
  name: str,
  target: targets.Target,
  num_images: int,
  num_classes: int,
  step: compiled.Step,
  other: compiled.Step | None = None,
) -> Plan:
  """The plan of a compiled step.

  Args:
    name: of the recipe.
    target: what it was compiled for.
    num_images, num_classes: of the data set.
    step: compiled.
    other: the same step of another batch, for the largest that fits.
  """
  chip = target.chip
  limit = step.refused[1] if step.refused else _limit(target)
  predicted = None
  if chip is not None and step.counts is not None:
    size = step.config.batch_size
    predicted = prediction.predict(step.counts, chip, target.sides, len(target.devices), size)
  largest = advice.largest(step, limit, other) if limit else None
  first = advice.first(step, limit, predicted, target)
  return Plan(name, target, num_images, num_classes, step, limit, predicted, largest, first)


def _limit(target: targets.Target) -> float | None:
  """Bytes of a device: as it says itself, or as the table does."""
  stats = (target.devices[0].memory_stats() or {}) if target.here else {}
  return stats.get("bytes_limit") or (target.chip.memory if target.chip else None)


def lines(plan: Plan) -> list[str]:
  """A plan to read, lines of at most 100 columns where names allow."""
  step, target, count = plan.step, plan.target, len(plan.target.devices)
  size = step.config.batch_size
  mesh = " x ".join(f"{axis} {n}" for axis, n in step.mesh.items())
  out = [
    f"{plan.name} on {target.name}: {count} devices, mesh {mesh}, batch {size:,}, "
    f"{size / count:.3g} images a device; compiled in {step.seconds:.0f} s",
    "",
    *_memory(plan),
  ]
  if step.counts is not None:
    out += ["", *_work(step.counts, target.chip), "", *_messages(plan)]
  if plan.predicted is not None:
    out += ["", *_predicted(plan)]
  out += ["", f"change first  {plan.first}"]
  out += ["", f"assumed       {plan.num_images:,} images of {plan.num_classes:,} classes"]
  if plan.predicted is not None:
    out += [f"              {line}" for line in (_of_chip(target.chip), *prediction.ASSUMPTIONS)]
  return out


def _memory(plan: Plan) -> list[str]:
  step = plan.step
  needed = step.refused[0] if step.refused else step.memory.peak
  name, unit = ("GiB", _GIB) if needed >= _GIB else ("MiB", _MIB)
  there = "" if plan.limit is None else f" of {plan.limit / unit:.2f}"
  out = [f"memory, {name} a device{there}"]
  out += [f"  {name:<22}{size / unit:10.3f}" for name, size in step.parts.items() if size]
  if step.refused is not None:
    needed = step.refused[0] / unit
    return [
      *out,
      f"  needed                {needed:10.3f}  more than there is: it does not compile",
    ]
  memory = step.memory
  padding = memory.arguments - sum(step.parts.values())
  if padding > 0.001 * unit:
    out += [f"  {'padding to tiles':<22}{padding / unit:10.3f}"]
  out += [f"  {'temporary':<22}{memory.temporary / unit:10.3f}  activations, gradients, the rest"]
  share = "" if plan.limit is None else f"  {100 * memory.peak / plan.limit:.0f} %"
  out += [f"  {'peak':<22}{memory.peak / unit:10.3f}{share}"]
  return [*out, *_largest(plan)]


def _largest(plan: Plan) -> list[str]:
  if plan.largest is None:
    return []
  return [f"  largest batch that fits {plan.largest.batch_size:8,}", f"    {plan.largest.how}"]


def _work(counts: counting.Counts, chip: chips.Chip | None) -> list[str]:
  out = ["work of a device in a step"]

  def row(name, flops, moved, seconds):
    cells = (_amount(flops, "FLOP") if flops else "", _amount(moved, "B") if moved else "")
    time = f"{1e3 * seconds:,.2f} ms" if chip else ""
    return f"  {name:<36}{cells[0]:>14}{cells[1]:>12}{time:>13}".rstrip()

  for precision, flops in sorted(counts.flops.items(), key=lambda pair: -pair[1]):
    out.append(row(f"products {precision}", flops, 0, flops / chip.rate(precision) if chip else 0))
  out.append(row("memory", 0, counts.bytes, counts.bytes / chip.bandwidth if chip else 0))
  out.append("of that in")
  for origin, (flops, moved) in counts.by_origin().items():
    time = sum(
      max(prediction.times(item, chip))
      for item in counts.items
      if chip and counting.origin(item.op_name) == origin
    )
    out.append(row(origin, flops, moved, time))
  out.append("longest")
  for name, seconds, flops, moved in advice.dearest(counts, chip):
    if len(name) > 36:
      out.append(f"  {name}")
      name = ""
    out.append(row(name, flops, moved, seconds))
  if counts.custom_calls:
    called = ", ".join(f"{n} x {target}" for target, n in counts.custom_calls.items())
    out.append(f"  products inside of kernels are not counted: {called}")
  if counts.unknown_loops:
    out.append(f"  {counts.unknown_loops} loops say nowhere how often they run and count once")
  return out


def _amount(value: float, unit: str) -> str:
  """With the prefix that leaves one to three digits before the point.

  >>> _amount(1.445e6, "B")
  '1.45 MB'
  """
  power = min(max(int(math.log10(max(value, 1))) // 3, 0), 4)
  return f"{value / 1e3**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}{unit}"


def messages(counts: counting.Counts) -> list[dict[str, Any]]:
  """Collectives of one kind, group and origin together, the most bytes first."""
  found: dict[tuple, dict[str, Any]] = {}
  for one in counts.collectives:
    key = (one.kind, one.group, "+".join(one.origins), one.asynchronous)
    entry = found.setdefault(key, {"count": 0, "bytes": 0, "largest": 0, "op_name": ""})
    entry["count"] += one.times
    entry["bytes"] += one.times * one.bytes
    if one.bytes >= entry["largest"]:
      entry["largest"], entry["op_name"] = one.bytes, one.op_name
  named = [
    dict(zip(("kind", "group", "origin", "asynchronous"), key, strict=True)) | entry
    for key, entry in found.items()
  ]
  return sorted(named, key=lambda entry: -entry["bytes"])


def _messages(plan: Plan) -> list[str]:
  found = messages(plan.step.counts)
  if not found:
    return ["messages of a device in a step: none"]
  out = [f"messages of a device in a step{'times':>10}{'all':>12}{'group':>8}  largest"]
  for one in found:
    kind = one["kind"] + " (beside)" * one["asynchronous"]
    cells = f"{one['count']:>10,}{_amount(one['bytes'], 'B'):>12}{one['group']:>8,}"
    out.append(f"  {kind:<28}{cells}  {advice.place(one['op_name'])}")
  return out


def _predicted(plan: Plan) -> list[str]:
  p, count = plan.predicted, len(plan.target.devices)
  size = plan.step.config.batch_size
  return [
    f"bound         {p.bound}: {_BOUNDS[p.bound]}",
    f"predicted     {1e3 * p.step:.2f} ms a step at least: {1e3 * p.work:.2f} of work (products "
    f"alone {1e3 * p.matrix:.2f}, memory alone {1e3 * p.memory:.2f}), {1e3 * p.waited:.2f} of "
    "messages",
    f"              {size / p.step / count:,.0f} images/s a device, {size / p.step:,.0f} of all at "
    "most",
    f"              efficiency {100 * p.efficiency:.0f} %, {100 * p.of_peak:.0f} % of the chip's "
    "peak in bfloat16",
  ]


def _of_chip(chip: chips.Chip) -> str:
  return (
    f"{chip.name}: {chip.flops / 1e12:,.0f} TFLOP/s in bfloat16, memory "
    f"{chip.bandwidth / 1e9:,.0f} GB/s, links {chip.links / 1e9:,.0f} GB/s out of a chip, published"
  )


def as_json(plan: Plan) -> dict[str, Any]:
  """Everything that `lines` says and more, for files."""
  step = plan.step
  out: dict[str, Any] = {
    "recipe": plan.name,
    "target": plan.target.name,
    "devices": len(plan.target.devices),
    "mesh": step.mesh,
    "batch_size": step.config.batch_size,
    "images": plan.num_images,
    "classes": plan.num_classes,
    "seconds": round(step.seconds, 1),
    "parts": step.parts,
    "limit": plan.limit,
    "change_first": plan.first,
    "placement": {path: place for path, place in step.places.items() if place},
  }
  if plan.largest is not None:
    out["largest_batch"] = plan.largest._asdict()
  if step.refused is not None:
    return out | {"fits": False, "needed": step.refused[0]}
  out["fits"] = plan.limit is None or step.memory.peak <= plan.limit
  out["memory"] = step.memory._asdict() | {"peak": step.memory.peak}
  out["flops"] = step.counts.flops
  out["bytes"] = step.counts.bytes
  out["by_origin"] = {
    name: {"flops": flops, "bytes": moved}
    for name, (flops, moved) in step.counts.by_origin().items()
  }
  out["messages"] = messages(step.counts)
  out["unknown_loops"] = step.counts.unknown_loops
  out["custom_calls"] = step.counts.custom_calls
  out["longest"] = [
    dict(zip(("place", "seconds", "flops", "bytes"), entry, strict=True))
    for entry in advice.dearest(step.counts, plan.target.chip, 20)
  ]
  if plan.predicted is not None:
    out["chip"] = plan.target.chip._asdict()
    out["predicted"] = plan.predicted._asdict()
    out["assumptions"] = list(prediction.ASSUMPTIONS)
  assert all(not isinstance(v, float) or math.isfinite(v) for v in out.values())
  return out
