"""How well codes agree with classes, and how well codes drawn by chance would.

Mutual information grows with the number of codes by chance alone: 16,384 uniformly random codes of
the 10,000 test images of CIFAR-10 have an NMI of .35. So every value stands beside its chance.
"""

import warnings

import jax
import numpy as np
import scipy.optimize
from scipy import stats
from sklearn import metrics, preprocessing
from sklearn.metrics import cluster

from protojax import errors
from protojax.evals import purity
from protojax.prototypes import kmeans

_NMI = metrics.normalized_mutual_info_score  # arithmetic mean of the entropies


def hungarian_accuracy(codes: np.ndarray, labels: np.ndarray) -> float:
  """Share of rows that the best one-to-one matching of codes and classes gets right, 0 to 1.

  Args:
    codes: int [N].
    labels: int [N].
  """
  table = cluster.contingency_matrix(labels, codes)
  right = scipy.optimize.linear_sum_assignment(table, maximize=True)
  return float(table[right].sum() / len(labels))


def _score(measure, labels: np.ndarray, codes: np.ndarray) -> float:
  with warnings.catch_warnings():
    # scikit-learn 1.7 takes labels for a regression's where most rows have one of their own.
    warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
    return float(measure(labels, codes))


def chance_nmi(labels: np.ndarray, num_codes: int, *, draws: int = 5, seed: int = 0) -> float:
  """Computes the NMI that codes drawn by chance would have with these labels.

  The mean over draws, arithmetic, with uniformly random codes 0 to num_codes - 1.

  Args:
    labels: int [N].
    num_codes: as many as the prototypes, used or not.
    draws: of the codes.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)
  codes = [rng.integers(num_codes, size=len(labels)) for _ in range(draws)]
  return float(np.mean([_score(_NMI, labels, each) for each in codes]))


def evaluate(
  codes: np.ndarray,
  labels: np.ndarray,
  *,
  num_codes: int,
  num_classes: int,
  draws: int = 5,
  seed: int = 0,
) -> dict[str, float]:
  """Agreement of codes with classes, each beside its chance; entropies in the arithmetic mean.

  Args:
    codes: int [N], 0 to num_codes - 1.
    labels: int [N], 0 to num_classes - 1.
    num_codes: K.
    num_classes: C.
    draws: of the chance values.
    seed: of the draws.

  Returns:
    "nmi", "ami", "ari"; "nmi_permuted": mean NMI of these codes with permuted labels;
    "nmi_above_permuted": the difference; "nmi_uniform": `chance_nmi`; "used": codes that occur;
    "perplexity": exp of the entropy of their histogram; with K <= C "hungarian", of the best
    one-to-one matching, else "purity", of a majority vote on these same rows, and
    "purity_permuted", its mean with permuted labels.
  """
  codes, labels = np.asarray(codes), np.asarray(labels)
  rng = np.random.default_rng(seed)
  permuted = [rng.permutation(labels) for _ in range(draws)]
  counts = np.bincount(codes, minlength=num_codes)
  nmi, by_chance = _score(_NMI, labels, codes), [_score(_NMI, each, codes) for each in permuted]
  out = {
    "nmi": nmi,
    "ami": _score(metrics.adjusted_mutual_info_score, labels, codes),
    "ari": _score(metrics.adjusted_rand_score, labels, codes),
    "nmi_permuted": float(np.mean(by_chance)),
    "nmi_above_permuted": nmi - float(np.mean(by_chance)),
    "nmi_uniform": chance_nmi(labels, num_codes, draws=draws, seed=seed),
    "used": int(np.count_nonzero(counts)),
    "perplexity": float(np.exp(stats.entropy(counts))),
  }
  if num_codes <= num_classes:
    return out | {"hungarian": hungarian_accuracy(codes, labels)}
  return out | {
    "purity": purity.purity(codes, labels),
    "purity_permuted": float(np.mean([purity.purity(codes, each) for each in permuted])),
  }


def kmeans_codes(
  bank: np.ndarray,
  queries: np.ndarray,
  *,
  num_clusters: int,
  num_steps: int = 50,
  num_restarts: int = 10,
  seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Codes of k-means on features of unit length, fitted to the bank alone.

  Starts are random rows, so the order of the bank tells nothing of its classes.

  Args:
    bank: [N, D].
    queries: [M, D].
    num_clusters: K, at most N.
    num_steps: Lloyd's iterations.
    num_restarts: the one with the least inertia is taken.
    seed: of the starts.

  Returns:
    (codes of the bank int32 [N], of the queries [M]).

  Raises:
    UserError: for a bank of fewer than K images.
  """
  if len(bank) < num_clusters:
    raise errors.UserError(
      f"k-means: {num_clusters} clusters of a bank of {len(bank)} images: give more images"
    )

  bank, queries = (preprocessing.normalize(np.asarray(x, np.float32)) for x in (bank, queries))
  found = kmeans.fit_by_starts(
    bank,
    jax.random.key(seed),
    num_clusters=num_clusters,
    num_steps=num_steps,
    num_restarts=num_restarts,
  )
  centroids = np.asarray(found.centroids)
  nearness = queries @ centroids.T - 0.5 * np.square(centroids).sum(axis=1)[None, :]
  return np.asarray(found.codes), nearness.argmax(axis=1).astype(np.int32)
