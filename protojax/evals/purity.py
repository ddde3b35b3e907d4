"""Which class the images of each code have, and how pure that makes the code."""

import numpy as np
from sklearn.metrics import cluster


def majority(codes: np.ndarray, labels: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
  """Finds the most frequent class of every code and its share of the code's images.

  Args:
    codes: int [N], 0 to num - 1.
    labels: int [N], at least 0.
    num: K.

  Returns:
    (int32 [K], float32 [K]): of equally frequent classes the lowest; -1 and NaN for a code that no
    image has.
  """
  # Sparse, with the classes and codes that occur: K may be 65,536 and the classes thousands.
  table = cluster.contingency_matrix(labels, codes, sparse=True).tocoo()
  order = np.lexsort((table.row, -table.data, table.col))  # a code's most frequent class first
  best = order[np.unique(table.col[order], return_index=True)[1]]
  occurring, counts = np.unique(codes, return_counts=True)
  label, share = np.full(num, -1, np.int32), np.full(num, np.nan, np.float32)
  label[occurring] = np.unique(labels)[table.row[best]]
  share[occurring] = table.data[best] / counts
  return label, share


def purity(codes: np.ndarray, labels: np.ndarray) -> float:
  """Share of rows that are of the most frequent class of their code, 0 to 1; 1 for a code a row.

  Args:
    codes: int [N].
    labels: int [N].
  """
  table = cluster.contingency_matrix(labels, codes, sparse=True)
  return float(table.max(axis=0).sum() / len(labels))
