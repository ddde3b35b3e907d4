"""Where other people's checkpoints keep their prototypes: from {name: array} to matrices [K, D].

Names as in the public code of DINO, iBOT, DINOv2, DINOv3, MSN, SwAV and CARP, under any prefix, so
that wrapped ("module.") and Lightning ("state_dict.") files are read as well.
"""

import difflib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from protojax import errors

# Of a weight-normalised layer w = g v / |v| the directions are v; names of PyTorch before and
# after parametrizations.
_GAINS = {
  ".weight_v": ".weight_g",
  ".parametrizations.weight.original1": ".parametrizations.weight.original0",
}
_LAYER = re.compile(
  r"(?P<stem>(.*[._])?(last_layer2?|prototypes(\.(prototypes|heads\.))?\d*))"
  r"(?P<part>\.weight_v|\.parametrizations\.weight\.original1|\.weight|)"
)
# A layer of a projection head, with its place in the sequence.
_BEFORE = re.compile(
  r"(.+\.)?(head|dino_head|ibot_head|projection_head)\.(mlp\.)?(?:(?P<place>\d+)\.)?weight"
)
_SHOWN = 3  # names of a head's layers that a message shows
# Words in a name that say whose average it is.
_TEACHER, _STUDENT = {"teacher", "momentum", "target", "ema"}, {"student", "online", "query"}


class Prototypes(NamedTuple):
  """One set of prototypes, as it is stored.

  Attributes:
    name: of the layer.
    key: of the array in the file.
    matrix: [K, D], any float dtype.
    gain: [K], factor of every direction of a weight-normalised layer; None for a plain one.
    cosine: whether the method compares features with directions, whatever their norm.
    aliases: names of layers that hold the same numbers (tied heads).
  """

  name: str
  key: str
  matrix: np.ndarray
  gain: np.ndarray | None = None
  cosine: bool = False
  aliases: tuple[str, ...] = ()

  def weights(self) -> np.ndarray:
    """Rows as features meet them: directions times gains, or as they are stored, float32 [K, D]."""
    rows = np.array(self.matrix, np.float32)
    if self.gain is None:
      return rows
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):  # a row of zeros has no direction: NaN
      return rows * (np.asarray(self.gain, np.float32)[:, None] / norms)


def _is_float(array: np.ndarray) -> bool:
  return array.dtype.kind == "f" or "float" in array.dtype.name  # bfloat16 has the kind V


def _matrix(array: np.ndarray) -> np.ndarray | None:
  """[K, D], also of a 1 x 1 convolution [K, D, 1, 1]; None if it is no matrix of numbers."""
  if array.ndim < 2 or not _is_float(array) or any(n != 1 for n in array.shape[2:]):
    return None
  return array.reshape(array.shape[:2]) if min(array.shape[:2]) > 1 else None


def _set(arrays: Mapping[str, np.ndarray], key: str, matrix: np.ndarray) -> Prototypes:
  """The set at `key`, with the gain beside it if there is one."""
  for part, gain_part in _GAINS.items():
    gain = arrays.get(key.removesuffix(part) + gain_part)
    if key.endswith(part) and gain is not None and gain.size == len(matrix):
      return Prototypes(key.removesuffix(part), key, matrix, gain.reshape(-1))
  name = key.removesuffix(".weight")
  return Prototypes(name, key, matrix, cosine="prototypes" in name)


def layer(one: Prototypes) -> str:
  """The name of the layer of a set that `find` has found, without those of its arrays."""
  found = _LAYER.fullmatch(one.key)
  return found["stem"] if found else one.name


def owner(name: str) -> str:
  """Says whose weights these are by the words in a name: "teacher", "student" or ""."""
  words = set(re.split(r"[._]", name))
  return "teacher" if words & _TEACHER else "student" if words & _STUDENT else ""


def _untied(sets: list[Prototypes]) -> list[Prototypes]:
  """Every set of numbers once, under its first name."""
  out: list[Prototypes] = []
  for one in sets:
    for i, other in enumerate(out):
      if one.matrix.shape == other.matrix.shape and np.array_equal(one.matrix, other.matrix):
        out[i] = other._replace(aliases=(*other.aliases, one.name))
        break
    else:
      out.append(one)
  return out


def find(
  arrays: Mapping[str, np.ndarray], which: str | None = None, transpose: bool = False
) -> list[Prototypes]:
  """The sets of prototypes that are called as in public code.

  Args:
    arrays: of a file, by name.
    which: "teacher" or "student"; None takes the teacher's where the file says whose are whose,
      else all there are.
    transpose: of matrices [D, K].

  Returns:
    In the order of the file; [] if there are none. Two layers with the same numbers are one set.

  Raises:
    UserError: if those are not there, but others are.
  """
  sets = []
  for key, array in arrays.items():
    match, matrix = _LAYER.fullmatch(key), _matrix(array)
    if match and matrix is not None and (match["part"] or "prototypes" in match["stem"]):
      sets.append(_set(arrays, key, matrix.T if transpose else matrix))
  teachers = [s for s in sets if owner(s.name) == "teacher"]
  others = [s for s in sets if owner(s.name) != "teacher"]
  chosen = {None: teachers or others, "teacher": teachers, "student": others}[which]
  if sets and not chosen:
    raise errors.UserError(
      f"which={which}: by its name, {sets[0].name} is not the {which}'s, and there are no other "
      "prototypes in this file: leave it out"
    )
  return _untied(chosen)


def at(arrays: Mapping[str, np.ndarray], key: str, transpose: bool = False) -> Prototypes:
  """The set of prototypes that the user names.

  Args:
    arrays: of a file, by name.
    key: of a matrix [K, D], weight-normalised if its gain is beside it; or the name of its layer,
      as the doctor prints it.
    transpose: of a matrix [D, K].

  Raises:
    UserError: if there is no such matrix of floating point numbers.
  """
  layer_of = (key + part for part in (*_GAINS, ".weight"))
  key = next((name for name in (key, *layer_of) if name in arrays), key)
  if key not in arrays:
    # Of one letter any other letter is as near.
    near = difflib.get_close_matches(key, [name for name in arrays if len(name) > 1], 1, 0)
    raise errors.UserError(
      f"key={key}: no such array" + (f"; did you mean {near[0]}?" if near else " in this file")
    )
  matrix = _matrix(arrays[key])
  if matrix is None:
    raise errors.UserError(
      f"key={key}: {arrays[key].dtype.name} {list(arrays[key].shape)} is no matrix of floating "
      "point numbers with at least two rows and columns"
    )
  return _set(arrays, key, matrix.T if transpose else matrix)


def head_width(arrays: Mapping[str, np.ndarray], one: Prototypes) -> int | None:
  """What the projection head before a set of prototypes ends in, its D; None if there is none."""
  above = re.split("last_layer|prototypes", one.key)[0]
  layers = {}
  for name, array in arrays.items():
    found = _BEFORE.fullmatch(name)
    if found and _is_head(name, array) and name.startswith(above):
      layers[int(found["place"] or 0)] = array.shape[0]
  return layers[max(layers)] if layers else None


def turned(arrays: Mapping[str, np.ndarray], one: Prototypes) -> str | None:
  """Why a set is certainly [D, K] and not [K, D], in words; None where the file does not say so.

  Args:
    arrays: of a file, by name.
    one: of `find`, or of `at` by a name that `find` knows.
  """
  if not _LAYER.fullmatch(one.key):
    return None
  rows, columns = one.matrix.shape
  for part, gain_part in _GAINS.items():
    gain = arrays.get(one.key.removesuffix(part) + gain_part)
    if one.key.endswith(part) and gain is not None and gain.size == columns != rows:
      return f"{columns:,} gains lie beside it, one a prototype"
  if (width := head_width(arrays, one)) is not None and width == rows != columns:
    return f"the head before it ends in {width:,} dimensions"
  return None


def candidates(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, tuple[int, int]]]:
  """Lists the matrices of floating point numbers: (name, shape), those with the most rows first."""
  matrices = [(name, _matrix(array)) for name, array in arrays.items() if array.ndim == 2]
  found = [(name, matrix.shape) for name, matrix in matrices if matrix is not None]
  return sorted(found, key=lambda item: -item[1][0])


def unusable(arrays: Mapping[str, np.ndarray]) -> list[str]:
  """What is called as prototypes are and cannot be some, with the reason, one text each."""
  out = []
  for name, array in arrays.items():
    found = _LAYER.fullmatch(name)
    if not (found and (found["part"] or "prototypes" in found["stem"])):
      continue
    if not _is_float(array):
      out.append(f"{name} is {array.dtype.name}, not float")
    elif _matrix(array) is None:
      out.append(f"{name} is {list(array.shape)}, no matrix [K, D]")
  return out


def without(arrays: Mapping[str, np.ndarray]) -> str:
  """Why there are no prototypes behind a projection head, in words; "" where there is no head.

  Args:
    arrays: of a file in which `find` finds none, by name.
  """
  if bad := unusable(arrays):
    return "; ".join(bad)
  head = [name for name, array in arrays.items() if _is_head(name, array)]
  if not head:
    return ""
  more = ", ..." * (len(head) > _SHOWN)
  return (
    "the head's last layer, whose rows are the prototypes, is missing (there are "
    f"{', '.join(head[:_SHOWN])}{more})"
  )


def _is_head(name: str, array: np.ndarray) -> bool:
  """Whether an array is a linear layer of a projection head, by its name."""
  found = _BEFORE.fullmatch(name)
  classifier = found and found[2] == "head" and not (found[3] or found["place"])
  return bool(found) and not classifier and array.ndim == 2


def kind(arrays: Mapping[str, np.ndarray], sets: list[Prototypes]) -> str:
  """Whose layout this looks like, in words; by names only, so it may be wrong."""
  layers = " ".join(s.name + " " + " ".join(s.aliases) for s in sets)
  if "dino_head" in layers or "ibot_head" in layers:
    return "DINOv3" if all(s.gain is None for s in sets) else "DINOv2"
  if "last_layer2" in layers:
    return "iBOT"
  if "last_layer" in layers:
    return "DINO (or CARP, whose names are the same)"
  if any(name.startswith("target_encoder") for name in arrays):
    return "MSN"
  return "SwAV" if "prototypes" in layers else "unknown"


def advice(arrays: Mapping[str, np.ndarray]) -> str:
  """What to do about a file without known prototypes, one sentence."""

  def has(pattern):
    return any(re.search(pattern, name) for name in arrays)

  if has(r"^params\.backbone\."):
    return (
      "weights that protojax exported hold the encoder without its prototypes: give the workdir of "
      "the run"
    )
  if unusable(arrays):
    return f"{without(arrays)}: save it as a float32 matrix [K, D], or give key=NAME of another"
  if why := without(arrays):
    return (
      f"{why}: take a checkpoint that holds it (last_layer or prototypes), or give key=NAME if "
      "another of its matrices is the one"
    )
  if has(r"(^|\.)(register_tokens|storage_tokens)$|\.ls1\.gamma$"):
    return (
      "this is a backbone of DINOv2 or DINOv3, whose heads and prototypes were never released "
      "(dinov2#435, dinov3#203): only files of your own training (teacher.dino_head.last_layer) "
      "hold some"
    )
  if has(r"(^|\.)(patch_embed\.proj\.weight|layer1\.0\.conv1\.weight)$|encoder\.layer\."):
    return (
      "this is a backbone without the head, as most downloads are: take the full checkpoint "
      '("full ckpt" in the tables of DINO and iBOT, with student and teacher in it), or give '
      "key=NAME if one of its matrices is the one"
    )
  return (
    "no layer here is called as in DINO, iBOT, DINOv2, DINOv3, MSN, SwAV or CARP: give key=NAME of "
    "the one with the prototypes"
  )
