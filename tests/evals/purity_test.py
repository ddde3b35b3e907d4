"""The most frequent class of every code."""

import numpy as np

from protojax.evals import purity


def test_purity_is_that_of_the_contingency_table():
  rng = np.random.default_rng(0)
  codes, labels = rng.integers(0, 20, 300), rng.integers(0, 7, 300)
  labels[labels == 3] = 4  # a class without images keeps its number
  codes[codes == 5] = 6
  most, share = purity.majority(codes, labels, 25)
  table = np.zeros((25, 7), int)
  np.add.at(table, (codes, labels), 1)
  used = table.sum(axis=1) > 0
  np.testing.assert_array_equal(most[used], table.argmax(axis=1)[used])
  np.testing.assert_allclose(share[used], (table.max(axis=1) / table.sum(axis=1).clip(1))[used])
  assert (most[~used] == -1).all() and np.isnan(share[~used]).all() and (~used).sum() == 6
