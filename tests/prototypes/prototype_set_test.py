import jax
import numpy as np
import pytest
import tiny

from protojax import errors
from protojax.prototypes import prototype_set


def _set(kind, **changes):
  return prototype_set.build(tiny.config("dino", kind, **changes))


@pytest.mark.parametrize("kind", ["learned", "mixture", "frozen"])
def test_rows_start_as_different_unit_directions(kind):
  rows = _set(kind).rows(_set(kind).init(jax.random.key(0)))
  assert rows.shape == (32, 16)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
  cosines = np.asarray(rows @ rows.T) - np.eye(32)
  assert cosines.max() < 0.95


def test_only_a_mixture_moves():
  features = jax.random.normal(jax.random.key(1), (64, 16))
  for kind in ("learned", "mixture", "frozen"):
    prototypes = _set(kind)
    start = prototypes.init(jax.random.key(0))
    moved = np.abs(prototypes.rows(prototypes.move(start, features)) - prototypes.rows(start)).max()
    assert (moved > 1e-4) == (kind == "mixture")


@pytest.mark.parametrize("shared", [False, True])
def test_sets_for_kinds_of_token_move_on_their_own_or_on_all_tokens(shared):
  one = _set("mixture")
  prototypes = prototype_set.several(one, ("a", "b"), shared=shared)
  start = prototypes.init(jax.random.key(0))
  features = {
    "a": jax.random.normal(jax.random.key(1), (8, 2, 16)),
    "b": jax.random.normal(jax.random.key(2), (8, 2, 3, 16)),
  }
  rows = prototypes.rows(prototypes.move(start, features))
  flat = {kind: np.asarray(x).reshape(-1, 16) for kind, x in features.items()}
  if shared:
    flat = dict.fromkeys(flat, np.concatenate(list(flat.values())))
  for kind, x in flat.items():
    state = start if shared else start[kind]
    np.testing.assert_allclose(rows[kind], one.rows(one.move(state, x)), atol=1e-5)
    aligned = prototypes.align(start, features)[kind]
    np.testing.assert_allclose(aligned, one.align(state, features[kind]), atol=1e-6)
  assert np.array_equal(rows["a"], rows["b"]) == shared


def test_learned_norms_scale_the_rows():
  prototypes = _set("learned", method__train_prototype_norm=True)
  state = prototypes.init(jax.random.key(0))
  doubled = {**state, "g": 2.0 * state["g"]}
  np.testing.assert_allclose(prototypes.rows(doubled), 2.0 * prototypes.rows(state), rtol=1e-6)


def test_centred_mixture_puts_the_loss_into_its_coordinates():
  features = jax.random.normal(jax.random.key(1), (64, 16)) + 3.0
  prototypes = _set("mixture", mixture__center_features=True)
  state = prototypes.move(prototypes.init(jax.random.key(0)), features)
  aligned = np.asarray(prototypes.align(state, features))
  directions = aligned / np.linalg.norm(aligned, axis=1, keepdims=True)
  assert np.linalg.norm(directions.mean(axis=0)) < 0.2
  plain = _set("mixture", mixture__center_features=False)
  np.testing.assert_array_equal(plain.align(plain.init(jax.random.key(0)), features), features)


def test_beta_schedule_is_the_config_s():
  """After the ramp a posterior is as soft as its last beta, not as its first."""
  features = jax.random.normal(jax.random.key(1), (64, 16))
  ramp = _set("mixture", mixture__beta_final=0.1, mixture__anneal_steps=1, mixture__balanced=False)
  flat = _set("mixture", mixture__balanced=False)
  state = ramp.move(ramp.init(jax.random.key(0)), features)
  assert np.abs(ramp.move(state, features).means - flat.move(state, features).means).max() > 1e-4


def test_horizon_schedule_is_the_config_s():
  """A horizon that shrinks over the run moves the means faster than one that stays."""
  features = jax.random.normal(jax.random.key(1), (64, 16))
  gaps = []
  for final in (1e6, 1.0):
    prototypes = _set(
      "mixture", mixture__horizon_steps=1e6, mixture__horizon_final=final, mixture__anneal_steps=4
    )
    start = state = prototypes.init(jax.random.key(0))
    for _ in range(6):
      state = prototypes.move(state, features)
    gaps.append(np.abs(prototypes.rows(state) - prototypes.rows(start)).max())
  assert gaps[0] < 1e-3 < 0.1 < gaps[1]


def test_window_floor_and_momentum_are_the_config_s():
  """A window of W rows is a horizon of W K / N steps, whatever the horizon of the config."""
  features = jax.random.normal(jax.random.key(1), (64, 16))

  def moved(**changes):
    prototypes = _set("mixture", **{f"mixture__{k}": v for k, v in changes.items()})
    return prototypes.move(prototypes.init(jax.random.key(0)), features)

  by_window = moved(window=6.0, horizon_steps=1e6)
  np.testing.assert_allclose(by_window.means, moved(horizon_steps=3.0).means, atol=1e-6)
  floored = moved(covariance="diagonal", variance_floor=0.5)
  np.testing.assert_array_equal(floored.variances, np.full((32, 16), 0.5, np.float32))
  share = moved(momentum=0.0).usage
  np.testing.assert_allclose(moved(momentum=0.5).usage, 0.5 / 32 + 0.5 * share, rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"mixture__window": 5.0, "mixture__horizon_final": 2.0, "mixture__anneal_steps": 3},
      "mixture: window=5.0 takes",
    ),
    ({"method__num_prototypes": 1}, "num_prototypes=1: .*at least 2"),
    ({"mixture__covariance": "full"}, "mixture: .*covariance='full'"),
    ({"mixture__kappa": -1.0}, "mixture: kappa=-1.0"),
  ],
)
def test_options_out_of_range_are_one_line(changes, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    _set("mixture", **changes)
  assert "\n" not in str(caught.value)
