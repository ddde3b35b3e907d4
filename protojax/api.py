"""Calls that join rooms: what `import protojax` offers beside its modules."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from protojax import errors, loading, metrics, pretrained, trees
from protojax.interop import importers, network, prototype_layouts, tensor_files
from protojax.metrics import diagnosis, loss_curve, measures, verdicts, wording
from protojax.prototypes import scoring
from protojax.reports import of_run, record
from protojax.training import checkpoint, export, loop

_BY_HAND = "embeddings=FILE.npy, [N, D], what comes out of the head just before the prototypes"
_LISTED = 10  # matrices of a file whose prototypes were not found


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
  """Trains a run, or goes on with it, and writes its report.

      config = protojax.config.debug(protojax.config.default("dino"))
      measures = protojax.train(config, "runs/first")

  Args:
    config: of a recipe or `protojax.config.default()`, not resolved.
    workdir: folder of this run, made if missing.

  Returns:
    The measures of the final state, as written to eval/final/result.json.

  Raises:
    errors.UserError: for a mistake in the config or the data; nothing is written then.
    errors.Interrupted: on SIGTERM, SIGHUP or Ctrl-C, after a checkpoint was written.
  """
  return loop.run(config, os.fspath(workdir), report=of_run.after_training)


def diagnose(
  what: Any,
  *,
  embeddings: Any = None,
  key: str | None = None,
  transpose: bool = False,
  which: str | None = None,
  data: str | None = None,
  data_dir: str | None = None,
  split: str | None = None,
  limit: int = 0,
  heads: int | None = None,
  step: int | None = None,
  rows: str | None = None,
  cosine: bool | None = None,
) -> diagnosis.Diagnosis:
  """Says what is wrong with prototypes, a run or a log; `print` it to read all of it.

  >>> import numpy as np
  >>> from protojax import api
  >>> found = api.diagnose(np.repeat(np.eye(16), 4, axis=0))
  >>> found.verdict.label, found.measures["collapse/unique_0.025"]
  ('partial prototype collapse', 0.25)

  Args:
    what: prototypes [K, D] (NumPy, JAX, or a tensor of PyTorch in the host's memory); or the path
      of a run's workdir or its exported/, of a checkpoint or a file of arrays (.pth, .pt, .ckpt,
      .safetensors, .npy, .npz), or of a log (metrics.jsonl, DINO's, DINOv2's, any text with
      losses).
    embeddings: [N, D], what comes out of the head just before the prototypes, or a file of it, to
      see which prototypes are used.
    key: of a file: the array that holds the prototypes, where its name says nothing.
    transpose: of a file: the prototypes in it are stored [D, K].
    which: of a file: "teacher" or "student"; None takes the teacher's where there is one.
    data: encodes images for the embeddings, of a run its own ("run") or "digits", "folder", the
      name of a TFDS data set. Of a file of another library, too, if its backbone, head and
      prototypes are of a known layout: those of DINO, iBOT (class tokens) and SwAV.
    data_dir, split: of the images; None takes the run's own and "train", which is all of a folder
      that is not divided.
    limit: images at most, evenly spread; 0 takes all.
    heads: of attention, of a file whose network `data` is run through; None: width / 64.
    step: checkpoint of a run; None takes the newest.
    rows: what the rows of a file's lone matrix are, where nothing in it says so: "prototypes", or
      "features" of images, which are described and not judged.
    cosine: of arrays and files: whether embeddings are compared with the directions of prototypes
      alone (True) or by products, in which norms count (False); None takes what the names in a file
      say, products where they say nothing.

  Raises:
    UserError: if there is no such thing, no prototypes are found, or an argument says nothing about
      this kind of thing.
  """
  arguments = {"embeddings": embeddings, "key": key, "transpose": transpose or None}
  arguments |= {"which": which, "data": data, "data_dir": data_dir, "split": split}
  arguments |= {"limit": limit or None, "heads": heads, "step": step, "rows": rows}
  arguments |= {"cosine": cosine}
  given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
  idle = next((name for name in ("data_dir", "split", "limit", "heads") if name in given), "")
  if idle and data is None:
    raise errors.UserError(f"{idle} says nothing without data: add data=run, or leave it out")
  if data is not None and embeddings is not None:
    raise errors.UserError("data and embeddings are two sources of embeddings: give one")
  if limit < 0:
    raise errors.UserError(f"limit={limit} must not be negative (0: all images)")
  examine: Callable[..., diagnosis.Diagnosis]
  allowed: tuple[str, ...]
  if not isinstance(what, str | os.PathLike):
    kind, examine, allowed = "an array", diagnosis.diagnose, ("embeddings", "cosine")
  else:
    what = pathlib.Path(what).expanduser()
    if not what.exists():
      raise errors.UserError(f"there is no {what}: give a workdir, a checkpoint or a log")
    beside = what.parent / "config.json"
    if what.name in ("encoder.safetensors", "prototypes.safetensors") and beside.is_file():
      what = what.parent  # of exported weights, which are one thing
    if what.is_dir():
      kind, examine = f"{what}, a workdir", _diagnose_run
      allowed = ("embeddings", "data", "data_dir", "split", "limit", "step")
    elif what.suffix not in tensor_files.SUFFIXES and _is_text(what):
      kind, examine, allowed = f"{what}, a log", _diagnose_log, ()
    else:
      kind, examine = f"{what}, a file of arrays", _diagnose_file
      allowed = ("embeddings", "key", "transpose", "which", "data", "data_dir", "split", "limit")
      allowed += ("heads", "rows", "cosine")
  for name in given:
    if name not in allowed:
      raise errors.UserError(f"{name} means nothing for {kind}: leave it out")
  if isinstance(embeddings, str | os.PathLike):
    given["embeddings"] = _embeddings(embeddings)
  return examine(what, **given)


def _is_text(path: pathlib.Path) -> bool:
  with open(path, "rb") as file:
    head = file.read(4096)
  try:
    head.decode()
  except UnicodeDecodeError as error:
    return error.start > len(head) - 4  # a character cut in two
  return b"\0" not in head and bool(head)


def _embeddings(path: str | os.PathLike) -> np.ndarray:
  """The one matrix of a file that is named as `protojax embed` names embeddings, or is alone."""
  arrays = tensor_files.read(path)
  name = next((name for name in ("embedding", "embeddings") if name in arrays), "")
  if not name and len(arrays) == 1:
    name = next(iter(arrays))
  if not name or name == "features" or arrays[name].ndim != 2:
    there = ", ".join(f"{key} {list(x.shape)}" for key, x in list(arrays.items())[:_LISTED])
    raise errors.UserError(
      f"embeddings={path}: no matrix [N, D] called embedding in it, there is {there}: name what "
      "comes out of the head just before the prototypes so, or give it alone (numpy.save)"
    )
  if len(arrays) > 1:
    logging.info("embeddings: %s %s of %s", name, list(arrays[name].shape), path)
  return arrays[name]


def _diagnose_file(
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
    layout = f"prototypes taken from {key}"
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
  lines = [f"file: {len(arrays)} array{'s' * (len(arrays) > 1)}, {layout}"]
  lines[0] += "".join(f"; weights of the {w}" for w in whose)
  lines += wording.bullets([not_finite] if not_finite else [])
  if not key:
    lines += wording.bullets([f"left out: {why}" for why in prototype_layouts.unusable(arrays)])
  lines += wording.bullets(_doubts(path, arrays, sets, transpose=transpose, embeddings=embeddings))
  told: list[str] = []
  of_layers: dict[str, Any] = {}
  features = None
  if images:
    of_layers, features, told = _arrays_of_file(path, which, transpose, **images)
    lines += told
  for_usage = _BY_HAND
  if not images and embeddings is None and not key:
    for_usage = _what_shows_use(path, which, transpose)
  found = {}
  for one in sets:
    of_set = of_layers.get(one.name, embeddings)
    found[one.name] = diagnosis.diagnose(
      one.weights(),
      embeddings=of_set,
      features=None if of_set is None else features,
      name=one.name,
      gain=one.gain,
      cosine=one.cosine if cosine is None else cosine,
      aliases=one.aliases,
      for_usage=for_usage,
    )
    found[one.name].result["key"] = one.key
  return diagnosis.joined(found, lines=lines, result={"kind": "file", "layout": layout})


def _doubts(
  path: pathlib.Path,
  arrays: Mapping[str, np.ndarray],
  sets: Sequence[prototype_layouts.Prototypes],
  *,
  transpose: bool,
  embeddings: Any,
) -> list[str]:
  """Sentences about matrices that may lie the other way round, [D, K].

  Raises:
    UserError: if one certainly does: the head before it, its gains or the embeddings say so.
  """
  shape = None if embeddings is None else np.shape(measures.as_array(embeddings))
  sentences = []
  for one in sets:
    rows, columns = one.matrix.shape
    why = prototype_layouts.turned(arrays, one)
    if shape and len(shape) == 2 and shape[1] == rows != columns:
      why = f"the embeddings have {rows:,} dimensions"
    to_do = "leave transpose=True out" if transpose else "give transpose=True"
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
      sentences.append(f"{one.name}: {why}: if they are stored {so}, {to_do}")
  return sentences


def _what_shows_use(path: pathlib.Path, which: str | None, transpose: bool) -> str:
  """What to give of another library's checkpoint to see which prototypes are used, in words."""
  try:
    there = bool(network.read(path, which=which, transpose=transpose).prototypes)
  except errors.UserError:
    there = False
  if not there:
    return f"{_BY_HAND}, for this file holds no network that leads up to them"
  run, by = "data=folder data_dir=IMAGES", "for this file holds the network that leads up to them"
  _, why = _network_of_file(path, which, transpose)
  if why and not _network_of_file(path, which, transpose, heads=1)[1]:
    run, why = f"{run} heads=NUMBER", ""  # it lacks nothing else
  if why:
    return f"{_BY_HAND}, for the network in this file cannot be run up to them: {why}"
  return f"{run}, {by}, or embeddings=FILE.npy"


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
    none = "it holds no projection head of DINO, iBOT or SwAV that ends where its prototypes begin"
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
    verdict = wording.not_finite(result["not_finite"], len(rows))
    sentences = [f"{verdict.label}: {verdict.sentence}"]
    lines[0] = f"file: one matrix, {_rows(len(rows))} of {rows.shape[1]} numbers"
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
  """What `_arrays_of_run` gives, of another library's checkpoint; sets by the file's names."""
  if data == "run":
    raise errors.UserError(f"data=run is for runs of protojax: name a data set for {path}")
  done, why = _network_of_file(path, which, transpose, heads)
  if done is None or why:
    to_do = "; save what comes out of the head as .npy and pass it as embeddings=FILE"
    if done is not None and done.not_finite:
      to_do = ": take an earlier or an undamaged copy"
    raise errors.UserError(f"data={data}: {path} cannot be run up to its prototypes: {why}{to_do}")
  model = loading.of_export(path, done.tensors, done.info, done.prototypes)
  found, features, told = _arrays_of_run(
    model, data=data, data_dir=data_dir, split=split, limit=limit
  )
  by_layer = {done.layers[name]: rows for name, rows in found.items()}
  return by_layer, features, [*told, *(f"  note: {note}" for note in done.notes)]


def _diagnose_run(
  folder: pathlib.Path, *, step: int | None = None, **images: Any
) -> diagnosis.Diagnosis:
  judged = record.verdict(folder) if (folder / "metrics.jsonl").exists() else None
  result: dict[str, Any] = {"kind": "run"}
  lines: list[str] = []
  if judged is not None:
    result["run"] = {**judged.verdict._asdict(), "step": judged.step, "since": judged.since}
    lines = _by_metrics(judged)
  verdict = judged and judged.verdict
  exported = (folder / "encoder.safetensors").is_file()
  if not exported and not checkpoint.steps(folder):
    if judged is None:
      raise errors.UserError(
        f"{folder} is a folder without checkpoints or metrics of a run of protojax: give a workdir "
        "or its exported/, or one file"
      )
    lines += wording.bullets(["there is no checkpoint yet whose prototypes could be examined"])
    return diagnosis.joined({}, lines=lines, result=result, verdict=verdict)
  model = loading.load(str(folder), step=step)
  not_finite = pretrained.not_finite(model)
  if exported and not model.prototypes:
    raise errors.UserError(
      f"{folder} holds an encoder without prototypes: its method, or the file that was converted, "
      "has none, or an older version exported it; give the workdir of the run or that file"
      + (f"; {not_finite}" if not_finite else "")
    )
  embeddings, features, told = _arrays_of_run(model, **images)
  lines += [
    *told,
    *wording.bullets([s for s in (not_finite, export.initialised(model.initialised)) if s]),
    ("exported weights" if exported else "checkpoint")
    + (f" of step {model.step:,}" if model.step is not None else "")
    + ", no prototypes" * (not model.prototypes),
  ]
  sets = {}
  for name, matrix in model.prototypes.items():
    cosine = True
    if exported and not scoring.even(one := model.variables[2][name]) and one.bias is None:
      # Of another library, whose prototypes learn lengths of their own: codes are by product.
      matrix, cosine = np.asarray(one.rows), False
    use: dict[str, float] = {}
    if judged is not None and embeddings.get(name) is None:
      use, said = _use_by_metrics(folder, name, model.step)
      lines += said
    sets[name] = diagnosis.diagnose(
      matrix,
      embeddings=embeddings.get(name),
      features=features,
      name=name,
      cosine=cosine,
      made=model.config.method.prototypes,
      for_usage="data=run or " * (not exported) + "data=folder data_dir=IMAGES",
      use=use,
      circumstances=(
        None
        if exported or model.step is None
        else verdicts.circumstances_of(model.config, model.step)
      ),
    )
    if use:
      sets[name].result["use_by_metrics"] = use
    sets[name].result["key"] = name
  return diagnosis.joined(sets, lines=lines, result=result, verdict=verdict)


def _use_by_metrics(
  folder: pathlib.Path, name: str, step: int | None
) -> tuple[dict[str, float], list[str]]:
  """(the use of a set that the run measured at `step`, {} if then it did not; lines to show)."""
  run = record.read([folder])[0]
  for end, by in (("", "its labelled images"), ("_sample", "its monitor's sample")):
    found: dict[str, dict[int, float]] = {}
    for which in ("", "_random", "_most"):
      steps, values = run.curve(f"collapse/{measures.tag(name)}used{end}{which}")
      found[f"collapse/used{end}{which}"] = dict(zip(steps.tolist(), values.tolist(), strict=True))
    if used := found[f"collapse/used{end}"]:
      at = step if step in used else max(used)
      line = f"  {name} used at step {at:,} by {by}: {used[at]:.1%}, by metrics.jsonl"
      return {k: v[at] for k, v in found.items() if at == step and at in v}, [line]
  return {}, []


def _by_metrics(judged: record.RunVerdict) -> list[str]:
  since = f" (since step {judged.since:,})" * (judged.since < judged.step)
  first = f"run: {judged.verdict.label} at step {judged.step:,}, by metrics.jsonl{since}"
  return [first, *wording.bullets([judged.verdict.sentence])]


def _arrays_of_run(
  model: pretrained.Trained,
  *,
  embeddings: Any = None,
  data: str | None = None,
  data_dir: str | None = None,
  split: str | None = None,
  limit: int = 0,
) -> tuple[dict[str, Any], Any, list[str]]:
  """(embeddings {set: [N, D]}, features [N, F] or None, lines that say of which images)."""
  if embeddings is not None:
    return dict.fromkeys(model.prototypes, embeddings), None, []
  if data is None or not model.prototypes:
    return {}, None, []
  if wrong := pretrained.not_finite(model):
    raise errors.UserError(f"data={data}: {model.path} cannot be run: {wrong}")
  name = None if data == "run" else data
  source = pretrained.source(model, split or "train", name=name, data_dir=data_dir)
  found = pretrained.encoded(model, source, parts=("features", "embeddings"), limit=limit)
  images = f"  images: {source.name}, {len(found['index']):,} of {len(source):,}"
  return found["embeddings"], found["features"]["last"], [images]


def _diagnose_log(path: pathlib.Path) -> diagnosis.Diagnosis:
  if path.name == "metrics.jsonl" and (path.parent / "config.json").exists():
    judged = record.verdict(path.parent)
    if judged is not None:
      result = {"kind": "run", "run": judged.verdict._asdict()}
      lines = _by_metrics(judged)
      return diagnosis.joined({}, lines=lines, result=result, verdict=judged.verdict)
  return loss_curve.diagnose(path)
