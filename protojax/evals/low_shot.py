"""Logistic regression on a few labelled images a class, as in arXiv 2104.14294 and 2204.07141.

Published strengths are traps: "lambda = .1 / n" multiplies the *mean* loss over n images; without
the / n it is another classifier, seven points worse on 1 % of ImageNet. Here it is fixed, not
tuned: one image a class leaves none to tune it on, and a choice on test images would flatter.
"""

from collections.abc import Sequence

import numpy as np

from protojax import errors, progress
from protojax.evals import linear


def subset(
  labels: np.ndarray, *, seed: int, per_class: int | None = None, share: float | None = None
) -> np.ndarray:
  """Rows of the same number, or the same share, of every class, drawn without replacement.

  Args:
    labels: int [N], 0 to C - 1; a class without images is left out.
    seed: draws the rows; more of a class are the fewer and some besides.
    per_class: images of every class, or
    share: 0 to 1, rounded to images, but one at least.

  Returns:
    int64 [n], ascending.

  Raises:
    UserError: if a class has fewer than `per_class` images.
  """
  labels = np.asarray(labels)
  order = np.lexsort((np.random.default_rng(seed).random(labels.size), labels))
  classes, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
  if per_class is not None and (few := counts < per_class).any():
    raise errors.UserError(
      f"low-shot: class {classes[few][0]} has {counts[few][0]} of the {per_class} images a class "
      "asked for: ask for fewer"
    )
  if per_class is None:
    takes = np.maximum(np.rint(share * counts), 1).astype(int)
  else:
    takes = np.full(counts.size, per_class)
  rows = [order[start : start + take] for start, take in zip(starts, takes, strict=True)]
  return np.sort(np.concatenate(rows))


def unit(features: np.ndarray) -> np.ndarray:
  """float32 [N, D] with rows of unit length; a row of zeros stays one."""
  # Not sklearn's normalize: its last digits are others, and move an image of published accuracies.
  features = np.asarray(features, np.float32)
  return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def fit(
  few: np.ndarray,
  labels: np.ndarray,
  *,
  num_classes: int,
  strength: float = 0.1,
  max_steps: int = 500,
) -> linear.Classifier:
  """Logistic regression without bias, penalty lambda / 2 |weight|^2 on the mean cross entropy.

  Args:
    few: [n, D] of unit length, see `unit`.
    labels: int [n].
    num_classes: C.
    strength: lambda = strength / n: scikit-learn's C = 1 / strength, whatever n. .1 is that of
      arXiv 2104.14294, .0025 that of arXiv 2204.07141.
    max_steps: of L-BFGS.

  Raises:
    UserError: as `linear.fit`.
  """
  return linear.fit(
    few,
    labels,
    num_classes=num_classes,
    l2=strength / len(few),
    max_steps=max_steps,
    standardise=False,
    intercept=False,
  )


def evaluate(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  query_labels: np.ndarray,
  *,
  num_classes: int,
  shares: Sequence[float] = (0.01, 0.1),
  per_class: Sequence[int] = (1, 2, 5),
  seeds: Sequence[int] = (0, 1, 2, 3, 4),
  strength: float = 0.1,
  max_steps: int = 500,
) -> dict[str, float]:
  """Accuracy on all test images after fitting to few, over several draws of the few.

  Features are made of unit length; the classifier is `fit`'s.

  Args:
    bank: [N, D], what the few are drawn from.
    bank_labels: int [N].
    queries: [M, D].
    query_labels: int [M].
    num_classes: C.
    shares: of every class; see `subset`.
    per_class: images of every class.
    seeds: one draw each; two or more.
    strength, max_steps: of `fit`.

  Returns:
    {"1_per_class_mean", "1_per_class_std", ..., "1_percent_mean", "1_percent_std", ...}: mean and
    standard deviation (n - 1) over the draws of the accuracy, 0 to 1; and "1_percent_images", ...

  Raises:
    UserError: as `subset` and `linear.fit`.
  """
  bank, queries = unit(bank), unit(queries)
  bank_labels, query_labels = np.asarray(bank_labels), np.asarray(query_labels)
  few = {f"{n}_per_class": {"per_class": n} for n in per_class}
  few |= {f"{100 * share:g}_percent": {"share": share} for share in shares}
  out = {}
  with progress.Line("fitting to few images", len(few) * len(seeds)) as line:
    for name, size in few.items():
      found = []
      for seed in seeds:
        rows = subset(bank_labels, seed=seed, **size)
        classifier = fit(
          bank[rows],
          bank_labels[rows],
          num_classes=num_classes,
          strength=strength,
          max_steps=max_steps,
        )
        found.append(np.mean(linear.predict(classifier, queries) == query_labels))
        line.step()
      out[f"{name}_mean"] = float(np.mean(found))
      out[f"{name}_std"] = float(np.std(found, ddof=1)) if np.ptp(found) else 0.0
      out[f"{name}_images"] = int(rows.size)
  return out
