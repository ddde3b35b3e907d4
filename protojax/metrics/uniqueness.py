"""Three counts of unique prototypes at all thresholds, and nearest neighbours, in one pass.

For checkpoints, on the host: every pair of rows is multiplied once, in blocks that fit the cache,
and only blocks with near pairs cost more. What a run watches while it trains is `pairwise.pairs`,
on the device, with the same definition and thresholds; a test holds the two equal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
from scipy import stats
from scipy.sparse import csgraph

from protojax.metrics import chance, pairwise

_BLOCK = 1024


class Uniqueness(NamedTuple):
  """What `measure` sees in [K, D] at T thresholds of cosine distance.

  Attributes:
    thresholds: as given.
    owner: int32 [T, K], representative of every row in the greedy cover (`pairwise.cover`); -1 for
      a row without a direction: zero or not finite.
    unique: int [T], representatives: definition 2.1 of arXiv 2510.20108, covered in index order.
    components: int [T], connected components of the rows nearer than the threshold (strictly).
      Chains, so never more than `unique`.
    isolated: int [T], rows with no other row nearer than the threshold. Never more than
      `components`.
    nearest: float32 [K], cosine distance to the nearest other row; inf without one.
  """

  thresholds: tuple[float, ...]
  owner: np.ndarray
  unique: np.ndarray
  components: np.ndarray
  isolated: np.ndarray
  nearest: np.ndarray


def _directions(prototypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Float32 unit rows of those rows that have a direction, and their indices."""
  rows = np.array(prototypes, np.float32)
  largest = np.abs(rows).max(axis=1, initial=0.0)
  kept = np.flatnonzero(np.isfinite(largest) & (largest > 0.0))
  rows = rows[kept] / largest[kept, None]  # first, so that no square overflows
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  return rows, kept


def _roots(parent: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
  """Smallest known member of the component of each of some rows, by union-find."""
  root = parent[rows]
  while not np.array_equal(higher := parent[root], root):
    root = higher
  parent[rows] = root
  return root


def _link(parent: np.ndarray, near: np.ndarray, rows: np.ndarray, there: slice) -> None:
  """Joins the components of near pairs, `near` [rows, there].

  One pair for every row and every column that still has one between two components, until there is
  none: the components that have such pairs become at most half as many each time, and never all
  pairs are listed.
  """
  while True:
    a, b = _roots(parent, rows), _roots(parent, there)
    if a.min() == a.max() == b.min() == b.max():
      return
    across = a[:, None] != b[None, :]
    across &= near
    if not across.any():
      return
    i, j = np.flatnonzero(across.any(axis=1)), np.flatnonzero(across.any(axis=0))
    one = np.concatenate([a[i], a[across[:, j].argmax(axis=0)]])
    other = np.concatenate([b[across[i].argmax(axis=1)], b[j]])
    names, edges = np.unique(np.stack([one, other]), return_inverse=True)
    one, other = edges.reshape(2, -1)
    graph = scipy.sparse.coo_matrix((np.ones(one.size), (one, other)), [names.size] * 2)
    _, label = csgraph.connected_components(graph, directed=False)
    # Names are sorted: the first with a label is the smallest of its component.
    parent[names] = names[np.unique(label, return_index=True)[1]][label]


def _cover(owner: np.ndarray, near: np.ndarray, rows: np.ndarray, there: slice) -> None:
  """A step of the greedy cover: rows that no earlier block represents, by leaders of this one."""
  free = np.flatnonzero(owner[rows] < 0)
  leading = near[free] & (owner[there] == np.arange(there.start, there.stop))[None, :]
  first = leading.argmax(axis=1)
  found = leading[np.arange(free.size), first]
  owner[rows[free[found]]] = there.start + first[found]


def _cover_itself(owner: np.ndarray, near: np.ndarray, rows: np.ndarray, here: slice) -> None:
  """The last step, within a block, row after row; what stays free leads itself."""
  owners = owner[here]
  for i, row in enumerate(rows):
    if owner[row] < 0:
      owners[near[i] & (owners < 0)] = row
      owner[row] = row


def measure(
  prototypes: np.ndarray, thresholds: Sequence[float] = pairwise.THRESHOLDS
) -> Uniqueness:
  """Compares all pairs of rows once: K * K * D multiplications on the host, in float32.

  Args:
    prototypes: [K, D], any norm and float dtype.
    thresholds: T cosine distances; each is counted for itself, strictly (distance < threshold).
  """
  rows, kept = _directions(prototypes)
  num, limits = len(rows), np.asarray(thresholds, np.float32)
  owner = np.full((len(limits), num), -1, np.int32)
  parent = np.tile(np.arange(num, dtype=np.int32), (len(limits), 1))
  nearest = np.full(num, np.inf, np.float32)
  for start in range(0, num, _BLOCK):
    here = slice(start, min(start + _BLOCK, num))
    for other in range(0, start + 1, _BLOCK):
      there = slice(other, min(other + _BLOCK, num))
      distance = rows[here] @ rows[there].T
      np.subtract(1.0, distance, out=distance)
      if other == start:
        np.fill_diagonal(distance, np.inf)
      closest = distance.min(axis=1)
      np.minimum(nearest[here], closest, out=nearest[here])
      np.minimum(nearest[there], distance.min(axis=0), out=nearest[there])
      for t in np.flatnonzero(limits > closest.min()):
        some = np.flatnonzero(closest < limits[t])
        near = (distance[some] if some.size < len(closest) else distance) < limits[t]
        (_cover if other < start else _cover_itself)(owner[t], near, start + some, there)
        _link(parent[t], near, start + some, there)
    for leaders in owner[:, here]:
      free = np.flatnonzero(leaders < 0)
      leaders[free] = start + free
  nearest = np.maximum(nearest, 0.0)
  owner_of_all = np.full((len(limits), len(prototypes)), -1, np.int32)
  owner_of_all[:, kept] = kept[owner]
  nearest_of_all = np.full(len(prototypes), np.inf, np.float32)
  nearest_of_all[kept] = nearest
  return Uniqueness(
    thresholds=tuple(thresholds),
    owner=owner_of_all,
    unique=(owner == np.arange(num)).sum(axis=1),
    components=(parent == np.arange(num)).sum(axis=1),
    isolated=(nearest >= limits[:, None]).sum(axis=1),
    nearest=nearest_of_all,
  )


def largest_groups(owner: np.ndarray, most: int) -> list[np.ndarray]:
  """Finds the largest groups of copies of a row of `Uniqueness.owner`, int [K].

  Args:
    owner: a representative for each prototype.
    most: groups at most; one with a single member is none.

  Returns:
    Indices of the members, ascending; the largest group first, of two alike the earlier.
  """
  leaders, counts = np.unique(owner[owner >= 0], return_counts=True)
  order = np.argsort(-counts, kind="stable")[:most]
  return [np.flatnonzero(owner == leaders[i]) for i in order if counts[i] > 1]


class Null(NamedTuple):
  """What random unit rows of the same K and D score.

  Attributes:
    unique, components, isolated: int [T].
    drawn: whether they were counted on drawn rows. If not, fewer than 1e-3 pairs are expected to be
      near at any threshold, so that all K are unique.
  """

  unique: np.ndarray
  components: np.ndarray
  isolated: np.ndarray
  drawn: bool


def null(num: int, dim: int, thresholds: Sequence[float] = pairwise.THRESHOLDS) -> Null:
  """Counts as `measure` does, for random prototypes of the same K and D: what could be reached.

  Those of `chance.random_prototypes`, drawn only where near pairs are to be expected.
  """
  if chance.all_apart(num, dim, thresholds):
    counts = np.full(len(thresholds), num)
    return Null(counts, counts, counts, False)
  drawn = measure(np.asarray(chance.random_prototypes(num, dim)), thresholds)
  return Null(drawn.unique, drawn.components, drawn.isolated, True)


def null_nearest(num: int, dim: int, quantiles: Sequence[float] | np.ndarray) -> np.ndarray:
  """Quantiles of the distance of a random row to its nearest of K: float64, exact."""
  if num == 1:
    return np.full(len(quantiles), np.inf)
  if dim == 1:  # 0 to one of the same sign, 2 to the others
    return np.where(np.asarray(quantiles) > 1.0 - 0.5 ** (num - 1), 2.0, 0.0)
  # No row is nearer than d with probability (1 - P(pair nearer than d)) ** (K - 1).
  pair = -np.expm1(np.log1p(-np.asarray(quantiles)) / (num - 1))
  return 2 * stats.beta.ppf(pair, (dim - 1) / 2, (dim - 1) / 2)
