"""What random prototypes score: as many as a run has, uniform on the sphere.

K rows of D dimensions stand only so far apart, whatever moves them. A count of unique prototypes
means something beside the count of these.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from scipy import special

from protojax.metrics import pairwise

_NEGLIGIBLE = 1e-3  # expected near pairs of random rows, below which there are none


def random_prototypes(num: int, dim: int) -> jax.Array:
  """Draws prototypes uniformly from the sphere, the same ones every time: float32 [K, D]."""
  return pairwise.unit_rows(jax.random.normal(jax.random.key(0), (num, dim)))


def near_share(dim: int, threshold: float) -> float:
  """Probability that two random prototypes of D dimensions are nearer than `threshold`.

  They are uniform on the sphere: half of a cosine distance is distributed as
  Beta((D - 1) / 2, (D - 1) / 2).
  """
  if dim == 1:
    return 0.5  # the same sign
  return float(special.betainc((dim - 1) / 2, (dim - 1) / 2, min(threshold / 2, 1.0)))


def near_pairs(num: int, dim: int, threshold: float) -> float:
  """Expected number of pairs of K random prototypes that are nearer than `threshold`."""
  return num * (num - 1) / 2 * near_share(dim, threshold)


def all_apart(num: int, dim: int, thresholds: Sequence[float] = pairwise.THRESHOLDS) -> bool:
  """Whether random prototypes have room: fewer than 1e-3 pairs are expected to be near at any."""
  return near_pairs(num, dim, max(thresholds)) < _NEGLIGIBLE


@functools.cache
def random_unique(
  num: int, dim: int, thresholds: Sequence[float] = pairwise.THRESHOLDS
) -> np.ndarray:
  """Counts the unique ones of random prototypes, as many as K and D allow: int [T].

  Of `random_prototypes`, counted once a process up to the largest threshold with near pairs: where
  fewer than 1e-3 pairs are expected to be near, all K are unique and none is compared.
  """
  counts = np.full(len(thresholds), num)
  crowded = [t for t, limit in enumerate(thresholds) if not all_apart(num, dim, (limit,))]
  if crowded:
    limits = tuple(thresholds[t] for t in crowded)
    counts[crowded] = pairwise.unique_counts(random_prototypes(num, dim), limits)
  counts.setflags(write=False)
  return counts
