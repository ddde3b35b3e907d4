"""What can be wrong with a run, by its measures: each rule with its limit and its sentence.

`collapses` is what collapsed, `idleness` what did not and is not well, each a generator of verdicts
in the order of `verdicts.judge`, which asks for them and says which comes first.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from protojax.metrics import measures as table
from protojax.metrics import pairwise

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
  # Zero rows, share of K: none is healthy, a few of many are an empty cluster or two.
  "no_direction": 0.1,
  # Beyond those of random prototypes, share of K with another nearer than `NEAR`.
  "bunched": 0.1,
  # Prototype spacing over feature spread: copies give 0, equal spacing about 1.
  "relative_uniqueness": 0.5,
  # Mean cosine of features that are near one another; else near prototypes are copies, whatever
  # their median distance, which copies of under half of K do not move.
  "narrow": 0.8,
  # Used, over what random prototypes would be of the same embeddings (docs/collapse.md has both).
  "used_of_random": 0.5,
  # Share of K in use that is too few whatever random ones get, if the images could use four times
  # as many.
  "used": 0.05,
  # Embeddings of images from which use and spread are judged: n of them have at most n codes and
  # span at most n directions, and both limits above are below five.
  "images": 16,
  # Nats by which a loss is above ln K, where predicting nothing would get ln K, and above that of
  # the first update: no noise, and no entropy of targets that only warms up.
  "rise": 0.1,
  # Of the way from the untrained net's k-NN to that of raw pixels; and above the untrained net's by
  # so many standard deviations, which alone counts where raw pixels are worse than it.
  "learned": 0.5,
  "learned_deviations": 2.0,
}
# Nothing ill was seen, and too little for an "ok".
OPEN = ("warming up", "not judged", "no collapse", "unique, use unknown")
HEADLINE = pairwise.THRESHOLDS[0]  # cosine distance of the one uniqueness that is always shown
NEAR = pairwise.THRESHOLDS[3]  # of prototypes that bunch and are no copies yet


class Verdict(NamedTuple):
  """Attributes:
  label: a few words, "ok" if all is well; one of `OPEN` if too little was seen to say so.
  sentence: what was seen and what to try, one line.
  collapsed: whether `monitor.stop_on_collapse` should end the run.
  """

  label: str
  sentence: str
  collapsed: bool


def known(*parts: tuple[str, float | None, str], within: str = "{}") -> str:
  """ "used 61%, perplexity 1,200", what was measured of (words, value, form); else ""."""
  said = [f"{words} {value:{form}}" for words, value, form in parts if value is not None]
  return within.format(", ".join(said)) if said else ""


def prototypes_in_words(measures: Mapping[str, float | None]) -> str:
  """Uniqueness, and beside it everything without which it says nothing; of what was measured."""
  get = measures.get
  unique = known(("unique", get(f"collapse/unique_{HEADLINE}"), ".0%"))
  unique += bool(unique) * known(
    ("random ones", get(f"collapse/unique_{HEADLINE}_random"), ".0%"),
    ("moved to cosine", get("collapse/drift"), ".2f"),
    within=" ({})",
  )
  use = known(
    ("used", table.BY_NAME["used"].value(measures), ".0%"),
    ("perplexity", get("collapse/perplexity"), ",.0f"),
  )
  return ", ".join(filter(None, (unique, use)))


def codes_in_use(
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


def saturated(measures) -> bool:
  """Whether the net of step 0 is so good that none can be better by two standard deviations."""
  start = knn_at_start(measures)
  return start is not None and start + LIMITS["learned_deviations"] * noise_of_knn(measures) >= 1.0


def noise_of_knn(measures) -> float:
  """One standard deviation of the accuracy of step 0 on so many images; of 10,000 if unknown."""
  start = knn_at_start(measures) or 0.0
  return math.sqrt(start * (1.0 - start) / (measures.get("floor/test_images") or 10_000))


def knn_at_start(measures) -> float | None:
  """k-NN accuracy of the net of step 0."""
  untrained = measures.get("floor/knn_untrained")
  return measures.get("floor/knn_start") if untrained is None else untrained


def knn_here(measures) -> float | None:
  """k-NN accuracy on the images of the floors."""
  same = measures.get("floor/knn")
  return measures.get("probe/knn") if same is None else same


def idleness(measures, num_prototypes, late, prototypes, advise, longer) -> Iterator[Verdict]:
  """The verdicts on a run that did not collapse and is not well, in the order of `judge`."""
  get, limit = measures.get, LIMITS
  knn, start, pixels = knn_here(measures), knn_at_start(measures), get("floor/knn_pixels")
  name = "the net it started from" if get("floor/knn_untrained") is None else "the untrained net"
  more = advise("raise num_steps", "raise optim.lr", "set head.norm=batch")
  noise = noise_of_knn(measures)
  loss = get("train/loss") if get("train/cross_entropy") is None else get("train/cross_entropy")
  chance, first = get("train/ln_k"), get("floor/loss_start")
  worse = knn is not None and start is not None and knn < start - 2.0 * noise
  rises = None not in (loss, chance, first) and loss - max(chance, first) > limit["rise"]
  if worse or rises:
    said = [f"k-NN {knn:.1%}, {name} {start:.1%}"] if worse else []
    said += [f"loss {loss:.2f}, at the start {first:.2f}, ln K {chance:.2f}"] if rises else []
    advice = advise("lower optim.lr", "raise optim.warmup_steps", "raise batch_size")
    yield Verdict("worse than at the start", f"{'; '.join(said)}: {advice}", False)
  if prototypes in ("learned", "mixture") and late:
    yield from _bunched(measures, num_prototypes, prototypes, longer)
  if num_prototypes and late:
    yield from _unused(measures, num_prototypes, advise)
  if knn is None or start is None or worse or saturated(measures):
    pass
  elif knn <= start + noise:
    yield Verdict(
      "nothing learned yet", f"k-NN {knn:.1%} is not above {name}'s {start:.1%}: {more}", False
    )
  elif pixels is not None and knn < start + limit["learned"] * (pixels - start):
    yield Verdict(
      "little learned yet",
      f"k-NN {knn:.1%} is nearer to {name}'s {start:.1%} than to the {pixels:.1%} of raw pixels: "
      + more,
      False,
    )
  elif knn < start + limit["learned_deviations"] * noise:
    yield Verdict(
      "little learned yet",
      f"k-NN {knn:.1%} is above {name}'s {start:.1%} by less than two standard deviations "
      f"({noise:.1%} each, of so many test images): {more}",
      False,
    )
  yield from _below_pixels(measures, more)


def _below_pixels(measures, more):
  """A linear classifier of the features that is worse than one of the images, by two deviations."""
  fitted, pixels = measures.get("probe/linear_fitted"), measures.get("floor/linear_pixels")
  if fitted is None or pixels is None:
    return
  images = measures.get("floor/test_images") or 10_000
  noise = math.sqrt((fitted * (1.0 - fitted) + pixels * (1.0 - pixels)) / images)
  if fitted < pixels - 2.0 * noise:
    yield Verdict(
      "worse than raw pixels",
      f"linear {fitted:.1%} on frozen features, {pixels:.1%} on raw pixels: {more}",
      False,
    )


def _bunched(measures, num_prototypes, prototypes, longer):
  """Prototypes that move onto one another and are not copies yet."""
  unique, null = (measures.get(f"collapse/unique_{NEAR}{end}") for end in ("", "_random"))
  if _are_copies(measures) or unique is None or null is None:
    return
  if null - unique - _lost(measures) <= LIMITS["bunched"]:
    return
  advice = {"mixture": longer}.get(
    prototypes, "set method.prototypes=mixture, or lower method.num_prototypes"
  )
  yield Verdict(
    "prototypes bunch",
    f"{unique:.0%} of {num_prototypes:,} prototypes are unique at cosine distance {NEAR} (random "
    f"ones: {null:.0%}): they draw together, which is how copies begin; {advice}",
    False,
  )


def _unused(measures, num_prototypes, advise):
  """Prototypes that are apart and take no images: of all images if they were looked at."""
  get = measures.get
  key = "collapse/used" if get("collapse/used") is not None else "collapse/used_sample"
  used, most = get(key), get(f"{key}_most")
  unique = get(f"collapse/unique_{HEADLINE}")
  if used is None or _are_copies(measures):
    return
  # Random ones are measured on the sample in training; there both are of the sample.
  pairs = [(get(f"{k}"), get(f"{k}_random")) for k in ("collapse/used", "collapse/used_sample")]
  ratio, random = min(((a / b, b) for a, b in pairs if a is not None and b), default=(None, None))
  few = used < LIMITS["used"] and used < (1.0 if most is None else most) / 4.0
  if few or (ratio is not None and ratio < LIMITS["used_of_random"]):
    beside = "" if random is None else f"; random ones on the same embeddings: {random:.1%}"
    of = f"{num_prototypes:,} prototypes"
    yield Verdict(
      "unique but unused",
      (
        f"{unique:.0%} of {of} are unique, {used:.1%}"
        if unique is not None
        else f"{used:.1%} of {of}"
      )
      + f" are used{beside}: "
      + advise(
        "set mixture.balanced=True",
        "lower method.num_prototypes",
        "set method.targets=sinkhorn",
        "raise method.teacher_temp",
      ),
      False,
    )


def most_entropy(measures, num_prototypes) -> float:
  """The largest entropy that a target can have, nats."""
  return measures.get("train/ln_k") or math.log(max(num_prototypes, 2))


def collapses(
  measures, num_prototypes, step, late, prototypes, advise, longer, alike
) -> Iterator[Verdict]:
  """The verdicts whose rule holds, in the order of `judge`."""
  get, limit = measures.get, LIMITS
  loss, entropy = get("train/loss"), get("train/target_entropy")
  cross_entropy = loss if get("train/cross_entropy") is None else get("train/cross_entropy")
  std, rank, cosine = (get(f"collapse/{k}") for k in ("feature_std", "rankme", "mean_cosine"))
  chance, codes = get("train/ln_k"), codes_in_use(measures, num_prototypes, sample=True)
  most = most_entropy(measures, num_prototypes)

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
    elif std is None:  # nobody measured the backbone
      yield Verdict(
        "representation collapse",
        f"all images have the same embedding (mean cosine {embedded:.4f}): see whether the "
        "backbone's features differ; " + advise("lower optim.lr", "raise batch_size"),
        True,
      )
  if chance is not None and cross_entropy is not None:
    alone = entropy is None
    near = limit["loss_at_chance_alone" if alone else "loss_at_chance"]
    flat = alone or most - entropy <= limit["teacher_uniform"]
    if abs(cross_entropy - chance) <= near and flat:
      yield Verdict(
        "uniform collapse",
        f"loss {cross_entropy:.3f} = ln {round(math.exp(chance))}"
        + known(("targets of entropy", entropy, ".3f"), within=" and {}")
        + ": every image gets every prototype; "
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
      f"every image gets the same prototype with certainty (entropy {entropy:.2f} of {most:.2f}"
      f"{known(('loss', loss, '.3f'), within=', {}')}): {advice}",
      True,
    )
  if std is not None and std < limit["feature_std"]:
    has_teacher = get("collapse/teacher_distance") is not None
    advice = advise("lower optim.lr", *["raise teacher.momentum"] * has_teacher, "raise batch_size")
    yield Verdict(
      "representation collapse",
      f"all images have nearly the same feature (std {std:.3f} of 1"
      f"{known(('mean cosine', cosine, '.4f'), within=', {}')}): {advice}",
      True,
    )
  codes = codes_in_use(measures, num_prototypes, sample=late)
  if not one_hot and codes is not None and codes < min(limit["codes_clusters"], num_prototypes / 8):
    balance = "mixture.balanced=True" if prototypes == "mixture" else "method.targets=sinkhorn"
    advice = advise(f"set {balance}", "lower optim.lr", "raise batch_size")
    few = "one" if codes < 1.5 else f"about {codes:.0f}"
    yield Verdict(
      "cluster collapse",
      f"{few} of {num_prototypes:,} prototypes take{'s' * (few == 'one')} nearly all images"
      f"{f' ({sets})' if (sets := prototypes_in_words(measures)) else ''}: {advice}",
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
  if _are_copies(measures):
    yield _copies(measures, num_prototypes, prototypes, advise, longer, alike)
  if (lost := _lost(measures)) > limit["no_direction"]:
    yield Verdict(
      "prototypes without direction",
      f"{lost:.0%} of {num_prototypes:,} prototypes are zero, or not finite, so that no image is "
      "theirs: see where they are made: rows that were never set, or that weight decay has taken",
      True,
    )


def _lost(measures) -> float:
  """Share of K that has no direction."""
  return measures.get("collapse/no_direction") or 0.0


def _copied(measures) -> float | None:
  """Share of K that is a copy: has a direction and is not among the unique ones."""
  unique = measures.get(f"collapse/unique_{HEADLINE}")
  return None if unique is None else 1.0 - unique - _lost(measures)


def _are_copies(measures) -> bool:
  """Whether more prototypes are copies than of as many random ones, by `LIMITS`."""
  copied, null = _copied(measures), measures.get(f"collapse/unique_{HEADLINE}_random")
  return copied is not None and copied - (0.0 if null is None else 1.0 - null) > LIMITS["copies"]


def _copies(measures, num_prototypes, prototypes, advise, longer, alike) -> Verdict:
  null = measures.get(f"collapse/unique_{HEADLINE}_random")
  random = "" if null is None else f"random ones: {1 - null:.0%}; "
  copies = (
    f"{_copied(measures):.0%} of {num_prototypes:,} prototypes are copies "
    f"({random}{prototypes_in_words(measures)})"
  )
  relative = measures.get("collapse/relative_uniqueness")
  centre = advise("set mixture.center_features=True")
  near = (measures.get(f"collapse/{k}_cosine") for k in ("embedding", "mean"))
  cosine = next((value for value in near if value is not None), 0.0)
  if (
    not alike
    and relative is not None
    and relative >= LIMITS["relative_uniqueness"]
    and cosine >= LIMITS["narrow"]
  ):
    return Verdict(
      "narrow cone",
      f"{copies}, but they stand {relative:.1f} times as far apart as features from theirs: the "
      f"features are near one another (mean cosine {cosine:.2f}), not the prototypes redundant"
      + (f"; {centre}" if prototypes == "mixture" and centre else ""),
      False,
    )
  advice = {
    "kmeans": "lower method.num_prototypes",
    "dictionary": "raise head.bottleneck or lower method.num_prototypes",
    "mixture": f"{longer} or {centre}" if centre else longer,
  }.get(prototypes, "set method.prototypes=mixture, or lower method.num_prototypes")
  if alike:
    same = f"all prototypes are one and the same ({random}{prototypes_in_words(measures)})"
    return Verdict("complete prototype collapse", f"{same}: {advice}", True)
  return Verdict("partial prototype collapse", f"{copies}: {advice}", True)
