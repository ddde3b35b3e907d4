import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets, linear_model, model_selection, preprocessing

from protojax import errors, local_devices
from protojax.evals import linear


def _digits():
  x, y = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(x))
  x, y = x[order].astype(np.float32), y[order]
  return x[:1200], y[:1200], x[1200:], y[1200:]


def _probe(num_classes, dim, **options):
  """Compiled: one program costs less time than its operations one by one."""
  return linear.OnlineProbe(*map(jax.jit, linear.online_probe(num_classes, dim, **options)))


def _train(probe, x, y, *, steps=300, size=64):
  state, update = probe.init(jax.random.key(0)), probe.update
  rng = np.random.default_rng(0)
  for _ in range(steps):
    rows = rng.integers(len(x), size=size)
    state, metrics = update(state, x[rows], y[rows])
  return state, metrics


def test_online_probe_gives_the_features_no_gradient():
  probe = _probe(3, 4)
  state = probe.init(jax.random.key(0))
  features = jax.random.normal(jax.random.key(1), (8, 4))
  state, _ = probe.update(state, features, jnp.arange(8) % 3)  # weights are no longer zero

  def everything(features):
    new, metrics = probe.update(state, features, jnp.arange(8) % 3)
    leaves = jax.tree.leaves((new["params"], new["mean"], new["var"], metrics))
    return sum(jnp.sum(leaf**2) for leaf in leaves)

  assert float(everything(features)) != float(everything(2.0 * features + 1.0))
  np.testing.assert_array_equal(jax.jit(jax.grad(everything))(features), 0.0)


def test_first_loss_is_that_of_a_guess_and_one_step_matches_adam():
  probe = _probe(5, 3, learning_rate=0.01)
  x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
  y = np.arange(20) % 5
  state, metrics = probe.update(probe.init(jax.random.key(0)), x, y)
  np.testing.assert_allclose(metrics["probe/linear_loss"], np.log(5), rtol=1e-6)
  np.testing.assert_allclose(metrics["probe/linear_train"], np.mean(y == 0), rtol=1e-6)
  z = (x - x.mean(0)) / x.std(0)
  grad = z.T @ (np.full((20, 5), 0.2) - np.eye(5)[y]) / 20
  # Adam's first step is the learning rate against the gradient's sign.
  np.testing.assert_allclose(state["params"]["weight"], -0.01 * np.sign(grad), rtol=1e-3)


@pytest.mark.parametrize(("scale", "offset"), [(1e-6, 0.0), (1e-3, 1.0), (1e4, 0.0)])
def test_online_probe_learns_digits_at_any_scale_of_the_features(scale, offset):
  x, y, test_x, test_y = _digits()
  x, test_x = (scale * a / 16 + offset for a in (x, test_x))
  state, metrics = _train(_probe(10, 64, learning_rate=1e-2), x, y)
  accuracy = np.mean(np.asarray(linear.online_probe(10, 64).predict(state, test_x)) == test_y)
  assert accuracy > 0.9
  assert metrics["probe/linear_train"] > 0.85


def test_unlabelled_rows_have_no_effect():
  probe = _probe(3, 4)
  x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
  y = np.array([0, 1, 2, 0, 1, 2, -1, -1, -1])
  x[6:] *= 1e3
  state = probe.init(jax.random.key(0))
  with_, metrics = probe.update(*probe.update(state, x, y)[:1], x, y)
  without, expected = probe.update(*probe.update(state, x[:6], y[:6])[:1], x[:6], y[:6])
  chex.assert_trees_all_close(with_, without, rtol=1e-5, atol=1e-7)
  chex.assert_trees_all_close(metrics, expected, rtol=1e-5)


def test_batch_without_labels_changes_no_statistics():
  probe = _probe(3, 4)
  state = probe.init(jax.random.key(0))
  new, metrics = probe.update(state, jnp.full((2, 4), 9.0), jnp.array([-1, -1]))
  assert metrics == {"probe/linear_loss": 0.0, "probe/linear_train": 0.0}
  chex.assert_trees_all_equal(
    {k: new[k] for k in ("params", "mean", "var", "seen")},
    {k: state[k] for k in ("params", "mean", "var", "seen")},
  )


def test_online_state_keeps_its_shapes_and_types():
  """It is carried through a donated, compiled step."""
  probe = _probe(3, 4)
  state = jax.eval_shape(probe.init, jax.random.key(0))
  new, _ = jax.eval_shape(
    probe.update,
    state,
    jax.ShapeDtypeStruct((8, 4), jnp.bfloat16),
    jax.ShapeDtypeStruct((8,), jnp.int32),
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
  assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_fit_is_scikit_learns_logistic_regression(l2):
  x, y, test_x, test_y = _digits()
  got = linear.fit(x, y, num_classes=10, l2=l2, max_steps=500)
  scaler = preprocessing.StandardScaler().fit(x)
  peer = linear_model.LogisticRegression(C=1 / (len(x) * l2), max_iter=2000, tol=1e-6)
  peer.fit(scaler.transform(x), y)

  predicted, expected = linear.predict(got, test_x), peer.predict(scaler.transform(test_x))
  assert np.mean(predicted == expected) > 0.99
  assert abs(np.mean(predicted == test_y) - np.mean(expected == test_y)) < 0.01
  np.testing.assert_allclose(got.weight, peer.coef_.T, atol=0.02 * np.abs(peer.coef_).max())


def test_fit_ignores_constant_dimensions_and_offsets():
  x, y, test_x, _ = _digits()
  plain = linear.predict(linear.fit(x, y, num_classes=10, l2=1e-2), test_x)

  def moved(a):
    return np.concatenate([1e-2 * a + 5.0, np.full((len(a), 3), 7.0, np.float32)], axis=1)

  got = linear.fit(moved(x), y, num_classes=10, l2=1e-2)
  np.testing.assert_array_equal(got.scale[-3:], 0.0)
  assert np.mean(linear.predict(got, moved(test_x)) == plain) > 0.99


def test_evaluate_is_within_a_point_of_scikit_learn_and_deterministic():
  x, y, test_x, test_y = _digits()
  result = linear.evaluate(x, y, test_x, test_y, num_classes=10)
  scaler = preprocessing.StandardScaler().fit(x)
  peer = model_selection.GridSearchCV(
    linear_model.LogisticRegression(max_iter=1000),
    {"C": [1 / (len(x) * s) for s in linear._STRENGTHS]},
    cv=3,
  ).fit(scaler.transform(x), y)
  assert abs(result["linear"] - peer.score(scaler.transform(test_x), test_y)) < 0.01
  assert result == linear.evaluate(x, y, test_x, test_y, num_classes=10)
  assert set(result) == {"linear", "l2", "held_out", "train"}
  # Also where the images come class by class.
  order = np.argsort(y, kind="stable")
  result = linear.evaluate(x[order], y[order], test_x, test_y, num_classes=10, strengths=(1e-2,))
  assert result["held_out"] > 0.9


def test_strength_is_chosen_without_the_test_images():
  """Labels of the test set are noise here: choice and refit must not notice."""
  x, y, test_x, test_y = _digits()
  noise = np.random.default_rng(0).permutation(test_y)
  clean = linear.evaluate(x, y, test_x, test_y, num_classes=10, strengths=(1.0, 1e-3))
  noisy = linear.evaluate(x, y, test_x, noise, num_classes=10, strengths=(1.0, 1e-3))
  assert noisy["linear"] < 0.3 < clean["linear"]
  assert [noisy[k] for k in ("l2", "held_out", "train")] == [
    clean[k] for k in ("l2", "held_out", "train")
  ]


def test_stronger_penalty_wins_where_features_are_noise():
  rng = np.random.default_rng(0)
  signal = rng.integers(2, size=300)
  x = rng.normal(size=(300, 120)).astype(np.float32)
  x[:, 0] += 2.0 * signal
  chosen = linear.evaluate(x, signal, x, signal, num_classes=2, strengths=(1.0, 1e-5))
  assert chosen["l2"] == 1.0


def test_weaker_penalties_are_left_out_once_two_in_a_row_were_worse(monkeypatch):
  tried = []
  wrong = {8: 5, 7: 3, 6: 4, 5: 3, 4: 5, 3: 4, 2: 0, 1: 0}  # of the 10 held out, by strength

  def fit(features, labels, *, l2, **unused):
    tried.append(l2)
    return l2

  def predict(l2, features):
    return np.where(np.arange(len(features)) < wrong[l2], 1, 0)

  monkeypatch.setattr(linear, "fit", fit)
  monkeypatch.setattr(linear, "predict", predict)
  x, y = np.zeros((100, 2)), np.zeros(100, int)
  result = linear.evaluate(x, y, x, y, num_classes=2, strengths=tuple(wrong))
  # 6 alone was worse, 5 as good as the best; 4 and 3 end it, and the stronger of equals is fitted.
  assert tried == [8, 7, 6, 5, 4, 3, 7]
  assert result["l2"] == 7 and result["held_out"] == 0.7


def test_held_out_tenth_holds_every_class():
  labels = np.repeat(np.arange(5), (400, 300, 200, 80, 20))
  held = linear.held_out(labels)
  np.testing.assert_array_equal(np.bincount(labels[held]), [40, 30, 20, 8, 2])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda x, y: (x, y - 1), "labels must be 0 to 9"),
    (lambda x, y: (np.where(x > 15, np.nan, x), y), "NaN or infinity"),
    (lambda x, y: (x[:9], y[:9]), "9 training images are too few"),
  ],
)
def test_mistakes_are_one_line(change, message):
  x, y, test_x, test_y = _digits()
  with pytest.raises(errors.UserError, match=message) as caught:
    linear.evaluate(*change(x, y), test_x, test_y, num_classes=10)
  assert "\n" not in str(caught.value)


def test_images_in_parts_over_devices_are_the_same_loss_and_gradient():
  x, y, _, _ = _digits()
  shape, flat = (65, 10), np.random.default_rng(1).normal(size=650).astype(np.float32) / 100
  plain = optax.softmax_cross_entropy_with_integer_labels(
    x @ flat.reshape(shape)[:-1] + flat.reshape(shape)[-1], y
  )
  expected = plain.mean() + 0.05 * np.sum(flat.reshape(shape)[:-1] ** 2)
  images = local_devices.split((x, y.astype(np.int32), np.full(1200, 1 / 1200, np.float32)), 8 * 3)
  assert images[0].shape == (1344, 64)  # 8 devices x 3 parts x 8
  value, grad = linear._objective(flat, images, 0.1, 1.0, shape=shape, parts=3)
  whole = linear._objective(flat, images, 0.1, 1.0, shape=shape, parts=1)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  chex.assert_trees_all_close((value, grad), whole, rtol=1e-5, atol=1e-7)


def test_a_device_holds_its_share_of_the_images_and_one_part_of_the_logits():
  """What a fitted probe of ImageNet needs on a chip is decided here; 16 parts, 8 devices."""
  num, dim, classes, parts = 2**17, 128, 1000, 16
  over = local_devices.split(np.zeros(8, np.float32)).sharding
  rows = {
    "inputs": jax.ShapeDtypeStruct((num, dim), np.float32, sharding=over),
    "labels": jax.ShapeDtypeStruct((num,), np.int32, sharding=over),
    "share": jax.ShapeDtypeStruct((num,), np.float32, sharding=over),
  }
  flat = jax.ShapeDtypeStruct(((dim + 1) * classes,), np.float32)
  shape = (dim + 1, classes)
  lowered = linear._objective.lower(flat, tuple(rows.values()), 0.1, 1.0, shape=shape, parts=parts)
  memory = lowered.compile().memory_analysis()
  logits = 4 * num // 8 // parts * classes
  assert memory.argument_size_in_bytes < 1.2 * 4 * (num // 8 * (dim + 2) + (dim + 1) * classes)
  assert memory.temp_size_in_bytes < 4 * logits
