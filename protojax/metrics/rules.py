"""What the rules of a verdict share: limits with their reasons, and what is read off the measures.

What collapsed is found in `collapses`, what did not and is not well in `idleness`.
"""

import math
from collections.abc import Mapping
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
  # Share of K in use that is too few whatever random ones get, if the images are enough for this
  # many.
  "used": 0.05,
  "used_enough": 0.2,
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


def not_finite(count: int, num: int, what: str = "rows") -> Verdict:
  """The verdict on a matrix of `num` rows, `what` they are, `count` of which are not finite."""
  return Verdict(
    "non-finite",
    f"{count:,} of {num:,} {what} are not finite: nothing made with them means anything, and "
    "training on will spread it; go back to a checkpoint without them",
    True,
  )


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


def linear_here(measures) -> float | None:
  """Accuracy of a linear classifier of the features, on the images of the floors."""
  same = measures.get("floor/linear")
  return measures.get("probe/linear_fitted") if same is None else same


def most_entropy(measures, num_prototypes) -> float:
  """The largest entropy that a target can have, nats."""
  return measures.get("train/ln_k") or math.log(max(num_prototypes, 2))


def lost(measures) -> float:
  """Share of K that has no direction."""
  return measures.get("collapse/no_direction") or 0.0


def copied(measures) -> float | None:
  """Share of K that is a copy: has a direction and is not among the unique ones."""
  unique = measures.get(f"collapse/unique_{HEADLINE}")
  return None if unique is None else 1.0 - unique - lost(measures)


def are_copies(measures) -> bool:
  """Whether more prototypes are copies than of as many random ones, by `LIMITS`."""
  share, null = copied(measures), measures.get(f"collapse/unique_{HEADLINE}_random")
  return share is not None and share - (0.0 if null is None else 1.0 - null) > LIMITS["copies"]
