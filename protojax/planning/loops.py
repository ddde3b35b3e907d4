"""How often a loop of a compiled program runs."""

import re

from protojax.planning import hlo

_PASSED_ON = ("copy", "bitcast", "copy-start", "copy-done", "convert", "reshape")


def rounds(module: hlo.Module, computation: hlo.Computation, loop: hlo.Instruction) -> int | None:
  """How often a loop runs: as the compiler says, or as its condition `i < n` does."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(known[1])
  condition, body = module.called(loop, "condition"), module.called(loop, "body")
  compared, inner = _condition(module, condition)
  if compared is None:
    return None
  sides = [_source(inner, operand) for operand in compared.operands]
  if inner is not condition:  # fused: its parameters are the operands of the fusion
    outer = condition.root
    sides = [
      _source(condition, outer.operands[v]) if k == "parameter" else (k, v) for k, v in sides
    ]
  (kind, index), limit = sides
  if kind != "element":
    return None
  start = _carried(computation, loop, index)
  stop = limit[1] if limit[0] == "constant" else None
  if limit[0] == "element":
    stop = _carried(computation, loop, limit[1])
  step = _step(body, index)
  direction = compared.attribute("direction")
  if None in (start, stop) or step != 1 or direction not in ("LT", "LE", "NE"):
    return None
  return max(stop - start + (direction == "LE"), 0)


def _condition(module, condition):
  """(the comparison that a condition ends in, the computation where it stands)."""
  root, inner = condition.root, condition
  if root.opcode == "fusion":
    inner = module.called(root)
    root = inner.root
  return (root if root.opcode == "compare" else None), inner


def _source(computation: hlo.Computation, name: str) -> tuple[str, int]:
  """("constant", value) of a scalar, or ("element", of the loop's tuple) or ("parameter", n)."""
  one = computation.instructions[name]
  while one.opcode in _PASSED_ON:
    one = computation.instructions[one.operands[0]]
  if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.inside):
    return "constant", int(one.inside)
  if one.opcode == "get-tuple-element":
    return "element", int(one.attribute("index"))
  if one.opcode == "parameter":
    return "parameter", int(one.inside)
  return "other", 0


def _carried(computation: hlo.Computation, loop: hlo.Instruction, index: int) -> int | None:
  """The constant that a loop starts with at this place of its tuple."""
  start = computation.instructions[loop.operands[0]]
  if start.opcode != "tuple":
    return None
  kind, value = _source(computation, start.operands[index])
  return value if kind == "constant" else None


def _step(body: hlo.Computation, index: int) -> int | None:
  """By how much the counter grows in a round; a fused one by 1, as JAX's do."""
  if body.root.opcode != "tuple":
    return None
  grown = body.instructions[body.root.operands[index]]
  if grown.opcode != "add":
    return 1 if grown.opcode in ("fusion", "get-tuple-element", "copy") else None
  return dict(_source(body, operand) for operand in grown.operands).get("constant")
