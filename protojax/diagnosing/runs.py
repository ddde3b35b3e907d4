"""A run, its exported weights or its log, diagnosed."""

import pathlib
from typing import Any

import numpy as np

from protojax import errors, loading, pretrained
from protojax.metrics import diagnosis, loss_curve, measures, rules, verdicts, wording
from protojax.prototypes import scoring
from protojax.reports import record
from protojax.training import checkpoint, export


def diagnose(
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
  embeddings, features, told = arrays(model, **images)
  if not_finite:
    verdict = rules.Verdict("non-finite", not_finite, True)
  broken = f"non-finite: {not_finite}" if not_finite else ""
  lines += [
    *told,
    *wording.bullets([s for s in (broken, export.initialised(model.initialised)) if s]),
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


def arrays(
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
    raise errors.UserError(
      f"data={data}: {model.path} cannot be run: {wrong}; without data the prototypes alone are "
      "judged"
    )
  name = None if data == "run" else data
  source = pretrained.source(model, split or "train", name=name, data_dir=data_dir)
  found = pretrained.encoded(model, source, parts=("features", "embeddings"), limit=limit)
  images = f"  images: {source.name}, {len(found['index']):,} of {len(source):,}"
  return found["embeddings"], found["features"]["last"], [images]


def diagnose_log(path: pathlib.Path) -> diagnosis.Diagnosis:
  if path.name == "metrics.jsonl" and (path.parent / "config.json").exists():
    judged = record.verdict(path.parent)
    if judged is not None:
      result = {"kind": "run", "run": judged.verdict._asdict()}
      lines = _by_metrics(judged)
      return diagnosis.joined({}, lines=lines, result=result, verdict=judged.verdict)
  return loss_curve.diagnose(path)
