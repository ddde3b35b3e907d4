"""The protocols of `protojax evaluate`: what each fixes, and how it is measured.

Each takes the encoded images and gives a `Task`: settings first, so that they can be compared
with those of an earlier result before anything is computed.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from protojax.evals import clustering, linear, linear_grid, long_tail, low_shot
from protojax.evals import knn as neighbours

_KS = (10, 20, 100, 200)  # those of arXiv 2104.14294
_CHANCE_DRAWS = 5


class Encoded(NamedTuple):
  """Rows of the labelled images, from `pretrained.encoded`.

  Attributes:
    bank, test: {"features": {layer: [N, F]}, "codes": {set: int32 [N]}, "label": int32 [N]};
      without "codes" where there are no prototypes.
    num_classes: C.
    prototypes: {set: [K, D]}.
  """

  bank: dict[str, Any]
  test: dict[str, Any]
  num_classes: int
  prototypes: dict[str, np.ndarray]

  def last(self) -> tuple[np.ndarray, ...]:
    """The last layer's rows and labels: (bank, its labels, test, its labels)."""
    bank, test = self.bank, self.test
    return bank["features"]["last"], bank["label"], test["features"]["last"], test["label"]


class Task(NamedTuple):
  """A protocol for certain rows.

  Attributes:
    settings: JSON, part of the protocol in result.json.
    measure: () -> {measure: number or name}.
    notes: what was left out, and why.
  """

  settings: dict[str, Any]
  measure: Callable[[], dict]
  notes: Sequence[str] = ()


class Headline(NamedTuple):
  """A row of the table that ends `--protocol=all`: a measure on test images.

  Attributes:
    protocol, measure: of result.json.
    value: the measure.
    chosen_on: which images chose something for it, "-" where nothing was chosen.
    chance: what it is without features: the largest class's share, the NMI of random codes; None
      where that is not known.
  """

  protocol: str
  measure: str
  value: float
  chosen_on: str
  chance: float | None


_HEADLINES = {
  "knn": r"top1_.*",
  "linear": r"accuracy|logistic_accuracy",
  "low_shot": r".*_mean",
  "clustering": r"test_.*_nmi",
  "long_tail": r"(even_)?(knn|linear)_(balanced|many|medium|few)",
}


def headlines(name: str, measures: dict, protocol: dict, largest_class: float) -> list[Headline]:
  """The measures of one result that a table of all protocols shows.

  Args:
    name: of the protocol.
    measures, protocol: of result.json.
    largest_class: share of the test images that the most frequent class has.
  """
  found = []
  for key, value in measures.items():
    if not re.fullmatch(_HEADLINES[name], key):
      continue
    chosen = "held-out bank" if "linear" in key or name == "linear" else "-"
    if key == "accuracy" and protocol.get("mode") == "paper":
      chosen = "TEST IMAGES"
    if key.startswith("even_"):  # a fixed strength, and k
      chosen = "-"
    chance = measures.get(f"{key}_uniform", largest_class)
    if name == "long_tail":  # of classes in equal parts, or of some of them
      chance = None
    found.append(Headline(name, key, value, chosen, chance))
  return found


def knn(encoded: Encoded, *, ks: Sequence[int] | None, temperatures: Sequence[float]) -> Task:
  """Weighted k-NN at every k and T; nothing is chosen, all are reported.

  Without `ks`, at those of 10, 20, 100 and 200 that the bank has images for.
  """
  num = len(encoded.bank["label"])
  notes = [] if ks else [f"k={k}: the bank has {num} images" for k in _KS if k > num]
  ks = ks or [k for k in _KS if k <= num] or _KS[:1]  # a bank too small for any is refused below
  settings = {
    "layers": ["last"],
    "k": list(ks),
    "temperature": list(temperatures),
    "rule": "cosine, votes weighted exp(similarity / temperature), whole bank",
    "selection": "none: every k and temperature is reported",
  }
  return Task(
    settings,
    lambda: neighbours.evaluate(
      *encoded.last(), num_classes=encoded.num_classes, ks=ks, temperatures=temperatures
    ),
    notes,
  )


def linear_probe(encoded: Encoded, *, mode: str, layers: Sequence[str], epochs: int) -> Task:
  """The grid of SGD heads, and logistic regression on the last layer."""
  settings = {
    "mode": mode,
    "layers": list(layers),
    "rates_per_256": list(linear_grid.RATES),
    "epochs": epochs,
    "batch_size": 256,
    "seed": 0,
    "rule": "SGD, momentum .9, weight decay 0, cosine to 0, weights N(0, .01), features as they "
    "are and from the evaluation transform: no train augmentation",
    "selection": {
      "honest": "layer and rate on a held-out tenth of the bank, then trained on all of it",
      "paper": "layer and rate on the test images",
    }[mode],
    "logistic": "L-BFGS on standardised features of the last layer, lambda / 2 |weight|^2 beside "
    "the mean cross entropy, lambda on a held-out tenth of the bank",
  }

  def measure():
    grid = linear_grid.evaluate(
      {k: encoded.bank["features"][k] for k in layers},
      encoded.bank["label"],
      {k: encoded.test["features"][k] for k in layers},
      encoded.test["label"],
      num_classes=encoded.num_classes,
      mode=mode,
      epochs=epochs,
    )
    fitted = linear.evaluate(*encoded.last(), num_classes=encoded.num_classes)
    return grid | {"logistic_accuracy": fitted["linear"], "logistic_l2": fitted["l2"]}

  return Task(settings, measure)


def few_shot(encoded: Encoded) -> Task:
  """Logistic regression on 1, 2, 5 images a class and on 1 % and 10 % of every class."""
  counts = np.bincount(encoded.bank["label"], minlength=encoded.num_classes)
  smallest = int(counts[counts > 0].min())
  per_class = [n for n in (1, 2, 5) if n <= smallest]
  notes = [
    f"{n} a class: the smallest class of the bank has {smallest} images"
    for n in (1, 2, 5)
    if n > smallest
  ]
  settings = {
    "layers": ["last"],
    "per_class": per_class,
    "shares": [0.01, 0.1],
    "seeds": [0, 1, 2, 3, 4],
    "rule": "features of unit length, no bias, L-BFGS, lambda / 2 |weight|^2 beside the mean cross "
    "entropy of the n images",
    "lambda": "0.1 / n",
    "selection": "none: lambda is fixed",
    "std": "over the draws, n - 1",
  }
  return Task(
    settings,
    lambda: low_shot.evaluate(
      *encoded.last(),
      num_classes=encoded.num_classes,
      per_class=per_class,
      shares=settings["shares"],
      seeds=settings["seeds"],
      strength=0.1,
    ),
    notes,
  )


def clusters(encoded: Encoded) -> Task:
  """Codes of every set of prototypes, and k-means with as many clusters as classes."""
  notes = [] if "codes" in encoded.bank else ["codes of prototypes: there are no prototypes"]
  settings = {
    "layers": ["last"],
    "sets": sorted(encoded.bank.get("codes", {})),
    "splits": ["test", "train"],
    "nmi": "arithmetic mean of the entropies",
    "kmeans": "K = classes, features of unit length, fitted to the bank, 50 steps, best of 10",
    "hungarian": "best one-to-one matching on the split itself, where K <= classes",
    "purity": "majority vote on the split itself, where K > classes",
    "permuted": "mean over draws of permuted labels",
    "uniform": "mean NMI over draws of uniformly random codes, 0 to K - 1",
    "draws": _CHANCE_DRAWS,
    "seed": 0,
  }

  def measure():
    features, _, others, _ = encoded.last()
    fitted = clustering.kmeans_codes(features, others, num_clusters=encoded.num_classes)
    out = {}
    for split, rows, found in (
      ("test", encoded.test, fitted[1]),
      ("train", encoded.bank, fitted[0]),
    ):
      sets = {"kmeans": (found, encoded.num_classes)} | {
        name: (codes, len(encoded.prototypes[name]))
        for name, codes in rows.get("codes", {}).items()
      }
      for name, (codes, num_codes) in sets.items():
        scores = clustering.evaluate(
          codes,
          rows["label"],
          num_codes=num_codes,
          num_classes=encoded.num_classes,
          draws=_CHANCE_DRAWS,
        )
        out |= {f"{split}_{name}_{k}": v for k, v in scores.items()}
    return out

  return Task(settings, measure, notes)


def tail(encoded: Encoded) -> Task:
  """Accuracy of frequent and rare classes, and the prototypes that they get."""
  parts = long_tail.splits(encoded.bank["label"], encoded.num_classes)
  notes = [
    f"{name}: no class of the bank has {size} images"
    for name, size in (("many", "over 100"), ("medium", "20 to 100"), ("few", "1 to 19"))
    if not parts[name].size
  ]
  if "codes" not in encoded.bank:
    notes.append("allocation of prototypes: there are no prototypes")
  settings = {
    "layers": ["last"],
    "k": min(20, len(encoded.bank["label"])),
    "temperature": 0.07,
    "splits": "by images of a class in the bank: many > 100, medium 20 to 100, few < 20",
    "balanced": "mean over classes of the accuracy on the class",
    "linear": "logistic regression, lambda on a held-out tenth of the bank",
    "even": f"bank of as many images of each class as its smallest has, {long_tail.EVEN} at most; "
    f"means over {long_tail.DRAWS} draws; logistic regression with lambda .1 / n",
    "allocation": "split of the majority class of a prototype's bank images; unique: of those "
    "within cosine distance .025 of it, in index order",
  }

  def measure():
    out = long_tail.evaluate(
      *encoded.last(), num_classes=encoded.num_classes, k=settings["k"], temperature=0.07
    )
    for name, codes in encoded.bank.get("codes", {}).items():
      shares = long_tail.allocation(
        codes,
        encoded.bank["label"],
        encoded.prototypes[name],
        parts,
        num_classes=encoded.num_classes,
      )
      out |= {f"{name}_{k}": v for k, v in shares.items()}
    return out

  return Task(settings, measure, notes)
