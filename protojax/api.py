"""Calls that join rooms: what `import protojax` offers beside its modules."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from protojax import errors, pretrained
from protojax.interop import prototype_layouts, tensor_files
from protojax.metrics import diagnosis, loss_curve
from protojax.reports import of_run, record
from protojax.training import loop

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
    errors.Interrupted: on SIGTERM or Ctrl-C, after a checkpoint was written.
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
  step: int | None = None,
) -> diagnosis.Diagnosis:
  """Says what is wrong with prototypes, a run or a log; `print` it to read all of it.

  >>> import numpy as np
  >>> from protojax import api
  >>> found = api.diagnose(np.repeat(np.eye(16), 4, axis=0))
  >>> found.verdict.label, found.measures["collapse/unique_0.025"]
  ('partial prototype collapse', 0.25)

  Args:
    what: prototypes [K, D] (NumPy, JAX, or a tensor of PyTorch in the host's memory); or the path
      of a run's workdir, of a checkpoint or a file of arrays (.pth, .pt, .ckpt, .safetensors, .npy,
      .npz), or of a log (metrics.jsonl, DINO's, DINOv2's, any text with losses).
    embeddings: [N, D], what comes out of the head just before the prototypes, or a file of it, to
      see which prototypes are used.
    key: of a file: the array that holds the prototypes, where its name says nothing.
    transpose: the array at `key` is [D, K].
    which: of a file: "teacher" or "student"; None takes the teacher's where there is one.
    data: of a run: encodes images for the embeddings, its own ("run") or "digits", "folder", the
      name of a TFDS data set.
    data_dir, split: of the images; None takes the run's own and "train".
    limit: images at most, evenly spread; 0 takes all.
    step: checkpoint of a run; None takes the newest.

  Raises:
    UserError: if there is no such thing, no prototypes are found, or an argument says nothing about
      this kind of thing.
  """
  arguments = {"embeddings": embeddings, "key": key, "transpose": transpose or None}
  arguments |= {"which": which, "data": data, "data_dir": data_dir, "split": split}
  arguments |= {"limit": limit or None, "step": step}
  given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
  idle = next((name for name in ("data_dir", "split", "limit") if name in given), "")
  if idle and data is None:
    raise errors.UserError(f"{idle} says nothing without data: add data=run, or leave it out")
  if data is not None and embeddings is not None:
    raise errors.UserError("data and embeddings are two sources of embeddings: give one")
  if limit < 0:
    raise errors.UserError(f"limit={limit} must not be negative (0: all images)")
  examine: Callable[..., diagnosis.Diagnosis]
  allowed: tuple[str, ...]
  if not isinstance(what, str | os.PathLike):
    kind, examine, allowed = "an array", diagnosis.diagnose, ("embeddings",)
  else:
    what = pathlib.Path(what).expanduser()
    if not what.exists():
      raise errors.UserError(f"there is no {what}: give a workdir, a checkpoint or a log")
    if what.is_dir():
      kind, examine = f"{what}, a workdir", _diagnose_run
      allowed = ("embeddings", "data", "data_dir", "split", "limit", "step")
    elif _is_text(what):
      kind, examine, allowed = f"{what}, a log", _diagnose_log, ()
    else:
      kind, examine = f"{what}, a file of arrays", _diagnose_file
      allowed = ("embeddings", "key", "transpose", "which")
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
  arrays = tensor_files.read(path)
  usual: tuple[str, ...] = ("embeddings", "features")
  named = [name for name in usual if name in arrays] or list(arrays)
  if arrays[named[0]].ndim != 2 or (len(arrays) > 1 and named[0] not in usual):
    raise errors.UserError(
      f"embeddings={path}: no matrix [N, D] of embeddings in it: save one with numpy.save"
    )
  return arrays[named[0]]


def _diagnose_file(
  path: pathlib.Path,
  *,
  embeddings: Any = None,
  key: str | None = None,
  transpose: bool = False,
  which: str | None = None,
) -> diagnosis.Diagnosis:
  arrays = tensor_files.read(path)
  matrices = prototype_layouts.candidates(arrays)
  if key is None and matrices and len(arrays) == 1:
    key = matrices[0][0]  # nothing to choose from
  if key:
    sets = [prototype_layouts.at(arrays, key, transpose)]
    layout = f"prototypes taken from {key}"
  else:
    sets = prototype_layouts.find(arrays, which)
    layout = f"names as in {prototype_layouts.kind(arrays, sets)}"
  if not sets:
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in matrices[:_LISTED]) or "none"
    more = f" and {len(matrices) - _LISTED} more" * (len(matrices) > _LISTED)
    raise errors.UserError(
      f"no prototypes found in {path}: {prototype_layouts.advice(arrays)}; its matrices: "
      f"{listed}{more}"
    )
  whose = sorted({prototype_layouts.owner(s.name) for s in sets} - {""})
  lines = [f"file: {len(arrays)} arrays, {layout}"]
  lines[0] += "".join(f"; weights of the {w}" for w in whose)
  if key and sets[0].matrix.shape[0] < sets[0].matrix.shape[1]:
    lines += diagnosis.bullets(["fewer rows than columns: if they are stored [D, K], transpose"])
  found = {}
  for one in sets:
    found[one.name] = diagnosis.diagnose(
      one.weights(),
      embeddings=embeddings,
      name=one.name,
      gain=one.gain,
      cosine=one.cosine,
      aliases=one.aliases,
    )
    found[one.name].result["key"] = one.key
  return diagnosis.joined(found, lines=lines, result={"kind": "file", "layout": layout})


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
  if not any((folder / "checkpoints").glob("[0-9]*")):
    if judged is None:
      raise errors.UserError(
        f"{folder} is a folder without checkpoints or metrics of a run of protojax: give a workdir "
        "or one file (exported weights hold no prototypes)"
      )
    lines += diagnosis.bullets(["there is no checkpoint yet whose prototypes could be examined"])
    return diagnosis.joined({}, lines=lines, result=result, verdict=verdict)
  model = pretrained.load(str(folder), step=step)
  embeddings, features, told = _arrays_of_run(model, **images)
  lines += [
    *told,
    f"checkpoint of step {model.step:,}" + ", no prototypes" * (not model.prototypes),
  ]
  sets = {}
  for name, matrix in model.prototypes.items():
    sets[name] = diagnosis.diagnose(
      matrix,
      embeddings=embeddings.get(name),
      features=features,
      name=name,
      cosine=True,
      made=model.config.method.prototypes,
    )
    sets[name].result["key"] = name
  return diagnosis.joined(sets, lines=lines, result=result, verdict=verdict)


def _by_metrics(judged: record.RunVerdict) -> list[str]:
  since = f" (since step {judged.since:,})" * (judged.since < judged.step)
  first = f"run: {judged.verdict.label} at step {judged.step:,}, by metrics.jsonl{since}"
  return [first, *diagnosis.bullets([judged.verdict.sentence])]


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
  name = None if data == "run" else data
  default = None if name == "folder" else "train"
  source = pretrained.source(model, split or default, name=name, data_dir=data_dir)
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
