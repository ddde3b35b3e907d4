"""What a compiled program does on one device: products, memory traffic, messages.

XLA's own estimate (`compiled.cost_analysis()`) takes a loop's body once and every operand of every
operation inside of a fusion for a trip to memory. Here a loop counts as often as it runs, and a
fusion reads its operands and writes its result once, which is what it is made for. What lies in the
memory on the chip (TPU) costs no traffic, and of an array that is only sliced the slice alone does.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from protojax.planning import hlo, loops, traffic

COLLECTIVES = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
  *("collective-permute", "collective-broadcast"),
)
_PASSED_ON = (
  "copy",
  "bitcast",
  "copy-start",
  "copy-done",
  "convert",
  "reshape",
  "get-tuple-element",
)


class Collective(NamedTuple):
  """One message between devices, and how often a step sends it.

  Attributes:
    kind: of COLLECTIVES.
    bytes: of the largest of operand and result on a device: what an all-reduce sums, what an
      all-gather ends with, what a reduce-scatter starts from.
    group: how many devices exchange with each other; 0 where nothing says so.
    times: in one run of the program.
    origins: {origin: bytes} of what it was put together from, the most bytes first.
    op_name: where JAX made the largest part.
    asynchronous: whether the compiler lets it run beside other work.
  """

  kind: str
  bytes: int
  group: int
  times: int
  origins: dict[str, int]
  op_name: str
  asynchronous: bool


class Item(NamedTuple):
  """One instruction that takes time, times how often it runs.

  Attributes:
    flops: {precision: operations}, of matrix products; "bf16 x bf16", "f32 x f32, highest".
    bytes: read from and written to main memory.
  """

  name: str
  opcode: str
  flops: dict[str, float]
  bytes: float
  times: int
  op_name: str


class Counts(NamedTuple):
  """A program on one device; `items` and `collectives` are those of one run of it.

  Attributes:
    unknown_loops: loops that say nowhere how often they run; they count as one round.
    custom_calls: {target: how often}; their operations are not counted, their traffic is.
  """

  items: list[Item]
  collectives: list[Collective]
  unknown_loops: int
  custom_calls: dict[str, int]

  @property
  def flops(self) -> dict[str, float]:
    """Operations of matrix products and convolutions, two a multiply-add, by precision."""
    total: dict[str, float] = {}
    for item in self.items:
      for precision, count in item.flops.items():
        total[precision] = total.get(precision, 0) + count
    return total

  @property
  def bytes(self) -> float:
    """Bytes to and from main memory."""
    return sum(item.bytes for item in self.items)

  def by_origin(self) -> dict[str, tuple[float, float]]:
    """{origin: (operations, bytes)}, the most bytes first."""
    total: dict[str, tuple[float, float]] = {}
    for item in self.items:
      flops, moved = total.get(where := origin(item.op_name), (0.0, 0.0))
      total[where] = flops + sum(item.flops.values()), moved + item.bytes
    return dict(sorted(total.items(), key=lambda entry: -entry[1][1]))


def origin(op_name: str) -> str:
  """The part of the training step that an operation belongs to; of several fused ones the first.

  >>> origin("jit(train_step)/transpose(jvp(ViT))/blocks_0/mlp/fc1/dot_general")
  'backward'
  >>> origin("state.teacher['encoder']['backbone']['norm']['scale']")
  'state'
  """
  if scope := re.search(
    r"[/(](?:(augment|optimizer|update|probe)/|(transpose)\(|(jvp)\()", op_name
  ):
    return scope[1] or ("backward" if scope[2] else "forward")
  return "state" if re.match(r"(state|batch|probe_batch)[.\[]", op_name) else "other"


def count(text: str) -> Counts:
  """Counts what the program in `compiled.as_text()` does in one run on one device.

  Raises:
    ValueError: the text is no compiled program.
  """
  module = hlo.parse(text)
  counts = Counts([], [], 0, {})
  unknown = _walk(module, module.computations[module.entry], 1, counts)
  return counts._replace(unknown_loops=unknown)


def _walk(module: hlo.Module, computation: hlo.Computation, times: int, counts: Counts) -> int:
  """Adds a computation that runs `times`; returns how many loops of unknown length it has."""
  unknown = 0
  for one in computation.instructions.values():
    if one.opcode == "while":
      rounds = loops.rounds(module, computation, one)
      unknown += rounds is None
      unknown += _walk(module, module.called(one, "body"), times * (rounds or 1), counts)
    elif one.opcode in ("call", "call-start", "async-start"):
      inner = module.called(one, "to_apply") or module.called(one)
      unknown += _walk(module, inner, times, counts)
    elif one.opcode == "conditional":
      unknown += _walk(module, _dearest(module, one), times, counts)
    elif one.opcode == "custom-call":
      target = one.attribute("custom_call_target").strip('"')
      if target not in traffic.FREE_CALLS:
        counts.custom_calls[target] = counts.custom_calls.get(target, 0) + times
    flops = {}
    for inner, product in [(computation, one), *_within(module, one)]:
      if product.opcode.removesuffix("-start") in COLLECTIVES:
        counts.collectives.append(_collective(inner, product, times, inner is not computation))
      elif product.opcode in _PRODUCTS:
        precision, operations = _PRODUCTS[product.opcode](inner, product)
        flops[precision] = flops.get(precision, 0.0) + times * operations
    moved = times * traffic.moved(module, computation, one)
    if flops or moved:
      made = _made(computation, one)
      counts.items.append(Item(one.name, one.opcode, flops, moved, times, made))
  return unknown


def _made(computation: hlo.Computation, one: hlo.Instruction) -> str:
  """Where JAX made it; a copy, which the compiler made, where JAX made what is copied."""
  while not one.op_name and one.operands and one.opcode in _PASSED_ON:
    one = computation.instructions[one.operands[0]]
  return one.op_name


def _within(module: hlo.Module, one: hlo.Instruction):
  """(computation, instruction) of all that is fused into one."""
  if one.opcode == "fusion" and (inner := module.called(one)):
    for part in inner.instructions.values():
      yield inner, part
      yield from _within(module, part)


def _dearest(module: hlo.Module, one: hlo.Instruction) -> hlo.Computation:
  """The branch of a conditional that moves and computes most."""
  names = one.attribute("branch_computations") or ",".join(
    one.attribute(f"{which}_computation") for which in ("true", "false")
  )
  branches = [module.computations[n.strip().lstrip("%")] for n in names.split(",")]

  def cost(branch):
    counts = Counts([], [], 0, {})
    _walk(module, branch, 1, counts)
    return sum(counts.flops.values()) + counts.bytes

  return max(branches, key=cost)


# Operations of products.


def _precision(computation: hlo.Computation, one: hlo.Instruction) -> str:
  """ "bf16 x bf16", "f32 x f32, highest"."""
  types = " x ".join(computation.instructions[o].shapes[0].dtype for o in one.operands[:2])
  wanted = set(one.attribute("operand_precision").split(",")) & {"high", "highest"}
  # The higher of the two; what is bfloat16 already has no more digits to take.
  return f"{types}, {max(wanted, key=len)}" if wanted and "f32" in types else types


def _dot(computation: hlo.Computation, one: hlo.Instruction) -> tuple[str, float]:
  left = computation.instructions[one.operands[0]].shapes[0].dims
  summed = [int(d) for d in one.attribute("lhs_contracting_dims").split(",") if d]
  count = 2.0 * math.prod(one.shapes[0].dims) * math.prod(left[d] for d in summed)
  return _precision(computation, one), count


def _convolution(computation: hlo.Computation, one: hlo.Instruction) -> tuple[str, float]:
  """A TPU's products are convolutions too, those of batches with a dilated input."""
  left, right = (computation.instructions[o].shapes[0].dims for o in one.operands[:2])
  of_left, of_right, of_out = re.split("_|->", one.attribute("dim_labels"))
  out = one.shapes[0].dims
  window = dict(part.split("=") for part in one.attribute("window").split())
  pairs = 1
  for axis in range(len(out) - 2):
    taken = {name: value.split("x")[axis] for name, value in window.items()}
    pairs *= _taps(
      left[of_left.index(str(axis))],
      right[of_right.index(str(axis))],
      out[of_out.index(str(axis))],
      stride=int(taken.get("stride", 1)),
      pad=int(taken.get("pad", "0_0").split("_")[0]),
      lhs_dilate=int(taken.get("lhs_dilate", 1)),
      rhs_dilate=int(taken.get("rhs_dilate", 1)),
    )
  features = out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
  return _precision(computation, one), 2.0 * features * pairs


def _taps(size, taps, out, *, stride, pad, lhs_dilate, rhs_dilate) -> int:
  """Pairs (place of the result, tap) of one axis that meet an element of the input."""
  where = np.arange(out)[:, None] * stride + np.arange(taps)[None, :] * rhs_dilate - pad
  inside = (where >= 0) & (where <= (size - 1) * lhs_dilate)
  return int(np.sum(inside & (where % lhs_dilate == 0)))


_PRODUCTS = {"dot": _dot, "convolution": _convolution}


# Messages.


def _collective(
  computation: hlo.Computation, one: hlo.Instruction, times: int, fused: bool
) -> Collective:
  kind = one.opcode.removesuffix("-start")
  started = one.opcode.endswith("-start")
  given = sum(computation.instructions[name].bytes for name in one.operands)
  result = one.bytes
  if started and kind in ("all-gather", "collective-permute"):  # (operands, results, flags)
    result -= given
  parts = [computation.instructions[name] for name in one.operands]
  named = [(_made(computation, part), part.bytes) for part in parts]
  if len(named) == 1 or not any(name for name, _ in named):
    named = [(one.op_name, max(given, result))]
  origins: dict[str, int] = {}
  for name, size in sorted(named, key=lambda entry: -entry[1]):
    origins[origin(name)] = origins.get(origin(name), 0) + size
  largest = max(named, key=lambda entry: entry[1])[0]
  return Collective(
    kind,
    max(given, result),
    _group(one.attributes),
    times,
    dict(sorted(origins.items(), key=lambda entry: -entry[1])),
    largest,
    started or fused,
  )


def _group(attributes: str) -> int:
  """Devices of one group, of "{{0,1},{2,3}}", "[2,4]<=[8]" and "mesh['a'=4,'b'=2] {'b'}"."""
  if listed := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(listed[1])
  if listed := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", listed[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", listed[2])  # a part of an axis says its size
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
    return listed[1].count(",") + 1
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  return len(set(re.findall(r"\d+", pairs[1]))) if pairs else 0
