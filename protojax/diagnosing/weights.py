"""A file of arrays, diagnosed: anybody's checkpoint, or one matrix."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from protojax import errors, loading, metrics, trees
from protojax.diagnosing import runs
from protojax.interop import importers, network, prototype_layouts, tensor_files
from protojax.metrics import diagnosis, measures, rules, wording

_BY_HAND = "embeddings=FILE.npy, [N, D], what comes out of the head just before the prototypes"
_LISTED = 10  # matrices of a file whose prototypes were not found


def diagnose(
  path: pathlib.Path,
  *,
  embeddings: Any = None,
  key: str | None = None,
  transpose: bool = False,
  which: str | None = None,
  rows: str | None = None,
  cosine: bool | None = None,
  **images: Any,
) -> diagnosis.Diagnosis:
  arrays = tensor_files.read(path)
  matrices = prototype_layouts.candidates(arrays)
  if rows not in (None, "prototypes", "features"):
    raise errors.UserError(f"rows={rows} is unknown: choose prototypes or features")
  lone = matrices[0][0] if len(arrays) == len(matrices) == 1 else None
  if lone and not rows and lone == path.stem and "prototype" in lone.lower():
    rows = "prototypes"  # a .npy is named by its file alone
  if len(arrays) == 1 and not matrices and not prototype_layouts.find(arrays):
    (only,) = arrays.values()
    raise errors.UserError(
      f"{path} holds an array of {only.ndim} dimension{'s' * (only.ndim != 1)}, "
      f"{list(only.shape)} of {only.dtype.name}; "
      "prototypes are [K, D] of floating point numbers, at least two rows and columns"
    )
  if rows and lone is None:
    raise errors.UserError(
      f"rows={rows} is for a file of one matrix, and {path} holds {len(arrays)} arrays: name the "
      "one with the prototypes by key=NAME"
    )
  if images and len(arrays) == 1:
    raise errors.UserError(
      f"data={images['data']}: {path} holds one array and no network to encode images with: give "
      f"{_BY_HAND}"
    )
  if rows == "features" and (key or transpose or images or embeddings is not None):
    raise errors.UserError("rows=features are described only: leave the other arguments out")
  if key is None and lone and not images and not prototype_layouts.find(arrays):
    # Who names embeddings to compare with has said what the rows are.
    if rows == "features" or (rows is None and not transpose and embeddings is None):
      return _describe(arrays[lone], said=rows == "features")
    key = lone
  if key and images:
    raise errors.UserError(
      f"data and key={key}: images need the backbone and the head too, which key does not name: "
      f"leave key out where the file's own names say what is what, else give {_BY_HAND}"
    )
  if key:
    sets = [prototype_layouts.at(arrays, key, transpose)]
    layout = f"prototypes taken from {sets[0].key}"
  else:
    sets = prototype_layouts.find(arrays, which, transpose)
    layout = f"names as in {prototype_layouts.kind(arrays, sets)}"
  not_finite = trees.not_finite(arrays) if len(arrays) > 1 else ""
  if not sets:
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in matrices[:_LISTED]) or "none"
    more = f" and {len(matrices) - _LISTED} more" * (len(matrices) > _LISTED)
    raise errors.UserError(
      f"no prototypes found in {path}: {prototype_layouts.advice(arrays)}; its matrices: "
      f"{listed}{more}"
      + "; with key=NAME embeddings=FILE takes the place of data" * bool(images)
      + (f"; {not_finite}" if not_finite else "")
    )
  whose = sorted({prototype_layouts.owner(s.name) for s in sets} - {""})
  doubts, turned = _doubts(path, arrays, sets, transpose=transpose, embeddings=embeddings)
  if which is None and whose == ["student"]:
    which = "student"  # whose network leads up to them
    doubts = [*_teacher_without(arrays), *doubts]
  elif which is None and whose == ["teacher"] and not key:
    doubts = [*_beside_student(arrays, sets, transpose), *doubts]
  lines = [f"file: {len(arrays)} array{'s' * (len(arrays) > 1)}, {layout}"]
  lines[0] += "".join(f"; weights of the {w}" for w in whose)
  broken = wording.tensors_not_finite(not_finite) if not_finite else None
  if not key:
    lines += wording.bullets([f"left out: {why}" for why in prototype_layouts.unusable(arrays)])
  lines += wording.bullets(doubts)
  told: list[str] = []
  of_layers: dict[str, Any] = {}
  features = None
  if images:
    of_layers, features, told = _arrays_of_file(path, which, transpose, **images)
    lines += told
  for_usage, led_up_to = _BY_HAND, list(of_layers)
  if not images and embeddings is None and "embedding" in arrays:  # as `embed` names them
    shape = list(arrays["embedding"].shape)
    for_usage = f"embeddings={path}, which holds an array embedding {shape}"
  elif not images and embeddings is None and not key:
    for_usage, led_up_to = _what_shows_use(path, which, transpose)
  if embeddings is not None and len(sets) > 1:
    lines.append(
      f"all {len(sets)} sets are compared with the same embeddings, which come out of one head: "
      "of the sets of other heads, what is said of use means nothing; key=NAME takes one set"
    )
  found = {}
  for one in sets:
    of_set = of_layers.get(one.name, embeddings)
    led_up = not led_up_to or not {one.name, *one.aliases}.isdisjoint(led_up_to)
    found[one.name] = diagnosis.diagnose(
      one.weights(),
      embeddings=of_set,
      features=None if of_set is None else features,
      name=one.name,
      gain=one.gain,
      cosine=one.cosine if cosine is None else cosine,
      aliases=one.aliases,
      for_usage=for_usage
      if led_up
      else f"{_BY_HAND}, for the file's network leads up to {' and '.join(led_up_to)} alone",
    )
    found[one.name].result["key"] = one.key
    if one.name in turned:
      found[one.name].sentences.append(turned[one.name])  # part of the result, too
      found[one.name].lines.extend(wording.bullets([turned[one.name]]))
  result = {"kind": "file", "layout": layout}
  one = diagnosis.joined(found, lines=lines, result=result, verdict=broken)
  if broken:
    one.lines.extend(["", *wording.bullets([f"{broken.label}: {broken.sentence}"])])
  return one


def _doubts(
  path: pathlib.Path,
  arrays: Mapping[str, np.ndarray],
  sets: Sequence[prototype_layouts.Prototypes],
  *,
  transpose: bool,
  embeddings: Any,
) -> tuple[list[str], dict[str, str]]:
  """(sentences about rows of zeros, {set: advice where it may lie the other way round, [D, K]}).

  Raises:
    UserError: if one certainly does: the head before it, its gains or the embeddings say so.
  """
  shape = () if embeddings is None else np.shape(measures.as_array(embeddings))
  sentences, maybe = [], {}
  for one in sets:
    rows, columns = one.matrix.shape
    why = prototype_layouts.turned(arrays, one)
    to_do = "leave transpose=True out" if transpose else "give transpose=True"
    if not why and len(shape) == 2 and shape[1] == rows != columns:
      why = f"the embeddings have {rows:,} dimensions"
      if shape[0] == columns:
        to_do += ", or transpose the embeddings where those are columns, [D, N]"
    so = "[K, D]" if transpose else "[D, K]"
    if why:
      turned = " transposed" if transpose else ""
      raise errors.UserError(
        f"{one.key} in {path}{turned} is {rows} x {columns}, and {why}: it is stored {so}: {to_do}"
      )
    before = prototype_layouts.head_width(arrays, one)
    backbone = {array.shape[-1] for name, array in arrays.items() if name.endswith("cls_token")}
    if before is None and backbone == {rows} != {columns}:
      why = f"as many rows, {rows:,}, as the backbone has dimensions"
    elif rows < columns != before:
      why = f"fewer rows than columns, {rows:,} and {columns:,}"
    if why:
      maybe[one.name] = (
        f"{why}: if they are stored {so}, {to_do}: the verdict is on the wrong rows then"
      )
    if one.gain is not None and (zeros := int(np.sum(~np.any(one.matrix, axis=1)))):
      sentences.append(
        f"{one.name}: {_rows(zeros)} of zeros in the file; weight normalisation makes 0 / 0 of "
        "them: not finite, below"
      )
  return sentences, maybe


def _teacher_without(arrays: Mapping[str, np.ndarray]) -> list[str]:
  """A sentence on the teacher of a file in which only the student has prototypes."""
  teacher = {k: array for k, array in arrays.items() if prototype_layouts.owner(k) == "teacher"}
  if not teacher:
    return []
  why = prototype_layouts.without(teacher) or "there are none by its name"
  return [f"of the student, not of the teacher that is in the file, too: {why}"]


def _beside_student(
  arrays: Mapping[str, np.ndarray],
  teachers: Sequence[prototype_layouts.Prototypes],
  transpose: bool,
) -> list[str]:
  """A sentence on the student's prototypes of a file whose teacher's are judged."""
  own = {name: x for name, x in arrays.items() if prototype_layouts.owner(name) == "student"}
  students = prototype_layouts.find(own, "student", transpose)
  if not students:
    return []
  pairs = zip(teachers, students, strict=False)
  same = all(np.array_equal(one.weights(), other.weights()) for one, other in pairs)
  if same and len(teachers) == len(students):
    return ["the student's prototypes in the file are equal to these to the bit"]
  return ["the student's prototypes in the file differ from these: which=student judges them"]


def _what_shows_use(
  path: pathlib.Path, which: str | None, transpose: bool
) -> tuple[str, list[str]]:
  """(what to give of another library's checkpoint to see which prototypes are used, in words; the
  sets to which its network leads up, [] where it cannot be run)."""
  try:
    there = bool(network.read(path, which=which, transpose=transpose).prototypes)
  except errors.UserError:
    there = False
  if not there:
    return f"{_BY_HAND}, for this file holds no network that leads up to them", []
  run, by = "data=folder data_dir=IMAGES", "for this file holds the network that leads up to them"
  done, why = _network_of_file(path, which, transpose)
  if why:
    with_heads, still = _network_of_file(path, which, transpose, heads=1)
    if not still:  # it lacks nothing else
      done, run, why = with_heads, f"{run} heads=NUMBER", ""
  if done is None or why:
    return f"{_BY_HAND}, for the network in this file cannot be run up to them: {why}", []
  return f"{run}, {by}, or embeddings=FILE.npy", list(done.layers.values())


def _network_of_file(
  path: pathlib.Path, which: str | None, transpose: bool, heads: int | None = None
) -> tuple[importers.Converted | None, str]:
  """(the network of another library's checkpoint, why it cannot be run or "")."""
  try:
    done = importers.convert(path, which=which, heads=heads, transpose=transpose)
  except errors.UserError as error:
    return None, str(error)
  if done.not_finite:
    return done, done.not_finite
  if lacks := importers.missing(done):
    return done, f"{lacks[0]} is missing" + f" and {len(lacks) - 1} more" * (len(lacks) > 1)
  if done.unexpected:
    return done, f"{done.unexpected[0]} does not fit the layout"
  if not done.prototypes:
    kinds = "DINO, iBOT, DINOv2 or SwAV"
    none = f"it holds no projection head of {kinds} that ends where its prototypes begin"
    return done, done.without or none
  return done, ""


def _rows(count: int) -> str:
  return f"{count:,} row{'s' * (count != 1)}"


def _describe(matrix: np.ndarray, *, said: bool) -> diagnosis.Diagnosis:
  """A matrix of features, or of what nobody said, in numbers and without a verdict."""
  rows = np.asarray(matrix, np.float32)
  norms = np.linalg.norm(rows, axis=1)
  result: dict[str, Any] = {"kind": "matrix", "rows": len(rows), "dim": rows.shape[1]}
  result["not_finite"] = int(np.sum(~np.isfinite(norms)))
  lines = [f"file: one matrix, {_rows(len(rows))} of {rows.shape[1]} numbers, not judged"]
  measured: dict[str, float] = {}
  verdict = None
  sentences: list[str] = []
  if result["not_finite"]:
    verdict = rules.not_finite(result["not_finite"], len(rows))
    sentences = [f"{verdict.label}: {verdict.sentence}"]
    lines[0] = f"file: one matrix, {_rows(len(rows))} of {rows.shape[1]} numbers"
  elif not rows.any():
    sentences = ["all rows are zero: whatever made them gives nothing"]
  else:
    measured = metrics.summary(features=rows)
    result |= {"norm": [float(norms.min()), float(norms.max())], "measures": measured}
    lines.append(f"  norm, least / most: {norms.min():.4g} / {norms.max():.4g}")
    lines += [f"  {name.partition('/')[2]}: {value:.4g}" for name, value in measured.items()]
  sentences += [
    "features of images are described only: it is prototypes that are judged"
    if said
    else "nothing in the file says whether its rows are prototypes or features of images, and to "
    "features the verdict on prototypes does not apply: give rows=prototypes to have them judged"
  ]
  lines += wording.bullets(sentences)
  result["diagnosis"] = sentences
  return diagnosis.Diagnosis(verdict, measured, sentences, result, lines)


def _arrays_of_file(
  path: pathlib.Path,
  which: str | None,
  transpose: bool,
  *,
  data: str,
  data_dir: str | None = None,
  split: str | None = None,
  limit: int = 0,
  heads: int | None = None,
) -> tuple[dict[str, Any], Any, list[str]]:
  """What `runs.arrays` gives, of another library's checkpoint; sets by the file's names."""
  if data == "run":
    raise errors.UserError(f"data=run is for runs of protojax: name a data set for {path}")
  done, why = _network_of_file(path, which, transpose, heads)
  if done is None or why:
    to_do = "; save what comes out of the head as .npy and pass it as embeddings=FILE"
    if done is not None and done.not_finite:
      to_do = ": take an earlier or an undamaged copy"
    raise errors.UserError(
      f"data={data}: {path} cannot be run up to its prototypes: {why}{to_do}; without data the "
      "prototypes alone are judged"
    )
  model = loading.of_export(path, done.tensors, done.info, done.prototypes)
  found, features, told = runs.arrays(model, data=data, data_dir=data_dir, split=split, limit=limit)
  by_layer = {done.layers[name]: rows for name, rows in found.items()}
  return by_layer, features, [*told, *(f"  note: {note}" for note in done.notes)]
