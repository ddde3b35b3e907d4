"""Which class the images of each code have, and how pure that makes the code."""

import numpy as np


def majority(codes: np.ndarray, labels: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
  """The most frequent class of every code and its share of the code's images.

  Args:
    codes: int [N], 0 to num - 1.
    labels: int [N], at least 0.
    num: K.

  Returns:
    (int32 [K], float32 [K]): of equally frequent classes the lowest; -1 and NaN for a code that no
    image has.
  """
  codes, labels = np.asarray(codes, np.int64), np.asarray(labels, np.int64)
  classes = int(labels.max(initial=0)) + 1
  # Pairs that occur, never a table of all: K may be 65,536 and the classes thousands.
  pairs, counts = np.unique(codes * classes + labels, return_counts=True)
  most = np.zeros(num, np.int64)
  np.maximum.at(most, pairs // classes, counts)
  label = np.full(num, -1, np.int32)
  best = (counts == most[pairs // classes])[::-1]  # the lowest class is written last
  label[(pairs // classes)[::-1][best]] = (pairs % classes)[::-1][best]
  total = np.bincount(codes, minlength=num)
  share = np.where(total > 0, most / np.maximum(total, 1), np.nan)
  return label, share.astype(np.float32)
