"""How long a counted step takes at least, and what it waits for (a roofline).

Every operation takes the longer of its products at the chip's peak and its bytes at the memory's,
one operation after the other; copies that the compiler starts ahead run beside them, and so do
messages that it starts ahead; other messages are waited for.
"""

from typing import NamedTuple

from protojax.planning import chips, counting

ASSUMPTIONS = (
  "every product at the published peak, float32 as the passes in bfloat16 that a TPU makes of it",
  "every byte at the published bandwidth of the memory; what is on the chip is free",
  "what is neither a product nor a byte (erf, exp, sums on the vector unit) costs nothing",
  "a message of all chips uses all their links, one of a part of them those of one axis; where the "
  "chips do not close to a ring it takes twice as long; a hop to the next chip is a microsecond",
  "images are there when they are wanted: neither decoding nor the hosts are part of it",
  "one slice: no messages over the data centre's network",
)


class Prediction(NamedTuple):
  """Seconds of a step, those of one device.

  Attributes:
    matrix: of all products alone.
    memory: of all bytes alone.
    work: of all operations, each bound by one of the two.
    network: of all messages.
    waited: of the messages that nothing runs beside.
    step: all of it.
    bound: what the step spends most on: "matrix", operations whose products take longer than their
      bytes; "memory", those whose bytes do; "network", messages that nothing runs beside.
    images_per_second: of all devices together.
    efficiency: share of the step that is not spent waiting for messages.
    of_peak: operations as a share of what the chip could do in bfloat16 in that time.
  """

  matrix: float
  memory: float
  work: float
  network: float
  waited: float
  step: float
  bound: str
  images_per_second: float
  efficiency: float
  of_peak: float


def predict(
  counts: counting.Counts, chip: chips.Chip, sides: tuple[int, ...], devices: int, batch_size: int
) -> Prediction:
  """The shortest time that a step can take.

  Args:
    counts: of the step on one device.
    chip: of every device.
    sides: of the torus, without those of one chip.
    devices: how many.
    batch_size: images of all of them.
  """
  matrix = memory = work = ahead = of_matrix = of_memory = 0.0
  for item in counts.items:
    products, moved = times(item, chip)
    matrix += products
    memory += moved
    if item.opcode.endswith("-start"):
      ahead += moved
      continue
    work += max(products, moved)
    of_matrix += products if products > moved else 0.0
    of_memory += moved if moved >= products else 0.0
  if memory > work:  # copies ahead of time cannot hide behind less work than they are
    of_memory += memory - work
    work = memory
  sent = [(one.times * seconds(one, chip, sides, devices), one) for one in counts.collectives]
  network = sum(time for time, _ in sent)
  waited = sum(time for time, one in sent if not one.asynchronous)
  step = max(work, network - waited) + waited
  spent = {"matrix": of_matrix, "memory": of_memory, "network": step - work}
  flops = sum(counts.flops.values())
  return Prediction(
    matrix,
    memory,
    work,
    network,
    waited,
    step,
    max(spent, key=lambda name: spent[name]),
    batch_size / step,
    work / step,
    flops / chip.flops / step,
  )


def times(item: counting.Item, chip: chips.Chip) -> tuple[float, float]:
  """Seconds of (products, bytes) of an operation, each alone."""
  products = sum(flops / chip.rate(precision) for precision, flops in item.flops.items())
  return products, item.bytes / chip.bandwidth


def seconds(
  one: counting.Collective, chip: chips.Chip, sides: tuple[int, ...], devices: int
) -> float:
  """Of one message; see ASSUMPTIONS. Sums go around twice, once to add and once to tell."""
  group = one.group or devices
  if group < 2:
    return 0.0
  whole = group >= devices
  axes = len(sides) if chip.axes and whole else 1
  closed = sides if whole else [group] if group in sides else [0.5]
  ring = all(side % chip.ring == 0 for side in closed)
  links = chip.links * (axes / chip.axes if chip.axes else 1.0) * (1.0 if ring else 0.5)
  rounds = 2 if one.kind == "all-reduce" else 1
  longest = max(sides, default=group) if whole else group
  hops = sum(sides) if whole else group
  latency = rounds * chip.hop * hops / (2 if ring else 1)
  if one.kind == "collective-permute":  # over one link, one way
    return one.bytes / (links / 2 if chip.axes else links) + latency
  if one.kind in ("all-to-all", "ragged-all-to-all"):
    # Every chip's bytes go a quarter of the way around, or half of a line; a switch has no way.
    crossed = longest / 4 if chip.axes else 1.0
    return one.bytes * (group - 1) / group * crossed / links + latency
  return rounds * one.bytes * (group - 1) / group / links + latency
