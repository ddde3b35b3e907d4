"""Reads the text of a program that XLA has compiled into computations of instructions.

XLA prints a compiled program (`compiled.as_text()`) as named computations, lists of lines such as

    %y.2 = f32[8,128]{1,0:T(8,128)S(1)} dot(%x.1, %w.1), lhs_contracting_dims={1}, ...

with a result of a type, dimensions and a layout, an operation, its operands and its attributes.
"""

import functools
import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


class Shape(NamedTuple):
  """One array of a result, as it lies in memory.

  Attributes:
    dtype: "f32", "bf16", "pred", ...
    dims: its dimensions.
    bytes: what it occupies: on a TPU whole tiles of the layout, 197 x 197 as 200 x 256.
    space: of its memory: 0 the device's main memory (HBM), 1 on a TPU that on the chip.
  """

  dtype: str
  dims: tuple[int, ...]
  bytes: int
  space: int


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: without "%".
    opcode: "fusion", "dot", "all-reduce", ...
    shapes: of its result, those of a tuple one after another.
    operands: names of instructions of the same computation.
    inside: what stands between the parentheses: operands, the number of a parameter, a constant.
    attributes: what follows the parentheses.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  inside: str
  attributes: str

  def attribute(self, name: str) -> str:
    """What stands after "NAME=", without braces; "" where it does not stand."""
    found = re.search(rf"[\s,{{]{name}=(?:\{{([^}}]*)\}}|%?([^\s,}}]+))", self.attributes)
    return (found[1] or found[2] or "") if found else ""

  @property
  def op_name(self) -> str:
    """Where JAX made it: "jit(train_step)/optimizer/mul"; of a parameter its path; or ""."""
    found = _OP_NAME.search(self.attributes)
    return found[1].replace("\\'", "'") if found else ""

  @property
  def target(self) -> str:
    """Of a custom call."""
    return self.attribute("custom_call_target").strip('"')

  @property
  def bytes(self) -> int:
    """Of the whole result, in whichever memory."""
    return sum(shape.bytes for shape in self.shapes)


class Computation(NamedTuple):
  """Instructions in their order, by name, and the last of them, whose result is returned."""

  instructions: dict[str, Instruction]
  root: Instruction
  parameters: dict[int, Instruction]
  users: dict[str, list[Instruction]]


class Module(NamedTuple):
  """All computations of a program, and the name of the one that it starts with."""

  computations: dict[str, Computation]
  entry: str

  def called(self, instruction: Instruction, attribute: str = "calls") -> Computation | None:
    """The computation that an instruction names in this attribute."""
    return self.computations.get(instruction.attribute(attribute))


def parse(text: str) -> Module:
  """The program of `compiled.as_text()`.

  Raises:
    ValueError: the text is no compiled program.
  """
  computations, entry, name, found, root = {}, "", "", {}, None
  for line in text.splitlines():
    if opened := _COMPUTATION.match(line):
      name, found, root = opened[2], {}, None
      entry = name if opened[1] else entry
    elif line == "}" and found:
      computations[name] = _computation(found, root)
      found = {}
    elif name and (start := _INSTRUCTION.match(line)):
      instruction = _instruction(start[2], re.sub(r"/\*.*?\*/", "", line[start.end() :]))
      found[instruction.name] = instruction
      root = instruction if start[1] or root is None else root
  if entry not in computations:
    raise ValueError("no ENTRY: not the text of a compiled program")
  return Module(computations, entry)


def _computation(found: dict[str, Instruction], root: Instruction) -> Computation:
  users: dict[str, list[Instruction]] = {}
  for instruction in found.values():
    for operand in dict.fromkeys(instruction.operands):
      users.setdefault(operand, []).append(instruction)
  parameters = {int(i.inside): i for i in found.values() if i.opcode == "parameter"}
  return Computation(found, root, parameters, users)


def _instruction(name: str, rest: str) -> Instruction:
  """Of "f32[2]{0} add(%a, %b), attributes"."""
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  opened = _OPCODE.match(rest, end)
  assert opened, rest
  close = _closing(rest, opened.end() - 1)
  inside = rest[opened.end() : close - 1]
  operands: tuple[str, ...] = ()
  if opened[1] not in ("parameter", "constant"):
    # Older versions write the operand's type before its name.
    operands = tuple(o.split()[-1].lstrip("%") for o in _split(inside) if o.strip())
  return Instruction(name, opened[1], shapes(rest[:end]), operands, inside, rest[close:])


def _closing(text: str, start: int) -> int:
  """The place after the parenthesis that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == "(") - (text[place] == ")")
    if not depth:
      return place + 1
  raise ValueError(f"no closing parenthesis: {text[start : start + 80]}")


def _split(text: str) -> list[str]:
  """At commas outside of brackets."""
  parts, depth, start = [], 0, 0
  for place, char in enumerate(text):
    depth += (char in "([{") - (char in ")]}")
    if char == "," and not depth:
      parts.append(text[start:place])
      start = place + 1
  return [*parts, text[start:]]


@functools.cache
def shapes(text: str) -> tuple[Shape, ...]:
  """The arrays of a type, one of "f32[8,16]{1,0}" and two of "(s32[4]{0}, bf16[2,3]{1,0})".

  >>> shapes("bf16[6,197,197]{2,1,0:T(8,128)(2,1)S(1)}")
  (Shape(dtype='bf16', dims=(6, 197, 197), bytes=614400, space=1),)
  """
  found = []
  for dtype, listed, layout in _SHAPE.findall(text):
    dims = tuple(int(d.lstrip("<=")) for d in listed.split(",") if d)
    width = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) if dtype in _BITS else int(width[0]) if width else 0
    space = re.search(r"S\((\d+)\)", layout)
    count = math.prod(_padded(dims, layout))
    found.append(Shape(dtype, dims, -(-count * bits // 8), int(space[1]) if space else 0))
  return tuple(found)


def _padded(dims: tuple[int, ...], layout: str) -> list[int]:
  """Dimensions in whole tiles, the slowest first; "{1,0:T(8,128)}" lists the fastest first."""
  tile = re.search(r":T\(([\d,]+)\)", layout)
  if not tile:
    return list(dims)
  order = re.match(r"\{([\d,]*)", layout)
  minor = [int(d) for d in order[1].split(",") if d] if order else []
  sizes = [dims[d] for d in reversed(minor)]
  tiles = [int(t) for t in tile[1].split(",")]
  sizes = [1] * (len(tiles) - len(sizes)) + sizes
  for place, step in enumerate(reversed(tiles), 1):
    sizes[-place] = -(-sizes[-place] // step) * step
  return sizes
