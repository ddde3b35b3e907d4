"""Bytes that an instruction of a compiled program moves to and from main memory (HBM)."""

import math

from protojax.planning import hlo

# These move nothing, or what they move is counted where it starts.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
  *("partition-id", "replica-id", "opt-barrier", "domain", "add-dependency", "conditional"),
  *("call", "call-start", "async-start"),
}
# Of custom calls these, too.
FREE_CALLS = ("ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "AllocateBuffer")
_SLICES = ("slice", "dynamic-slice", "gather")


def moved(module: hlo.Module, computation: hlo.Computation, one: hlo.Instruction) -> float:
  """Bytes that one instruction reads from and writes to main memory.

  A fusion reads its operands and writes its result once; of an array that it only slices, the slice
  alone; of one that it updates in place, what is new. Memory on the chip (TPU) costs nothing.
  """
  if one.opcode in _FREE or one.opcode.endswith("-done"):
    return 0
  if one.opcode == "custom-call" and one.target in FREE_CALLS:
    return 0
  operands = [computation.instructions[name] for name in one.operands]
  if one.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
    # Of copies the result is (to, from, a flag), of slices ((from ...), to, a flag).
    to = one.shapes[0] if one.opcode == "copy-start" else one.shapes[len(operands[0].shapes)]
    return to.bytes * (_in_memory(to) + _in_memory(operands[0].shapes[0]))
  if one.opcode in _SLICES:
    return _result(one) + one.bytes * _in_memory(operands[0].shapes[0])
  if one.opcode in ("dynamic-update-slice", "scatter"):  # in place
    new = operands[1] if one.opcode == "dynamic-update-slice" else operands[-1]
    return _result(new) + new.bytes * _in_memory(one.shapes[0])
  inner = module.called(one) if one.opcode == "fusion" else None
  if inner is None:
    read, written = sum(_result(operand) for operand in operands), _result(one)
    if one.opcode in ("all-gather-start", "collective-permute-start"):
      written -= read  # of a result (operands, results, flags)
    elif one.opcode == "custom-call" and one.target.startswith(("__cublas$", "__cudnn$")):
      written = one.shapes[0].bytes  # beside a workspace, which is as large as it may be
    return read + written
  read = sum(
    min(_read(module, inner, inner.parameters[place].name), _result(operand))
    for place, operand in enumerate(operands)
    if _result(operand)
  )
  written = _written(module, inner)
  if len(written) != len(one.shapes):
    written = [shape.bytes for shape in one.shapes]
  pairs = zip(written, one.shapes, strict=True)
  return read + sum(min(new, shape.bytes) * _in_memory(shape) for new, shape in pairs)


def _in_memory(shape: hlo.Shape) -> bool:
  """Whether an array lies in the main memory, not on the chip."""
  return shape.space == 0


def _result(one: hlo.Instruction) -> int:
  return sum(shape.bytes for shape in one.shapes if _in_memory(shape))


def _read(module: hlo.Module, computation: hlo.Computation, name: str) -> float:
  """Bytes of a parameter that a fused computation reads: all, or the slices that it takes."""
  total = 0.0
  for user in computation.users.get(name, ()):
    first = user.operands[0] == name and name not in user.operands[1:]
    if user.opcode in _SLICES and first:
      total += user.bytes
    elif user.opcode in ("dynamic-update-slice", "scatter") and first:
      continue  # written into, in place
    elif user.opcode == "bitcast":
      total += _read(module, computation, user.name)
    elif user.opcode == "fusion" and (inner := module.called(user)):
      places = [place for place, operand in enumerate(user.operands) if operand == name]
      total += sum(_read(module, inner, inner.parameters[place].name) for place in places)
    else:
      return math.inf
  return total


def _written(module: hlo.Module, computation: hlo.Computation) -> list[float]:
  """Bytes that a fused computation writes of each of its results: all, or what it updates."""
  root = computation.root
  results = root.operands if root.opcode == "tuple" else [root.name]
  written = []
  for name in results:
    one = computation.instructions[name]
    while one.opcode == "bitcast":
      one = computation.instructions[one.operands[0]]
    if one.opcode == "dynamic-update-slice":
      written.append(computation.instructions[one.operands[1]].bytes)
    elif one.opcode == "scatter":
      written.append(computation.instructions[one.operands[-1]].bytes)
    elif one.opcode == "fusion" and len(one.shapes) == 1 and (inner := module.called(one)):
      written += _written(module, inner)
    else:
      written.append(math.inf)
  return written
