"""One verdict on a run, in words its user can act on: `verdict`, or `of_run` for one of protojax.

Measures come by the names of metrics.jsonl. One that is missing (None or absent) takes part in no
rule and reads n/a.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from protojax import errors, trees
from protojax.metrics import collapse
from protojax.metrics import measures as table

# What separates ill from well, each with its reason.
LIMITS = {
  # A loss within this of ln K, in nats, is ln K. Untrained nets start .17 and more above it and a
  # healthy run crosses it on its way down with sharp targets, hence the second and third.
  "loss_at_chance": 0.02,
  "teacher_uniform": 0.05,  # nats below the largest entropy: a target that says nothing
  "loss_at_chance_alone": 0.005,  # where nobody measured the entropy: 8.318 and not 8.3
  "teacher_one_hot": 0.1,  # of the largest entropy; healthy targets may be this sharp, hence:
  "codes_one_hot": 1.5,  # codes in use: all images have one and the same
  "codes_clusters": 4.0,  # below it a code says less than two bits, whatever K (at most K / 8)
  # Grace periods until the monitor's sample alone may show it: slow starts have 2 or 3 codes after
  # 100 steps and 13 or more after 220 (Self-Classifier, SwAV with a mixture; docs/collapse.md).
  "sample_grace": 5,
  # Directions uniform on the sphere give 1, untrained ViTs .13 (digits, mean cosine .98) to .73.
  "feature_std": 0.02,
  # One minus the mean cosine of what the head gives, at the rounding of float32: nothing gets
  # through it. The tightest run seen that was not dead had 2e-5.
  "dead_head": 2e-6,
  # RankMe is not centred: an untrained ViT on digits has 2.9 from its common offset alone.
  "rankme": 2.0,
  # Features that are spread have no offset to blame: fewer directions than half of ten classes.
  "rankme_spread": 5.0,
  "feature_std_spread": 0.5,
  # Copies beyond those of random prototypes, share of K. Decoupled prototypes have under .001
  # (CAPI, arXiv 2510.20108), joint ones .9; a tenth of all is worth a warning.
  "copies": 0.1,
  # Prototype spacing over feature spread: copies give 0, equal spacing about 1.
  "relative_uniqueness": 0.5,
}
HEADLINE = collapse.THRESHOLDS[0]  # cosine distance of the one uniqueness that is always shown


class Verdict(NamedTuple):
  """Attributes:
  label: a few words, "ok" if all is well.
  sentence: what was seen and what to try, one line.
  collapsed: whether `verdicts.stop_on_collapse` should end the run.
  """

  label: str
  sentence: str
  collapsed: bool


def _show(value: float | None, form: str) -> str:
  return "n/a" if value is None else format(value, form)


def _prototypes(measures: Mapping[str, float | None]) -> str:
  """Uniqueness, and beside it everything without which it says nothing."""
  get = measures.get
  return (
    f"unique {_show(get(f'collapse/unique_{HEADLINE}'), '.0%')} "
    f"(random ones {_show(get(f'collapse/unique_{HEADLINE}_random'), '.0%')}, "
    f"moved to cosine {_show(get('collapse/drift'), '.2f')}), "
    f"used {_show(table.BY_NAME['used'].value(measures), '.0%')}, "
    f"perplexity {_show(get('collapse/perplexity'), '.0f')}"
  )


def _codes(
  measures: Mapping[str, float | None], num_prototypes: int, *, sample: bool
) -> float | None:
  """Codes in use, by the strictest measure there is; with `sample` also of the monitor's sample."""
  known = []
  for end in ("", "_sample") if sample else ("",):
    for name, scale in (("used", num_prototypes), ("perplexity", 1.0)):
      value = measures.get(f"collapse/{name}{end}")
      if value is not None:
        known.append(value * scale)
  return min(known, default=None)


def judge(
  measures: Mapping[str, float | None],
  *,
  num_prototypes: int,
  step: int | None = None,
  grace_steps: int = 100,
  settings: Mapping[str, object] | None = None,
  prototypes: str = "learned",
) -> Verdict:
  """The first of these that holds, from certain to faint; the sentence names others that do too.

  non-finite, warming up, aliased teacher, dead projector, uniform collapse, one-hot collapse,
  representation collapse, cluster collapse, dimensional collapse, partial prototype collapse (or
  narrow cone: many near prototypes because the features are near), ok.

  An untrained net looks collapsed: its features are bunched, its centred targets uniform, its
  teacher equal to the student. So before `grace_steps` only values that are not finite count.

  Args:
    measures: {name in metrics.jsonl: value or None}; read are train/{loss, cross_entropy, ln_k,
      target_entropy} and collapse/{unique_0.025, unique_0.025_random, drift, used, used_sample,
      perplexity, perplexity_sample, feature_std, mean_cosine, embedding_cosine, rankme,
      teacher_distance, relative_uniqueness}.
      train/ln_k is both the loss of uniform predictions (the cross entropy, where that is one term
      of several) and the largest entropy of a target; without it uniform collapse is not seen.
    num_prototypes: K; 0 where a method has none.
    step: updates done; None where nobody knows: then there is no grace.
    grace_steps: steps without a verdict.
    settings: {"method.teacher_temp": value, ...} of the run; advice names no others, and does not
      tell to set what is set. None allows any.
    prototypes: `method.prototypes`, what the advice is for.
  """
  bad = [k for k, v in measures.items() if v is not None and not math.isfinite(v)]
  if bad:
    return Verdict(
      "non-finite",
      f"{', '.join(bad)} not finite: lower optim.lr, lengthen optim.warmup_steps, set optim.clip, "
      "or use precision=float32",
      True,
    )
  if step is not None and step < grace_steps:
    return Verdict("warming up", f"no verdict before step {grace_steps}", False)

  def advise(*changes):
    """ "lower a, raise b or set c=d" of the changes that this run can make."""
    known = [c for c in changes if settings is None or _can(c, settings)]
    return " or ".join([*([", ".join(known[:-1])] if known[:-1] else []), *known[-1:]])

  late = step is None or step >= LIMITS["sample_grace"] * grace_steps
  found = list(_findings(measures, num_prototypes, step, late, prototypes, advise))
  if not found:
    return Verdict("ok", _well(measures, num_prototypes, prototypes), False)
  also = f" (also: {', '.join(v.label for v in found[1:])})" if found[1:] else ""
  return Verdict(found[0].label, found[0].sentence + also, any(v.collapsed for v in found))


def _can(change: str, settings: Mapping[str, object]) -> bool:
  """Whether "lower a" or "set a=b" is something to do where these are the settings."""
  key, _, value = change.split()[1].partition("=")
  return key in settings and str(settings[key]) != value


def _most(measures, num_prototypes) -> float:
  """The largest entropy that a target can have, nats."""
  return measures.get("train/ln_k") or math.log(max(num_prototypes, 2))


def _well(measures, num_prototypes, prototypes) -> str:
  get = measures.get
  features = (
    f"features RankMe {_show(get('collapse/rankme'), '.0f')}, "
    f"std {_show(get('collapse/feature_std'), '.2f')}; loss {_show(get('train/loss'), '.2f')}"
  )
  if prototypes == "none":
    return features
  return (
    f"prototypes {_prototypes(measures)}; {features}, target entropy "
    f"{_show(get('train/target_entropy'), '.2f')} of {_most(measures, num_prototypes):.2f}"
  )


def _findings(measures, num_prototypes, step, late, prototypes, advise):
  """The verdicts whose rule holds, in the order of `judge`."""
  get, limit = measures.get, LIMITS
  loss, entropy = get("train/loss"), get("train/target_entropy")
  cross_entropy = loss if get("train/cross_entropy") is None else get("train/cross_entropy")
  std, rank, cosine = (get(f"collapse/{k}") for k in ("feature_std", "rankme", "mean_cosine"))
  chance, codes = get("train/ln_k"), _codes(measures, num_prototypes, sample=True)
  most = _most(measures, num_prototypes)

  if get("collapse/teacher_distance") == 0:
    since = "" if step is None else f" after {step} steps"
    yield Verdict(
      "aliased teacher",
      f"the teacher equals the student{since}: set teacher.momentum above 0 and "
      "optim.lr above 0, and see that the two share no arrays",
      True,
    )
  embedded = get("collapse/embedding_cosine")
  if embedded is not None and 1.0 - embedded < limit["dead_head"]:
    if std is not None and std >= limit["feature_std"]:
      yield Verdict(
        "dead projector",
        f"the backbone tells images apart (std {std:.3f} of 1) but the head gives all of them the "
        "same embedding: nothing is learned through it; "
        + advise("set head.norm=batch", "set head.activation=gelu", "lower optim.lr"),
        True,
      )
  if chance is not None and cross_entropy is not None:
    alone = entropy is None
    near = limit["loss_at_chance_alone" if alone else "loss_at_chance"]
    flat = alone or most - entropy <= limit["teacher_uniform"]
    if abs(cross_entropy - chance) <= near and flat:
      yield Verdict(
        "uniform collapse",
        f"loss {cross_entropy:.3f} = ln {round(math.exp(chance))} and targets of entropy "
        f"{_show(entropy, '.3f')}: every image gets every prototype; "
        + advise(
          "lower method.teacher_temp",
          "lower method.epsilon",
          "lower method.column_temp",
          "set method.targets=sinkhorn",
          "raise batch_size",
          "raise optim.lr",
        ),
        True,
      )
  certain = entropy is not None and entropy < limit["teacher_one_hot"] * most
  one_hot = codes is not None and codes < limit["codes_one_hot"] and certain
  if one_hot:
    normed = ["set head.norm_output=True"] * (prototypes == "dictionary")
    advice = advise(
      *normed,
      "raise method.teacher_temp",
      "set method.targets=sinkhorn",
      "raise method.partition_size",
      "lower optim.lr",
      "raise batch_size",
    )
    yield Verdict(
      "one-hot collapse",
      f"every image gets the same prototype with certainty (entropy {entropy:.2f} of {most:.2f}, "
      f"loss {_show(loss, '.3f')}): {advice}",
      True,
    )
  if std is not None and std < limit["feature_std"]:
    has_teacher = get("collapse/teacher_distance") is not None
    advice = advise("lower optim.lr", *["raise teacher.momentum"] * has_teacher, "raise batch_size")
    yield Verdict(
      "representation collapse",
      f"all images have nearly the same feature (std {std:.3f} of 1, mean cosine "
      f"{_show(cosine, '.4f')}): {advice}",
      True,
    )
  codes = _codes(measures, num_prototypes, sample=late)
  if not one_hot and codes is not None and codes < min(limit["codes_clusters"], num_prototypes / 8):
    balance = "mixture.balanced=True" if prototypes == "mixture" else "method.targets=sinkhorn"
    advice = advise(f"set {balance}", "lower optim.lr", "raise batch_size")
    yield Verdict(
      "cluster collapse",
      f"{codes:.1f} of {num_prototypes} prototypes take nearly all images "
      f"({_prototypes(measures)}): {advice}",
      True,
    )
  if rank is not None:
    spread = std is not None and std > limit["feature_std_spread"]
    if rank < limit["rankme_spread" if spread else "rankme"]:
      yield Verdict(
        "dimensional collapse",
        f"the features span {rank:.1f} directions (RankMe): lower optim.lr or optim.weight_decay, "
        "raise batch_size, or take a wider augment.local_scale",
        True,
      )
  unique, null = (get(f"collapse/unique_{HEADLINE}{end}") for end in ("", "_random"))
  if unique is not None and (1.0 if null is None else null) - unique > limit["copies"]:
    yield _copies(measures, num_prototypes, prototypes, unique, null)


def _copies(measures, num_prototypes, prototypes, unique, null) -> Verdict:
  copies = (
    f"{1 - unique:.0%} of {num_prototypes} prototypes are copies (random ones: "
    f"{_show(None if null is None else 1 - null, '.0%')}; {_prototypes(measures)})"
  )
  relative = measures.get("collapse/relative_uniqueness")
  if relative is not None and relative >= LIMITS["relative_uniqueness"]:
    return Verdict(
      "narrow cone",
      f"{copies}, but they stand {relative:.1f} times as far apart as features from theirs: the "
      "features are near one another, not the prototypes redundant"
      + ("; set mixture.center_features=True" if prototypes == "mixture" else ""),
      False,
    )
  advice = {
    "kmeans": "lower method.num_prototypes",
    "dictionary": "raise head.bottleneck or lower method.num_prototypes",
    "mixture": "raise mixture.horizon_steps or set mixture.center_features=True",
  }.get(prototypes, "set method.prototypes=mixture, or lower method.num_prototypes")
  return Verdict("partial prototype collapse", f"{copies}: {advice}", True)


def verdict(measures: Mapping[str, float | None]) -> Verdict:
  """What these measures mean, and what to try: for any training code, at any time after its start.

  An untrained net looks collapsed, so ask no earlier than some hundred updates.

  >>> import numpy as np
  >>> from protojax import metrics
  >>> copies = np.repeat(np.eye(16), 4, axis=0)
  >>> metrics.verdict(metrics.summary(prototypes=copies)).label
  'partial prototype collapse'

  Args:
    measures: from `metrics.summary`; beside them, if known, "train/loss", "train/ln_k" (ln K) and
      "train/target_entropy" (mean entropy of the targets, nats).

  Raises:
    UserError: if nothing in it says how many prototypes there are.
  """
  known = {name: float(value) for name, value in measures.items() if value is not None}
  num = _num_prototypes(known)
  return judge(known, num_prototypes=num, prototypes="learned" if num else "none")


def _num_prototypes(measures: Mapping[str, float]) -> int:
  """K; 0 where features or a teacher were measured and no prototypes."""
  if "collapse/num_prototypes" in measures:
    return int(measures["collapse/num_prototypes"])
  if "train/ln_k" in measures:
    return round(math.exp(measures["train/ln_k"]))
  of_sets = {f"collapse/{row.name}": row.of_sets for row in table.MEASURES}
  if False in map(of_sets.get, measures) and True not in map(of_sets.get, measures):
    return 0
  raise errors.UserError(
    'these measures do not say how many prototypes there are: add "collapse/num_prototypes", as '
    'metrics.summary(prototypes=...) does, or "train/ln_k"'
  )


def of_run(measures: Mapping[str, float | None], *, config, step: int) -> Verdict:
  """`judge` for a run of protojax.

  Args:
    measures: {name in metrics.jsonl: value or None}.
    config: resolved; reads num_steps, optim.warmup_steps, method.* and the names.
    step: updates done.
  """
  # At a quarter of the warm-up the learning rate is high enough to have moved the net; a run so
  # short that this never comes is judged at its end.
  grace = min(max(100, config.optim.warmup_steps // 4), config.num_steps // 2)
  return judge(
    measures,
    num_prototypes=config.method.num_prototypes,
    step=step,
    grace_steps=grace,
    settings=trees.flat(config),
    prototypes=config.method.prototypes,
  )
