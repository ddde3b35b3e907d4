"""One verdict on a run, in words its user can act on: `verdict`, or `of_run` for one of protojax.

Measures come by the names of metrics.jsonl. One that is missing (None or absent) takes part in no
rule and in no sentence.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from protojax import errors, trees
from protojax.metrics import collapses, idleness, rules
from protojax.metrics import measures as table

_SETTING = re.compile(r"\b(set|raise|lower) \w+\.\w")  # advice that a setting of ours follows


def is_alarm(verdict: rules.Verdict) -> bool:
  """Whether something is wrong: neither "ok" nor one of `rules.OPEN`."""
  return verdict.label not in ("ok", *rules.OPEN)


def judge(
  measures: Mapping[str, float | None],
  *,
  num_prototypes: int,
  step: int | None = None,
  grace_steps: int = 100,
  num_steps: int | None = None,
  settings: Mapping[str, object] | None = None,
  prototypes: str = "learned",
  alike: bool = False,
  already: Sequence[rules.Verdict] = (),
) -> rules.Verdict:
  """The first of these that holds, from certain to faint; the sentence names others that do too.

  non-finite, warming up, aliased teacher, dead projector, uniform collapse, one-hot collapse,
  representation collapse, cluster collapse, dimensional collapse, partial prototype collapse (or
  complete: all are one; or narrow cone: many near prototypes because the features are near),
  prototypes without direction; then what is no collapse: worse than at the start, prototypes bunch,
  unique but unused, nothing learned yet, little learned yet, worse than raw pixels.
  Where none holds it is one of `rules.OPEN`, or ok.

  An untrained net looks collapsed: its features are bunched, its centred targets uniform, its
  teacher equal to the student. So before `grace_steps` only values that are not finite count.

  Args:
    measures: {name in metrics.jsonl: value or None}; read are train/{loss, cross_entropy, ln_k,
      target_entropy}, collapse/{unique_0.025 and unique_0.25 (both
      also _random), no_direction, not_finite, drift, used, perplexity (both
      also of the sample), used_random, used_most, feature_std, mean_cosine, embedding_cosine,
      rankme, teacher_distance, relative_uniqueness}, probe/{knn, linear_fitted} and floor/{knn,
      knn_pixels, knn_untrained, knn_start, linear, linear_pixels, test_images, loss_start}.
      train/ln_k is both the loss of uniform predictions (the cross entropy, where that is one term
      of several) and the largest entropy of a target; without it uniform collapse is not seen.
    num_prototypes: K; 0 where a method has none.
    step: updates done; None where nobody knows: then there is no grace.
    grace_steps: steps without a verdict.
    num_steps: of the run; None where nobody knows. At its end every measure counts.
    settings: {"method.teacher_temp": value, ...} of the run; advice names no others, and does not
      tell to set what is set. None allows any.
    prototypes: `method.prototypes`, what the advice is for.
    alike: whether all prototypes are one and the same, which no measure tells.
    already: what was found by other means, which comes first.
  """
  already = [*already, *_rows_not_finite(measures)]
  if already:
    measures = {k: v for k, v in measures.items() if v is not None and math.isfinite(v)}
  bad = [k for k, v in measures.items() if v is not None and not math.isfinite(v)]
  if bad:
    return rules.Verdict(
      "non-finite",
      f"{', '.join(bad)} not finite: lower optim.lr, lengthen optim.warmup_steps, set optim.clip, "
      "or use precision=float32",
      True,
    )
  if not already and step is not None and step < grace_steps:
    return rules.Verdict("warming up", f"no verdict before step {grace_steps}", False)

  def advise(*changes):
    """ "lower a, raise b or set c=d" of the changes that this run can make."""
    known = [c for c in changes if settings is None or _can(c, settings)]
    return " or ".join([*([", ".join(known[:-1])] if known[:-1] else []), *known[-1:]])

  late = step is None or step >= rules.LIMITS["sample_grace"] * grace_steps
  ended = step is not None and step == num_steps
  longer = _longer_horizon(settings)
  found = list(already)
  found += collapses.found(measures, num_prototypes, step, late, prototypes, advise, longer, alike)
  found += idleness.found(measures, num_prototypes, late or ended, prototypes, advise, longer)
  if not found:
    label, why = _unseen(measures, num_prototypes)
    well = _well(measures, num_prototypes, prototypes)
    return rules.Verdict(label, "; ".join(filter(None, (why, well))), False)
  also = f" (also: {', '.join(v.label for v in found[1:])})" if found[1:] else ""
  if settings is None and _SETTING.search(found[0].sentence):  # maybe of another program
    also = f", by protojax's names of settings{also}"
  return rules.Verdict(found[0].label, found[0].sentence + also, any(v.collapsed for v in found))


def _rows_not_finite(measures) -> list[rules.Verdict]:
  """The verdict on sets of prototypes with rows that are not finite, whatever these have made."""
  for name, share in measures.items():
    if share and name.startswith("collapse/") and name.endswith("not_finite"):
      of_set = name.removeprefix("collapse/").removesuffix("not_finite")
      num = measures.get(f"collapse/{of_set}num_prototypes") or 0
      what = f"{of_set.replace('_', ' ')}prototypes"
      return [rules.not_finite(round(share * num), int(num), what)]
  return []


def _can(change: str, settings: Mapping[str, object]) -> bool:
  """Whether "lower a" or "set a=b" is something to do where these are the settings."""
  key, _, value = change.split()[1].partition("=")
  return key in settings and str(settings[key]) != value


def _longer_horizon(settings: Mapping[str, object] | None) -> str:
  """ "raise mixture.horizon_steps to 2,400 (from 1,200)": twice what it is, where that is known."""
  now = (settings or {}).get("mixture.horizon_steps")
  if not isinstance(now, int | float) or not now:
    return "raise mixture.horizon_steps to twice what it is"
  return f"raise mixture.horizon_steps to {2 * now:.0f} (from {now:.0f})"


def _unseen(measures, num_prototypes) -> tuple[str, str]:
  """("ok", ""), or one of `rules.OPEN` and what was not seen, where nothing ill was."""
  get = measures.get
  seen = [get(f"collapse/{name}") for name in ("rankme", "feature_std")]
  codes, unique = (
    rules.codes_in_use(measures, num_prototypes, sample=True),
    get(f"collapse/unique_{rules.HEADLINE}"),
  )
  if num_prototypes and codes is None and unique is not None:
    return "unique, use unknown", "whether they are used was not measured"
  if not any(v is not None for v in (*seen, codes, unique)):
    return "not judged", "nothing was measured yet that shows a collapse"
  if rules.knn_here(measures) is None:
    labelled = rules.knn_at_start(measures) is not None
    when = "is seen at the first k-NN" if labelled else "is seen with labelled images alone"
    return "no collapse", f"whether it learns {when}"
  if rules.saturated(measures):
    few = f"of {tested:.0f} test images" if (tested := get("floor/test_images")) else "of the test"
    start = rules.knn_at_start(measures)
    return "no collapse", (
      f"whether it learns cannot be seen: the net it started from has {start:.1%} {few} right; "
      "take more of them, or harder ones"
    )
  return "ok", ""


def _well(measures, num_prototypes, prototypes) -> str:
  get = measures.get
  entropy = get("train/target_entropy") if prototypes != "none" else None
  sets = rules.prototypes_in_words(measures) if prototypes != "none" else ""
  parts = (
    f"prototypes {sets}" if sets else "",
    rules.known(
      ("RankMe", get("collapse/rankme"), ".0f"),
      ("std", get("collapse/feature_std"), ".2f"),
      within="features {}",
    ),
    rules.known(("loss", get("train/loss"), ".2f"), ("target entropy", entropy, ".2f"))
    + (f" of {rules.most_entropy(measures, num_prototypes):.2f}" if entropy is not None else ""),
  )
  return "; ".join(filter(None, parts))


def verdict(measures: Mapping[str, float | None], *, step: int | None = None) -> rules.Verdict:
  """What these measures mean, and what to try: for any training code, at any time after its start.

  An untrained net looks collapsed, so give the updates done, or ask no earlier than some hundred.

  >>> import numpy as np
  >>> from protojax import metrics
  >>> copies = np.repeat(np.eye(16), 4, axis=0)
  >>> metrics.verdict(metrics.summary(prototypes=copies)).label
  'partial prototype collapse'

  Args:
    measures: from `metrics.summary`; beside them, if known, "train/loss", "train/ln_k" (ln K) and
      "train/target_entropy" (mean entropy of the targets, nats), "floor/loss_start" (loss of the
      first update), "probe/knn", "floor/knn_untrained" and "floor/knn_pixels" (accuracies, 0 to 1).
    step: updates done; None where nobody knows: then all counts.

  Raises:
    UserError: if nothing in it says how many prototypes there are, and all of it is finite.
  """
  known = {name: float(value) for name, value in measures.items() if value is not None}
  num = _num_prototypes(known)
  return judge(known, num_prototypes=num, step=step, prototypes="learned" if num else "none")


def _num_prototypes(measures: Mapping[str, float]) -> int:
  """K; 0 where features or a teacher were measured and no prototypes."""
  finite = {name: value for name, value in measures.items() if math.isfinite(value)}
  if "collapse/num_prototypes" in finite:
    return int(finite["collapse/num_prototypes"])
  if "train/ln_k" in finite:
    return round(math.exp(finite["train/ln_k"]))
  if len(finite) < len(measures):
    return 0  # it does not matter: that is the verdict
  of_sets = {f"collapse/{row.name}": row.of_sets for row in table.MEASURES}
  if False in map(of_sets.get, measures) and True not in map(of_sets.get, measures):
    return 0
  raise errors.UserError(
    'these measures do not say how many prototypes there are: add "collapse/num_prototypes", as '
    'metrics.summary(prototypes=...) does, or "train/ln_k"; of a loss without prototypes '
    "metrics.summary(features=...) is judged"
  )


def of_run(measures: Mapping[str, float | None], *, config, step: int) -> rules.Verdict:
  """`judge` for a run of protojax.

  Args:
    measures: {name in metrics.jsonl: value or None}.
    config: resolved; reads num_steps, optim.warmup_steps, method.* and the names.
    step: updates done.
  """
  circumstances = circumstances_of(config, step)
  return judge(measures, num_prototypes=config.method.num_prototypes, **circumstances)


def circumstances_of(config, step: int | None) -> dict[str, Any]:
  """What `judge` is told about a run of protojax beside its measures; see `of_run`."""
  # At a quarter of the warm-up the learning rate is high enough to have moved the net; a run so
  # short that this never comes is judged from its half on, but never before 100 updates.
  grace = max(100, min(config.optim.warmup_steps // 4, config.num_steps // 2))
  return {
    "step": step,
    "grace_steps": grace,
    "num_steps": config.num_steps,
    "settings": trees.flat(config),
    "prototypes": config.method.prototypes,
  }
