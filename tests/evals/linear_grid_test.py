import jax
import numpy as np
import pytest
from sklearn import datasets, linear_model

from protojax import errors
from protojax.evals import linear, linear_grid


def _digits():
  x, y = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(x))
  x, y = (x[order] / 16).astype(np.float32), y[order]
  layers = {"last": x, "half": x[:, :32]}
  return (
    {k: v[:1200] for k, v in layers.items()},
    y[:1200],
    {k: v[1200:] for k, v in layers.items()},
    y[1200:],
  )


def test_heads_trained_at_once_are_heads_trained_one_at_a_time():
  bank, y, _, _ = _digits()
  rows = np.arange(0, 1200, 2)
  options = {"num_classes": 10, "epochs": 2, "batch_size": 100}
  both = linear_grid.train(bank, y, rows, rates=(0.01, 0.1), **options)
  for i, rate in enumerate((0.01, 0.1)):
    alone = linear_grid.train({"last": bank["last"]}, y, rows, rates=(rate,), **options)
    for name in ("weight", "bias"):
      np.testing.assert_allclose(both["last"][name][i], alone["last"][name][0], atol=1e-6)


def test_a_head_is_sgd_with_momentum_and_cosine_in_numpy():
  bank, y, _, _ = _digits()
  x, rate, epochs, size, num = bank["last"].astype(np.float64), 0.5, 3, 64, 150
  rows = np.arange(100, 100 + num)
  got = linear_grid.train(
    bank, y, rows, num_classes=10, rates=(rate,), epochs=epochs, batch_size=size, seed=4
  )
  first = jax.random.normal(jax.random.fold_in(jax.random.key(4), 0), (64, 10))
  weight, bias = 0.01 * np.asarray(first, np.float64), np.zeros(10)
  velocity, rng = [np.zeros((64, 10)), np.zeros(10)], np.random.default_rng(4)
  for epoch in range(epochs):
    order = rng.permutation(rows)
    for step in range(2):  # 150 rows are two batches of 64
      some = order[step * size : (step + 1) * size]
      logits = x[some] @ weight + bias
      delta = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(10)[y[some]]
      gradients = x[some].T @ delta / size, delta.mean(axis=0)
      velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
      now = rate * size / 256 * (1 + np.cos(np.pi * (2 * epoch + step) / 6)) / 2
      weight, bias = weight - now * velocity[0], bias - now * velocity[1]
  np.testing.assert_allclose(got["last"]["weight"][0], weight, atol=1e-5)
  np.testing.assert_allclose(got["last"]["bias"][0], bias, atol=1e-5)


def test_honest_winner_is_near_scikit_learn_and_never_sees_the_test_images():
  bank, y, queries, right = _digits()
  options = {"num_classes": 10, "rates": (1e-4, 1e-1, 2.0), "epochs": 60, "batch_size": 32}
  got = linear_grid.evaluate(bank, y, queries, right, **options)
  assert got["layer"] == "last" and got["rate"] > 1e-4
  peer = linear_model.LogisticRegression(max_iter=1000).fit(bank["last"], y)
  assert abs(got["accuracy"] - peer.score(queries["last"], right)) < 0.02
  noise = np.random.default_rng(0).permutation(right)
  noisy = linear_grid.evaluate(bank, y, queries, noise, **options)
  assert noisy["accuracy"] < 0.3
  assert {**noisy, "accuracy": 0} == {**got, "accuracy": 0}


def test_paper_mode_reports_the_best_head_on_the_test_images():
  bank, y, queries, right = _digits()
  rates = (1e-3, 1e-1, 1.0)
  got = linear_grid.evaluate(
    bank, y, queries, right, num_classes=10, rates=rates, epochs=5, mode="paper"
  )
  heads = linear_grid.train(bank, y, np.arange(1200), num_classes=10, rates=rates, epochs=5)
  each = {
    (layer, rate): np.mean(
      (queries[layer] @ head["weight"][i] + head["bias"][i]).argmax(1) == right
    )
    for layer, head in jax.device_get(heads).items()
    for i, rate in enumerate(rates)
  }
  assert got["accuracy"] == max(each.values()) == each[got["layer"], got["rate"]]
  assert got["test_best_of_half"] == max(v for k, v in each.items() if k[0] == "half")


def test_a_head_that_diverged_never_wins():
  bank, y, queries, right = _digits()
  rates = (1e38, 0.1)
  got = linear_grid.evaluate(
    bank, y, queries, right, num_classes=10, rates=rates, epochs=5, mode="paper"
  )
  assert got["rate"] == 0.1
  with pytest.raises(errors.UserError, match="lower the learning rates"):
    linear_grid.evaluate(
      bank, y, queries, right, num_classes=10, rates=rates[:1], epochs=5, mode="paper"
    )


def test_held_out_tenth_needs_ten_images():
  with pytest.raises(errors.UserError, match="too few to hold a tenth out"):
    linear.held_out(np.zeros(9, int))
