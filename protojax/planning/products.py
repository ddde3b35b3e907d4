"""Operations of a compiled program's matrix products and convolutions, two a multiply-add."""

import math
import re

import numpy as np

from protojax.planning import hlo

_Counted = tuple[str, float]  # precision, "f32 x f32, highest"; operations


def count(computation: hlo.Computation, one: hlo.Instruction) -> _Counted | None:
  """(precision, operations) of an instruction; None where it is no product, or none that says so.

  Kernels are counted where they say what they compute: those of cuBLAS and cuDNN, and Pallas' with
  a cost estimate.

  Args:
    computation: where it stands.
    one: the instruction.
  """
  if one.opcode == "dot":
    summed = [int(d) for d in one.attribute("lhs_contracting_dims").split(",") if d]
    return _precision(computation, one), _dot(computation, one, summed)
  operands = [computation.instructions[name].shapes[0].dims for name in one.operands[:2]]
  if one.opcode == "convolution":
    return _precision(computation, one), _convolution(one, *operands, one.shapes[0].dims)
  if one.opcode != "custom-call":
    return None
  if one.target.startswith("__cublas$"):
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
    summed = [int(d) for d in re.findall(r"\d+", found[1])] if found else []
    return _precision(computation, one), _dot(computation, one, summed)
  if one.target.startswith("__cudnn$conv"):
    # Labels and window are those of the forward pass, whichever of its three arrays is the result.
    result = one.shapes[0].dims
    if one.target.endswith("BackwardInput"):
      operands = [result, operands[1], operands[0]]
    elif one.target.endswith("BackwardFilter"):
      operands = [operands[0], result, operands[1]]
    else:
      operands = [*operands, result]
    return _precision(computation, one), _convolution(one, *operands)
  if said := re.search(r'"cost_estimate":\{"flops":"?(\d+)', one.attributes):
    return _precision(computation, one), float(said[1])
  return None


def _precision(computation: hlo.Computation, one: hlo.Instruction) -> str:
  """ "bf16 x bf16", "f32 x f32, highest"."""
  types = " x ".join(computation.instructions[o].shapes[0].dtype for o in one.operands[:2])
  wanted = set(one.attribute("operand_precision").split(",")) & {"high", "highest"}
  if asked := re.search(r'"operand_precision":\["(HIGH|HIGHEST)"', one.attributes):
    wanted = {asked[1].lower()}
  # The higher of the two; what is bfloat16 already has no more digits to take.
  return f"{types}, {max(wanted, key=len)}" if wanted and "f32" in types else types


def _dot(computation: hlo.Computation, one: hlo.Instruction, summed: list[int]) -> float:
  left = computation.instructions[one.operands[0]].shapes[0].dims
  return 2.0 * math.prod(one.shapes[0].dims) * math.prod(left[d] for d in summed)


def _convolution(one: hlo.Instruction, left, right, out) -> float:
  """Of the taps that meet an element of the input; a TPU's batched products are convolutions of a
  dilated input."""
  of_left, of_right, of_out = re.split("_|->", one.attribute("dim_labels"))
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
  return 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")] * pairs


def _taps(size, taps, out, *, stride, pad, lhs_dilate, rhs_dilate) -> int:
  """Pairs (place of the result, tap) of one axis that meet an element of the input."""
  where = np.arange(out)[:, None] * stride + np.arange(taps)[None, :] * rhs_dilate - pad
  inside = (where >= 0) & (where <= (size - 1) * lhs_dilate)
  return int(np.sum(inside & (where % lhs_dilate == 0)))
