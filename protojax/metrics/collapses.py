"""What collapsed, by the measures: each rule with its sentence, limits from `rules`."""

import math
from collections.abc import Iterator

from protojax.metrics import rules


def found(
  measures, num_prototypes, step, late, prototypes, advise, longer, alike
) -> Iterator[rules.Verdict]:
  """The verdicts whose rule holds, in the order of `verdicts.judge`."""
  get, limit = measures.get, rules.LIMITS
  loss, entropy = get("train/loss"), get("train/target_entropy")
  cross_entropy = loss if get("train/cross_entropy") is None else get("train/cross_entropy")
  std, rank, cosine = (get(f"collapse/{k}") for k in ("feature_std", "rankme", "mean_cosine"))
  chance, codes = get("train/ln_k"), rules.codes_in_use(measures, num_prototypes, sample=True)
  most = rules.most_entropy(measures, num_prototypes)

  if get("collapse/teacher_distance") == 0:
    since = "" if step is None else f" after {step} steps"
    yield rules.Verdict(
      "aliased teacher",
      f"the teacher equals the student{since}: set teacher.momentum above 0 and "
      "optim.lr above 0, and see that the two share no arrays",
      True,
    )
  embedded = get("collapse/embedding_cosine")
  if embedded is not None and 1.0 - embedded < limit["dead_head"]:
    if std is not None and std >= limit["feature_std"]:
      yield rules.Verdict(
        "dead projector",
        f"the backbone tells images apart (std {std:.3f} of 1) but the head gives all of them the "
        "same embedding: nothing is learned through it; "
        + advise("set head.norm=batch", "set head.activation=gelu", "lower optim.lr"),
        True,
      )
    elif std is None:  # nobody measured the backbone
      yield rules.Verdict(
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
      yield rules.Verdict(
        "uniform collapse",
        f"loss {cross_entropy:.3f} = ln {round(math.exp(chance))}"
        + rules.known(("targets of entropy", entropy, ".3f"), within=" and {}")
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
    yield rules.Verdict(
      "one-hot collapse",
      f"every image gets the same prototype with certainty (entropy {entropy:.2f} of {most:.2f}"
      f"{rules.known(('loss', loss, '.3f'), within=', {}')}): {advice}",
      True,
    )
  if std is not None and std < limit["feature_std"]:
    has_teacher = get("collapse/teacher_distance") is not None
    advice = advise("lower optim.lr", *["raise teacher.momentum"] * has_teacher, "raise batch_size")
    yield rules.Verdict(
      "representation collapse",
      f"all images have nearly the same feature (std {std:.3f} of 1"
      f"{rules.known(('mean cosine', cosine, '.4f'), within=', {}')}): {advice}",
      True,
    )
  codes = rules.codes_in_use(measures, num_prototypes, sample=late)
  if not one_hot and codes is not None and codes < min(limit["codes_clusters"], num_prototypes / 8):
    balance = "mixture.balanced=True" if prototypes == "mixture" else "method.targets=sinkhorn"
    advice = advise(f"set {balance}", "lower optim.lr", "raise batch_size")
    few = "one" if codes < 1.5 else f"about {codes:.0f}"
    yield rules.Verdict(
      "cluster collapse",
      f"{few} of {num_prototypes:,} prototypes take{'s' * (few == 'one')} nearly all images"
      f"{f' ({sets})' if (sets := rules.prototypes_in_words(measures)) else ''}: {advice}",
      True,
    )
  if rank is not None:
    spread = std is not None and std > limit["feature_std_spread"]
    if rank < limit["rankme_spread" if spread else "rankme"]:
      yield rules.Verdict(
        "dimensional collapse",
        f"the features span {rank:.1f} directions (RankMe): lower optim.lr or optim.weight_decay, "
        "raise batch_size, or take a wider augment.local_scale",
        True,
      )
  if rules.are_copies(measures):
    yield _copies(measures, num_prototypes, prototypes, advise, longer, alike)
  if (lost := rules.lost(measures)) > limit["no_direction"]:
    yield rules.Verdict(
      "prototypes without direction",
      f"{lost:.0%} of {num_prototypes:,} prototypes are zero, or not finite, so that no image is "
      "theirs: see where they are made: rows that were never set, or that weight decay has taken",
      True,
    )


def _copies(measures, num_prototypes, prototypes, advise, longer, alike) -> rules.Verdict:
  null = measures.get(f"collapse/unique_{rules.HEADLINE}_random")
  random = "" if null is None else f"random ones: {1 - null:.0%}; "
  copies = (
    f"{rules.copied(measures):.0%} of {num_prototypes:,} prototypes are copies "
    f"({random}{rules.prototypes_in_words(measures)})"
  )
  relative = measures.get("collapse/relative_uniqueness")
  centre = advise("set mixture.center_features=True")
  near = (measures.get(f"collapse/{k}_cosine") for k in ("embedding", "mean"))
  cosine = next((value for value in near if value is not None), 0.0)
  if (
    not alike
    and relative is not None
    and relative >= rules.LIMITS["relative_uniqueness"]
    and cosine >= rules.LIMITS["narrow"]
  ):
    return rules.Verdict(
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
    same = f"all prototypes are one and the same ({random}{rules.prototypes_in_words(measures)})"
    return rules.Verdict("complete prototype collapse", f"{same}: {advice}", True)
  return rules.Verdict("partial prototype collapse", f"{copies}: {advice}", True)
