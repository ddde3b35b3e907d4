"""Accuracy and prototypes of frequent and rare classes (the cuts of arXiv 1904.05160).

A bank with a hundred times the images of one class recognises the other one hardly ever, however
good the features are. Two questions, then: what does such a bank recognise, and, "even", what does
a bank of equally many images a class: what do the features know of the rare ones?
"""

import numpy as np

from protojax.evals import knn, linear, low_shot, purity
from protojax.metrics import pairwise

SPLITS = ("many", "medium", "few")
EVEN = 50  # images a class of an even bank, at most
DRAWS = 5  # of an even bank


def splits(labels: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
  """Sorts the classes into frequent and rare ones: of more than 100, 20 to 100, 1 to 19 images.

  Args:
    labels: int [N] of the train images; a class without any is in no split.
    num_classes: C.

  Returns:
    {"many", "medium", "few": int [n] classes}.
  """
  counts = np.bincount(labels, minlength=num_classes)
  cut = {
    "many": counts > 100,
    "medium": (counts >= 20) & (counts <= 100),
    "few": (counts < 20) & (counts > 0),
  }
  return {name: np.flatnonzero(cut[name]) for name in SPLITS}


def accuracies(predicted: np.ndarray, labels: np.ndarray, parts: dict) -> dict[str, float]:
  """Computes the accuracy of all images, of the classes in equal parts, and of each split.

  Args:
    predicted: int [M].
    labels: int [M] of the test images.
    parts: as `splits` gives them.

  Returns:
    {"all", "balanced", and one a split that test images fall into: accuracy}, 0 to 1: shares of
    test images, but "balanced", the mean over classes of the share of the class.
  """
  predicted, labels = np.asarray(predicted), np.asarray(labels)
  right = predicted == labels
  out = {
    "all": float(right.mean()),
    "balanced": float(np.mean([right[labels == c].mean() for c in np.unique(labels)])),
  }
  for name, classes in parts.items():
    if (here := np.isin(labels, classes)).any():
      out[name] = float(right[here].mean())
  return out


def allocation(
  codes: np.ndarray,
  labels: np.ndarray,
  prototypes: np.ndarray,
  parts: dict,
  *,
  num_classes: int,
  threshold: float = 0.025,
) -> dict[str, float]:
  """Which split the prototypes serve: that of the majority class of their images.

  Args:
    codes: int [N], prototype of every train image.
    labels: int [N].
    prototypes: [K, D].
    parts: as `splits` gives them.
    num_classes: C.
    threshold: cosine distance under which prototypes count as one, `pairwise.cover`.

  Returns:
    {"used_many": share of the prototypes that have images, "unique_many": share of the unique ones
    that have some, alone or through their copies, ...}; the shares of each sum to 1, a split
    without classes has none. Of equally frequent classes the lowest is the majority.
  """
  owner = np.asarray(pairwise.cover(prototypes, (threshold,))[0])
  split_of = np.full(num_classes, -1)
  for i, name in enumerate(SPLITS):
    split_of[parts[name]] = i
  out = {}
  for kind, group in (("used", codes), ("unique", owner[codes])):
    there = group >= 0  # a prototype of zeros is nobody's copy and not unique
    majority, _ = purity.majority(group[there], labels[there], len(prototypes))
    serving = split_of[majority[majority >= 0]]
    served = np.bincount(serving, minlength=len(SPLITS)) / serving.size
    named = zip(SPLITS, served, strict=True)
    out |= {f"{kind}_{name}": float(n) for name, n in named if parts[name].size}
  return out


def even(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  query_labels: np.ndarray,
  *,
  num_classes: int,
  k: int = 20,
  temperature: float = 0.07,
) -> dict[str, float]:
  """Accuracies with a bank of equally many images a class: of its smallest class, `EVEN` at most.

  Args:
    as of `evaluate`; k is at most the images of the even bank.

  Returns:
    {"images_per_class"; "knn_all", "knn_balanced", "knn_many", ..., "linear_all", ...}: k-NN and
    `low_shot.fit`, means over `DRAWS` draws.

  Raises:
    UserError: as `knn.scores` and `linear.fit`.
  """
  bank_labels = np.asarray(bank_labels)
  parts = splits(bank_labels, num_classes)
  counts = np.bincount(bank_labels)
  per_class = int(min(counts[counts > 0].min(), EVEN))
  bank, queries = low_shot.unit(bank), low_shot.unit(queries)
  found = []
  for seed in range(DRAWS):
    rows = low_shot.subset(bank_labels, seed=seed, per_class=per_class)
    few, labels = bank[rows], bank_labels[rows]
    predicted = {
      "knn": knn.predict(
        few,
        labels,
        queries,
        num_classes=num_classes,
        k=min(k, rows.size),
        temperature=temperature,
      ),
      "linear": linear.predict(low_shot.fit(few, labels, num_classes=num_classes), queries),
    }
    found.append(
      {
        f"{name}_{part}": value
        for name, guesses in predicted.items()
        for part, value in accuracies(guesses, query_labels, parts).items()
      }
    )
  return {"images_per_class": per_class} | {
    name: float(np.mean([draw[name] for draw in found])) for name in found[0]
  }


def evaluate(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  query_labels: np.ndarray,
  *,
  num_classes: int,
  k: int = 20,
  temperature: float = 0.07,
) -> dict[str, float]:
  """Accuracies of k-NN and of logistic regression (`linear.choose`), per split and balanced.

  Args:
    bank: [N, D], long-tailed.
    bank_labels: int [N].
    queries: [M, D].
    query_labels: int [M].
    num_classes: C.
    k: neighbours.
    temperature: of their weights.

  Returns:
    {"knn_all", "knn_balanced", "knn_many", ..., "linear_all", ..., "linear_l2": strength chosen on
    a tenth of the bank}; "even_knn_all", ...: those of `even`; and "classes_many", "images_many":
    how many classes and what share of the bank's images each split has, ...

  Raises:
    UserError: as `knn.scores`, `linear.choose` and `linear.fit`.
  """
  parts = splits(bank_labels, num_classes)
  near = knn.predict(
    bank, bank_labels, queries, num_classes=num_classes, k=k, temperature=temperature
  )
  classifier, l2, _ = linear.choose(bank, bank_labels, num_classes=num_classes)
  out = {"linear_l2": l2}
  for name, found in (("knn", near), ("linear", linear.predict(classifier, queries))):
    out |= {f"{name}_{k}": v for k, v in accuracies(found, query_labels, parts).items()}
  with_even_bank = even(
    bank,
    bank_labels,
    queries,
    query_labels,
    num_classes=num_classes,
    k=k,
    temperature=temperature,
  )
  out |= {f"even_{name}": value for name, value in with_even_bank.items()}
  for name, classes in parts.items():
    out[f"classes_{name}"] = int(classes.size)
    if classes.size:
      out[f"images_{name}"] = float(np.isin(bank_labels, classes).mean())
  return out
