"""A run that did not collapse and is not well: each rule with its sentence, limits from `rules`."""

import math
from collections.abc import Iterator

from protojax.metrics import rules


def found(measures, num_prototypes, late, prototypes, advise, longer) -> Iterator[rules.Verdict]:
  """The verdicts whose rule holds, in the order of `verdicts.judge`."""
  get, limit = measures.get, rules.LIMITS
  knn, start = rules.knn_here(measures), rules.knn_at_start(measures)
  pixels = get("floor/knn_pixels")
  name = "the net it started from" if get("floor/knn_untrained") is None else "the untrained net"
  more = advise("raise num_steps", "raise optim.lr", "set head.norm=batch")
  noise = rules.noise_of_knn(measures)
  loss = get("train/loss") if get("train/cross_entropy") is None else get("train/cross_entropy")
  chance, first = get("train/ln_k"), get("floor/loss_start")
  worse = knn is not None and start is not None and knn < start - 2.0 * noise
  rises = None not in (loss, chance, first) and loss - max(chance, first) > limit["rise"]
  if worse or rises:
    said = [f"k-NN {knn:.1%}, {name} {start:.1%}"] if worse else []
    said += [f"loss {loss:.2f}, at the start {first:.2f}, ln K {chance:.2f}"] if rises else []
    advice = advise("lower optim.lr", "raise optim.warmup_steps", "raise batch_size")
    yield rules.Verdict("worse than at the start", f"{'; '.join(said)}: {advice}", False)
  if prototypes in ("learned", "mixture") and late:
    yield from _bunched(measures, num_prototypes, prototypes, longer)
  if num_prototypes and late:
    yield from _unused(measures, num_prototypes, advise)
  if knn is None or start is None or worse or rules.saturated(measures):
    pass
  elif knn <= start + noise:
    yield rules.Verdict(
      "nothing learned yet", f"k-NN {knn:.1%} is not above {name}'s {start:.1%}: {more}", False
    )
  elif pixels is not None and knn < start + limit["learned"] * (pixels - start):
    yield rules.Verdict(
      "little learned yet",
      f"k-NN {knn:.1%} is nearer to {name}'s {start:.1%} than to the {pixels:.1%} of raw pixels: "
      + more,
      False,
    )
  elif knn < start + limit["learned_deviations"] * noise:
    yield rules.Verdict(
      "little learned yet",
      f"k-NN {knn:.1%} is above {name}'s {start:.1%} by less than two standard deviations "
      f"({noise:.1%} each, of so many test images): {more}",
      False,
    )
  yield from _below_pixels(measures, more)


def _below_pixels(measures, more):
  """A linear classifier of the features that is worse than one of the images, by two deviations."""
  fitted, pixels = rules.linear_here(measures), measures.get("floor/linear_pixels")
  if fitted is None or pixels is None:
    return
  images = measures.get("floor/test_images") or 10_000
  noise = math.sqrt((fitted * (1.0 - fitted) + pixels * (1.0 - pixels)) / images)
  if fitted < pixels - 2.0 * noise:
    yield rules.Verdict(
      "worse than raw pixels",
      f"linear {fitted:.1%} on frozen features, {pixels:.1%} on raw pixels: {more}",
      False,
    )


def _bunched(measures, num_prototypes, prototypes, longer):
  """Prototypes that move onto one another and are not copies yet."""
  unique, null = (measures.get(f"collapse/unique_{rules.NEAR}{end}") for end in ("", "_random"))
  if rules.are_copies(measures) or unique is None or null is None:
    return
  if null - unique - rules.lost(measures) <= rules.LIMITS["bunched"]:
    return
  advice = {"mixture": longer}.get(
    prototypes, "set method.prototypes=mixture, or lower method.num_prototypes"
  )
  yield rules.Verdict(
    "prototypes bunch",
    f"{unique:.0%} of {num_prototypes:,} prototypes are unique at cosine distance {rules.NEAR} "
    f"(random ones: {null:.0%}): they draw together, which is how copies begin; {advice}",
    False,
  )


def _unused(measures, num_prototypes, advise):
  """Prototypes that are apart and take no images: of all images if they were looked at."""
  get = measures.get
  key = "collapse/used" if get("collapse/used") is not None else "collapse/used_sample"
  used, most = get(key), get(f"{key}_most")
  unique = get(f"collapse/unique_{rules.HEADLINE}")
  if used is None or rules.are_copies(measures):
    return
  # Random ones are measured on the sample in training; there both are of the sample.
  pairs = [(get(f"{k}"), get(f"{k}_random")) for k in ("collapse/used", "collapse/used_sample")]
  ratio, random = min(((a / b, b) for a, b in pairs if a is not None and b), default=(None, None))
  enough = most is None or most >= rules.LIMITS["used_enough"]
  few = enough and used < rules.LIMITS["used"]
  if few or (ratio is not None and ratio < rules.LIMITS["used_of_random"]):
    beside = "" if random is None else f"; random ones on the same embeddings: {random:.1%}"
    of = f"{num_prototypes:,} prototypes"
    yield rules.Verdict(
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
