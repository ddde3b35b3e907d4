"""An exponential long tail of a labelled source (arXiv 1901.05555)."""

import numpy as np

from protojax import errors
from protojax.data.sources import source


def long_tail(data: source.Source, factor: float, seed: int) -> source.Source:
  """Keeps n_0 factor^(-c / (C - 1)) images of class c, n_0 the most with which no class runs out.

  They are the first in an order drawn from (seed, c). `tail_split` of the result says which classes
  have "many" images, more than 100, a "medium" number, 20 to 100, or "few" (arXiv 1904.05160).

  Args:
    data: labelled, two classes or more.
    factor: images of the largest class over those of the smallest, at least 1.
    seed: any integer.

  Raises:
    UserError: without labels, or for a factor out of range.
  """
  source.require_labels(data, f"imbalance={factor}")
  if not factor >= 1.0 or data.num_classes < 2:
    raise errors.UserError(
      f"imbalance={factor} must be at least 1, largest class over smallest, of two classes or more"
    )
  members = [np.flatnonzero(data.labels == c) for c in range(data.num_classes)]
  share = float(factor) ** (-np.arange(len(members)) / (len(members) - 1))
  # A hair above: 5000 * 100 ** -1 must be 50, not 49.
  counts = np.floor(min(np.array([len(m) for m in members]) / share) * share + 1e-6).astype(int)
  if counts.min() < 1:
    raise errors.UserError(
      f"imbalance={factor} leaves a class of {data.name} without images: lower it"
    )
  kept = []
  for c, (member, count) in enumerate(zip(members, counts, strict=True)):
    # Raw words of a SeedSequence: NumPy promises that they never change.
    draw = np.random.SeedSequence([seed % 2**32, c]).generate_state(len(member), np.uint64)
    kept.append(member[np.argsort(draw, kind="stable")[:count]])
  split = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
  return data.subset(
    np.sort(np.concatenate(kept)),
    f"{data.name} (imbalance {factor:g})",
    {name: np.flatnonzero(classes).tolist() for name, classes in split.items()},
  )
