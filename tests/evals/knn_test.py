import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets, neighbors

from protojax import errors, local_devices
from protojax.evals import knn


def _unit(x):
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def reference_scores(bank, labels, queries, num_classes, k, temperature):
  similarity = _unit(queries) @ _unit(bank).T
  out = np.zeros((len(queries), num_classes))
  for m, row in enumerate(similarity):
    for n in np.argsort(-row, kind="stable")[:k]:
      out[m, labels[n]] += np.exp(row[n] / temperature)
  return out / out.sum(axis=1, keepdims=True)


def _random(num_bank=230, num_queries=57, dim=12, num_classes=7):
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(num_bank, dim)).astype(np.float32) * rng.uniform(0.1, 9, (num_bank, 1)),
    rng.integers(num_classes, size=num_bank),
    rng.normal(size=(num_queries, dim)).astype(np.float32),
    num_classes,
  )


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (230, 0.5)])
def test_scores_match_numpy(k, temperature):
  bank, labels, queries, num = _random()
  got = knn.scores(bank, labels, queries, num_classes=num, k=k, temperature=temperature)
  expected = reference_scores(bank, labels, queries, num, k, temperature)
  np.testing.assert_allclose(got, expected, atol=2e-5)
  got = knn.predict(bank, labels, queries, num_classes=num, k=k, temperature=temperature)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, expected.argmax(axis=1))


def test_digits_agree_with_scikit_learn():
  x, y = datasets.load_digits(return_X_y=True)
  peer = neighbors.KNeighborsClassifier(
    20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1.0 - d) / 0.07)
  ).fit(x[:1200], y[:1200])
  expected = peer.predict(x[1200:])
  got = np.asarray(knn.predict(x[:1200], y[:1200], x[1200:], num_classes=10))
  np.testing.assert_array_equal(got, expected)
  accuracy = knn.accuracy(x[:1200], y[:1200], x[1200:], y[1200:], num_classes=10)
  np.testing.assert_allclose(accuracy, np.mean(expected == y[1200:]))
  assert 0.9 < accuracy < 1.0


@pytest.mark.parametrize("chunk", [1, 10, 56, 57, 1000])
def test_chunks_do_not_change_the_scores(chunk):
  bank, labels, queries, num = _random()
  whole = knn.scores(bank, labels, queries, num_classes=num)
  parts = knn.scores(bank, labels, queries, num_classes=num, chunk=chunk)
  np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_near_neighbour_outvotes_many_far_ones():
  bank = np.array([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
  labels = np.array([0, 1, 1, 1])
  assert knn.predict(bank, labels, [[2.0, 0.0]], num_classes=2, k=4, temperature=0.07)[0] == 0
  assert knn.predict(bank, labels, [[2.0, 0.0]], num_classes=2, k=4, temperature=9.0)[0] == 1


def test_a_low_temperature_does_not_overflow():
  bank, labels, queries, num = _random()
  got = knn.scores(bank, labels, queries, num_classes=num, temperature=1e-4)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(np.asarray(got).sum(axis=1), 1.0, rtol=1e-5)


def test_ties_go_to_the_earlier_row_and_the_lower_class():
  bank = np.ones((6, 3))
  labels = np.array([4, 2, 2, 3, 3, 3])
  for k, winner in ((1, 4), (2, 2), (3, 2), (5, 2), (6, 3)):
    assert knn.predict(bank, labels, np.ones((1, 3)), num_classes=5, k=k)[0] == winner


def test_class_that_no_neighbour_has_gets_no_share():
  got = knn.scores(np.eye(3), [0, 1, 1], np.eye(3), num_classes=4, k=3)
  assert got.shape == (3, 4)
  np.testing.assert_array_equal(np.asarray(got)[:, 2:], 0.0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"k": 231}, "k=231 neighbours of a bank of 230 images"),
    ({"k": 0}, "choose 1 to 230"),
    ({"temperature": 0.0}, "must be positive"),
    ({"num_classes": 6}, "bank holds label 6, outside 0..5"),
  ],
)
def test_mistakes_are_one_line(change, message):
  bank, labels, queries, num = _random()
  with pytest.raises(errors.UserError, match=message) as caught:
    knn.predict(bank, labels, queries, **{"num_classes": num, **change})
  assert "\n" not in str(caught.value)


def test_unlabelled_queries_are_refused():
  bank, labels, queries, num = _random()
  with pytest.raises(errors.UserError, match="test set holds label -1"):
    knn.accuracy(bank, labels, queries, np.full(len(queries), -1), num_classes=num)


@pytest.mark.parametrize("part", [1, 3, 50, 229, 230, 1000])
def test_parts_of_the_bank_do_not_change_the_neighbours(part):
  bank, _, queries, _ = _random()
  similarity, rows = knn.nearest(bank, queries, k=31, part=part, chunk=10)
  cosine = _unit(queries) @ _unit(bank).T
  expected = np.argsort(-cosine, axis=1, kind="stable")[:, :31]
  np.testing.assert_array_equal(rows, expected)
  np.testing.assert_allclose(similarity, np.take_along_axis(cosine, expected, 1), atol=1e-6)


def test_equal_rows_in_several_parts_are_found_in_their_order():
  bank = np.tile([[1.0, 0.0], [0.0, 1.0]], (6, 1))
  _, rows = knn.nearest(bank, np.array([[3.0, 0.0], [0.0, 0.5]]), k=5, part=4)
  np.testing.assert_array_equal(rows, [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]])


def test_several_k_and_temperatures_at_once_are_those_one_at_a_time():
  bank, labels, queries, num = _random()
  right = np.random.default_rng(1).integers(num, size=len(queries))
  ks, temperatures = (3, 10, 200), (0.07, 0.5)
  got = knn.evaluate(
    bank, labels, queries, right, num_classes=num, ks=ks, temperatures=temperatures, part=60
  )
  for k in ks:
    for t in temperatures:
      expected = knn.accuracy(bank, labels, queries, right, num_classes=num, k=k, temperature=t)
      assert got[f"top1_k{k}_T{t:g}"] == expected
      votes = reference_scores(bank, labels, queries, num, k, t)
      order = np.argsort(-votes, axis=1, kind="stable")[:, :5]
      present = np.take_along_axis(votes, right[:, None], 1) > 0
      among = (order == right[:, None]).any(axis=1) & present[:, 0]
      assert got[f"top5_k{k}_T{t:g}"] == np.mean(among)
  assert len(got) == 12


def test_top5_needs_five_classes():
  bank, labels, queries, _ = _random(num_classes=4)
  got = knn.evaluate(bank, labels, queries, np.zeros(len(queries), int), num_classes=4, ks=(20,))
  assert set(got) == {"top1_k20_T0.07"}


def test_top5_never_credits_a_class_that_no_neighbour_has():
  bank, queries = np.eye(6), np.eye(6)[:2]
  got = knn.evaluate(bank, np.full(6, 3), queries, np.array([0, 3]), num_classes=6, ks=(2,))
  assert got == {"top1_k2_T0.07": 0.5, "top5_k2_T0.07": 0.5}


def test_more_neighbours_than_images_are_refused_at_every_k():
  bank, labels, queries, num = _random()
  for ks in ((10, 231), (0, 10)):
    with pytest.raises(errors.UserError, match="choose 1 to 230"):
      knn.evaluate(bank, labels, queries, np.zeros(57, int), num_classes=num, ks=ks)


def test_devices_share_the_queries_and_send_each_other_nothing():
  queries, *best = local_devices.split(
    (np.ones((64, 16)), np.zeros((64, 5)), np.zeros((64, 5), int))
  )
  part = jnp.ones((32, 16))
  lowered = knn._merge.lower(tuple(best), part, 0, 32, queries, chunk=8)
  text = lowered.compile().as_text()
  assert "top-k" in text or "topk" in text.lower()
  for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert collective not in text
