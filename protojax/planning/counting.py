"""What a compiled program does on one device: products, memory traffic, messages.

XLA's own estimate (`compiled.cost_analysis()`) takes a loop's body once and every operand of every
operation inside of a fusion for a trip to memory. Here a loop counts as often as it runs, and a
fusion reads its operands and writes its result once, which is what it is made for. What lies in the
memory on the chip (TPU) costs no traffic, and of an array that is only sliced the slice alone does.
"""

import math
import re
from typing import NamedTuple

from protojax.planning import hlo, loops, products, traffic

COLLECTIVES = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
  *("collective-permute", "collective-broadcast"),
)
# Copies that a TPU's compiler starts ahead.
_AHEAD = ("copy-start", "slice-start", "dynamic-slice-start")
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
    custom_calls: {target: how often} of kernels that do not say what they compute; their operations
      are not counted, their traffic is.
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
  unknown = _walk(module, module.computations[module.entry], 1, counts, set())
  return counts._replace(unknown_loops=unknown)


def _walk(
  module: hlo.Module,
  computation: hlo.Computation,
  times: int,
  counts: Counts,
  chains: set[str],
  beside: bool = False,
) -> int:
  """Adds a computation that runs `times`; returns how many loops of unknown length it has.

  A TPU's compiler cuts a message that other work hides into a chain of fusions, each of which holds
  the whole of it: `chains` has the channels of those that have been counted.
  """
  unknown = 0
  for one in computation.instructions.values():
    if one.opcode == "while":
      rounds = loops.rounds(module, computation, one)
      unknown += rounds is None
      body = module.called(one, "body")
      unknown += _walk(module, body, times * (rounds or 1), counts, chains, beside)
    elif one.opcode in ("call", "call-start", "async-start"):
      inner = module.called(one, "to_apply") or module.called(one)
      ahead = beside or one.opcode != "call"
      unknown += _walk(module, inner, times, counts, chains, ahead)
    elif one.opcode == "conditional":
      unknown += _walk(module, _dearest(module, one), times, counts, chains, beside)
    flops: dict[str, float] = {}
    for inner, part in [(computation, one), *_within(module, one)]:
      if part.opcode.removesuffix("-start") in COLLECTIVES:
        if "chain_id=" in part.attributes:
          channel = part.attribute("channel_id")
          if channel in chains:
            continue
          chains.add(channel)
        ahead = beside or part.opcode.endswith("-start") or inner is not computation
        counts.collectives.append(_collective(inner, part, times, ahead))
      elif product := products.count(inner, part):
        flops[product[0]] = flops.get(product[0], 0.0) + times * product[1]
      elif part is one and part.opcode == "custom-call" and part.target not in traffic.FREE_CALLS:
        counts.custom_calls[part.target] = counts.custom_calls.get(part.target, 0) + times
    moved = times * traffic.moved(module, computation, one)
    if flops or moved:
      made = _booked(module, computation, one)
      counts.items.append(Item(one.name, one.opcode, flops, moved, times, made))
  return unknown


def _made(computation: hlo.Computation, one: hlo.Instruction) -> str:
  """Where JAX made it; a copy, which the compiler made, where JAX made what is copied."""
  while not one.op_name and one.operands and one.opcode in _PASSED_ON:
    one = computation.instructions[one.operands[0]]
  return one.op_name


def _booked(module: hlo.Module, computation: hlo.Computation, one: hlo.Instruction) -> str:
  """Where JAX made what the time of an instruction is booked to.

  What the compiler made has no name: a copy that it starts ahead is booked to what it is fetched
  for, any other copy to what is copied, and all else to what reads it. Of fused operations without
  a product the root gives its name to all, and where most are the optimizer's, that is wrong: XLA
  fuses the teacher's average into the update of each parameter.
  """
  made = "" if one.opcode in _AHEAD else _made(computation, one)
  made = made or one.op_name or _wanted_by(module, computation, one) or _made(computation, one)
  if one.opcode != "fusion" or origin(made) == "optimizer":
    return made
  parts = list(_within(module, one))
  names = [part.op_name for _, part in parts if origin(part.op_name) not in ("state", "other")]
  of_optimizer = [name for name in names if origin(name) == "optimizer"]
  if 2 * len(of_optimizer) <= len(names) or any(products.count(*pair) for pair in parts):
    return made
  return of_optimizer[-1]


def _wanted_by(module: hlo.Module, computation: hlo.Computation, one: hlo.Instruction) -> str:
  """Where JAX made the nearest named operation that a result comes to; "" if there is none."""
  queue = [one.name]
  for name in queue:
    for user in computation.users.get(name, ()):
      if user.op_name:
        return _booked(module, computation, user)
      if user.name not in queue:
        queue.append(user.name)
  return ""


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
    _walk(module, branch, 1, counts, set())
    return sum(counts.flops.values()) + counts.bytes

  return max(branches, key=cost)


def _collective(
  computation: hlo.Computation, one: hlo.Instruction, times: int, beside: bool
) -> Collective:
  kind = one.opcode.removesuffix("-start")
  given = sum(computation.instructions[name].bytes for name in one.operands)
  result = one.bytes
  if one.opcode != kind and kind in (
    "all-gather",
    "collective-permute",
  ):  # (operands, results, flags)
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
    beside,
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
