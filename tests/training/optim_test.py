"""The optimizer against NumPy in float64, and what is frozen, clipped and decayed."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from protojax import errors
from protojax.training import optim


def _config(**changes):
  values = {
    "name": "adamw",
    "lr": 0.01,
    "final_lr": 1e-4,
    "warmup_steps": 3,
    "warmup_start": 0.0,
    "schedule_scale": 1.0,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
    "clip": 0.5,
    "clip_mode": "tensor",
    "freeze_prototypes_steps": 0,
    "freeze_backbone_steps": 0,
    "layer_decay": 1.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "trust": 0.001,
    "lars_clip": False,
    "decay_all": False,
    "decay_embeddings": True,
    "decay_prototypes": True,
  } | changes
  method = {"prototypes": "learned"}
  return ml_collections.ConfigDict({"optim": values, "batch_size": 512, "method": method})


def _params(seed=0, learned=True):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  trained = {
    "encoder": {
      "backbone": {
        "cls_token": draw(1, 1, 4),
        "attn": {"qkv": {"kernel": draw(4, 3, 2, 2), "bias": draw(3, 2, 2)}},
        "norm": {"scale": draw(4), "bias": draw(4)},
        "scale_1": draw(4),
      },
      "head": {"dense": {"kernel": draw(4, 6), "bias": draw(6)}},
    }
  }
  if learned:
    trained["prototypes"] = {"v": draw(5, 3), "g": draw(5, 1)}
  return trained


_DECAYED = {"cls_token", "kernel", "v", "g"}


def _flat(tree):
  """{path: float64 array}; the last name of a path comes after the last dot."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf, np.float64)
    for path, leaf in leaves
  }


def _schedules(steps, warmup, peak):
  i = np.arange(steps - warmup)
  cosine = 1e-4 + 0.5 * (peak - 1e-4) * (1 + np.cos(np.pi * i / (steps - warmup)))
  lr = np.concatenate([np.linspace(0, peak, warmup), cosine])
  wd = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(steps) / steps))
  return lr, wd


def _reference(name, params, grads, *, clip, mode, freeze, steps, **options):
  """Parameters after every step, by the formulas of torch's AdamW, Adam, SGD and apex's LARC."""
  trust, lars_clip = options.get("trust", 0.001), options.get("lars_clip", False)
  every = name == "adam" or options.get("decay_all", False)
  lr, wd = _schedules(steps, 3, 0.02)
  w = dict(params)
  m = {k: np.zeros_like(x) for k, x in w.items()}
  v = {k: np.zeros_like(x) for k, x in w.items()}
  count = dict.fromkeys(w, 0)
  for step, gradient in enumerate(grads):
    total = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    for k, g in gradient.items():
      norm = total if mode == "global" else np.sqrt((g**2).sum())
      g = g * min(1.0, clip / (norm + 1e-6)) if clip else g
      if k.startswith("prototypes") and step < freeze:
        continue
      decays = every or k.rpartition(".")[2] in _DECAYED
      decay = wd[step] if decays else 0.0
      count[k] += 1
      if name in ("adamw", "adam"):
        if name == "adamw":
          w[k] = w[k] * (1 - lr[step] * decay)
        else:
          g = g + decay * w[k]
        m[k] = 0.9 * m[k] + 0.1 * g
        v[k] = 0.999 * v[k] + 0.001 * g**2
        m_hat, v_hat = m[k] / (1 - 0.9 ** count[k]), v[k] / (1 - 0.999 ** count[k])
        w[k] = w[k] - lr[step] * m_hat / (np.sqrt(v_hat) + 1e-8)
        continue
      if name == "sgd":
        g = g + decay * w[k]
      elif decays:
        norm_w, norm_g = np.linalg.norm(w[k].ravel()), np.linalg.norm(g.ravel())
        ratio = trust * norm_w / (norm_g + decay * norm_w + 1e-8)
        if lars_clip:
          ratio = min(ratio / lr[step], 1.0) if lr[step] else 1.0
        g = ratio * (g + decay * w[k])
      m[k] = 0.9 * m[k] + g
      w[k] = w[k] - lr[step] * m[k]
  return w


def _train(config, params, grads, steps):
  tx = optim.build(config, num_steps=steps, batch_size=512)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for gradient in grads:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lars"])
@pytest.mark.parametrize(
  ("mode", "clip", "decay_all"),
  [("tensor", 0.5, False), ("global", 0.5, False), ("tensor", 0.0, False), ("tensor", 0.0, True)],
)
def test_nine_steps_match_numpy_in_float64(name, mode, clip, decay_all):
  config = _config(name=name, clip=clip, clip_mode=mode, freeze_prototypes_steps=4)
  config.optim.decay_all = decay_all
  start = _params()
  # Gradients on both sides of the clip.
  grads = [jax.tree.map(lambda x, s=s: x * 0.05 * s, _params(s)) for s in range(1, 10)]
  trained, _ = _train(config, start, grads, 9)
  expected = _reference(
    name,
    _flat(start),
    [_flat(g) for g in grads],
    clip=clip,
    mode=mode,
    freeze=4,
    steps=9,
    decay_all=decay_all,
  )
  for key, value in _flat(trained).items():
    np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=2e-6, err_msg=key)
    assert np.abs(expected[key] - _flat(start)[key]).max() > 1e-5


def test_clipped_lars_with_another_trust_matches_numpy_on_both_sides_of_the_clip():
  config = _config(name="lars", clip=0.0, trust=0.02, lars_clip=True)
  start = _params()
  # Small gradients give ratios above the learning rate, large ones below it.
  grads = [jax.tree.map(lambda x, s=s: x * (0.1 if s % 2 else 20.0), _params(s)) for s in range(9)]
  trained, _ = _train(config, start, grads, 9)
  flat = [_flat(g) for g in grads]
  options = {"clip": 0.0, "mode": "tensor", "freeze": 0, "steps": 9}
  expected = _reference("lars", _flat(start), flat, **options, trust=0.02, lars_clip=True)
  unclipped = _reference("lars", _flat(start), flat, **options, trust=0.02)
  for key, value in _flat(trained).items():
    np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=2e-6, err_msg=key)
  assert np.abs(unclipped["prototypes.v"] - expected["prototypes.v"]).max() > 0.01


@pytest.mark.parametrize(
  ("changes", "exempt"),
  [
    ({}, set()),
    ({"decay_prototypes": False}, {"prototypes.v", "prototypes.g"}),
    ({"decay_embeddings": False}, {"encoder.backbone.cls_token"}),
  ],
)
def test_what_decays_is_decided_by_name_and_dimensions(changes, exempt):
  mask = _flat(optim.decay_mask(_params(), _config(**changes).optim))
  assert {k for k, v in mask.items() if v} == {
    "encoder.backbone.cls_token",
    "encoder.backbone.attn.qkv.kernel",
    "encoder.head.dense.kernel",
    "prototypes.v",
    "prototypes.g",
  } - exempt
  assert len(mask) == len(_flat(_params()))
  for wider in ({"name": "adam"}, {"decay_all": True}):
    every = _flat(optim.decay_mask(_params(), _config(**wider, **changes).optim))
    assert {k for k, v in every.items() if not v} == exempt


@pytest.mark.parametrize("name", ["adamw", "adam", "lars", "sgd"])
def test_prototypes_that_do_not_decay_stand_still_without_a_gradient(name):
  trained = _params()
  config = _config(name=name, warmup_steps=0, decay_prototypes=False)
  rule = optim.build(config, num_steps=5, batch_size=256)
  zeros = jax.tree.map(jnp.zeros_like, trained)
  updates, _ = rule.update(zeros, rule.init(trained), trained)
  for leaf in jax.tree.leaves(updates["prototypes"]):
    np.testing.assert_array_equal(leaf, 0.0)
  moved = np.abs(updates["encoder"]["head"]["dense"]["kernel"]).max()
  assert (moved > 0) == (name != "lars")  # LARS takes the plain gradient where its norm is 0


def test_lars_takes_the_plain_gradient_where_a_norm_is_zero():
  """A zero weight moves by its gradient; a zero gradient does not even decay."""
  trained = {"encoder": {"a": jnp.zeros((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones((2, 2))}}
  gradient = {"encoder": {"a": jnp.ones((2, 2)), "b": jnp.zeros((2, 2)), "c": jnp.ones((2, 2))}}
  config = _config(name="lars", warmup_steps=0, clip=0.0)
  after, _ = _train(config, trained, [gradient], 1)
  np.testing.assert_allclose(after["encoder"]["a"], -0.02, rtol=1e-6)
  np.testing.assert_array_equal(after["encoder"]["b"], 1.0)
  assert 0 < 1 - float(after["encoder"]["c"][0, 0]) < 1e-4


def test_first_live_step_of_frozen_prototypes_is_one_learning_rate_not_2_67():
  frozen_steps = 1250
  trained = {"encoder": {"w": jnp.ones(3)}, "prototypes": {"v": jnp.ones((4, 3))}}
  rates = {
    "name": "adamw",
    "clip": 0.0,
    "warmup_steps": 0,
    "lr": 0.001,
    "final_lr": 0.002,
    "weight_decay": 0.0,
    "final_weight_decay": 0.0,
  }
  gradient = jax.tree.map(jnp.ones_like, trained)

  def first_live(freeze, early):
    """Size of the first update after `frozen_steps` steps with gradients `early`."""
    config = _config(**rates, freeze_prototypes_steps=freeze)
    tx = optim.build(config, num_steps=2000, batch_size=512)

    def step(_, state):
      return tx.update(early, state, trained)[1]

    state = jax.jit(lambda s: jax.lax.fori_loop(0, frozen_steps, step, s))(tx.init(trained))
    updates, _ = tx.update(gradient, state, trained)
    return float(-updates["prototypes"]["v"][0, 0]) / 0.002

  np.testing.assert_allclose(first_live(frozen_steps, gradient), 1.0, rtol=1e-4)
  nothing = jax.tree.map(jnp.zeros_like, gradient)
  np.testing.assert_allclose(first_live(0, nothing), 2.67, atol=0.005)


def test_frozen_prototypes_keep_values_and_state_to_the_bit():
  config = _config(freeze_prototypes_steps=2)
  start = _params()
  grads = [_params(s) for s in (1, 2, 3)]
  frozen, state = _train(config, start, grads[:2], 9)
  before = optim.build(config, num_steps=9, batch_size=512).init(start).parts["prototypes"]
  jax.tree.map(np.testing.assert_array_equal, frozen["prototypes"], start["prototypes"])
  jax.tree.map(np.testing.assert_array_equal, state.parts["prototypes"], before)
  moved, state = _train(config, start, grads, 9)
  assert float(jnp.abs(moved["prototypes"]["v"] - start["prototypes"]["v"]).max()) > 0
  assert int(state.step) == 3


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_a_frozen_backbone_stands_still_and_starts_as_in_the_first_step(name):
  rates = {"name": name, "clip": 0.0, "warmup_steps": 0, "lr": 0.005, "final_lr": 0.01}
  still = _config(**rates, freeze_backbone_steps=2, final_weight_decay=0.04)
  start, grads = _params(), [_params(s) for s in (1, 2, 3)]
  frozen, state = _train(still, start, grads[:2], 9)
  jax.tree.map(
    np.testing.assert_array_equal, frozen["encoder"]["backbone"], start["encoder"]["backbone"]
  )
  begun = optim.build(still, num_steps=9, batch_size=512).init(start)
  jax.tree.map(np.testing.assert_array_equal, state.parts["backbone"], begun.parts["backbone"])
  moved, _ = _train(still, start, grads, 9)
  free = _config(**rates, final_weight_decay=0.04)
  # Its first step is the one that it would have made first, and nobody else's steps are others.
  first, _ = _train(free, start, grads[2:], 9)
  for got, want in ((moved, first), (moved, _train(free, start, grads, 9)[0])):
    part = "backbone" if want is first else "head"
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
      got["encoder"][part],
      want["encoder"][part],
    )


def test_layers_near_the_image_move_less():
  backbone = {"patch_embed": jnp.ones(2), "blocks_0": jnp.ones(2), "blocks_1": jnp.ones(2)}
  trained = {"encoder": {"backbone": {**backbone, "norm": jnp.ones(2)}, "head": jnp.ones(2)}}
  rates = {"clip": 0.0, "warmup_steps": 0, "weight_decay": 0.0, "final_weight_decay": 0.0}
  tx = optim.build(_config(**rates, layer_decay=0.5), num_steps=9, batch_size=512)
  moved = _flat(tx.update(trained, tx.init(trained), trained)[0])
  share = {key: float(value[0]) / float(moved["encoder.head"][0]) for key, value in moved.items()}
  expected = {"patch_embed": 0.125, "blocks_0": 0.25, "blocks_1": 0.5, "norm": 1.0}
  assert share == pytest.approx(
    {"encoder.head": 1.0} | {f"encoder.backbone.{k}": v for k, v in expected.items()}
  )
  stages = optim.layer_rates(
    {"backbone": {"conv1": 0, "norm1": 0, "stage1_0": 0, "stage4_2": 0}, "head": 0}, 0.5
  )
  assert stages["backbone"] == {
    "conv1": 1 / 32,
    "norm1": 1 / 32,
    "stage1_0": 1 / 16,
    "stage4_2": 0.5,
  }
  with pytest.raises(errors.UserError, match="layer_decay=0"):
    optim.build(_config(layer_decay=0.0), num_steps=9, batch_size=512)


def test_each_clip_takes_the_norm_that_it_says():
  trained = {
    "encoder": {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))},
    "prototypes": {"v": jnp.zeros((1, 1))},
  }
  gradient = {
    "encoder": {"a": jnp.full((1, 1), 10.0), "b": jnp.full((1, 1), 0.1)},
    "prototypes": {"v": jnp.full((1, 1), 30.0)},
  }
  rates = {"name": "sgd", "warmup_steps": 0, "clip": 1.0, "lr": 0.5, "weight_decay": 0.0}
  after = {
    mode: _flat(_train(_config(**rates, clip_mode=mode), trained, [gradient], 5)[0])
    for mode in ("tensor", "global", "encoder")
  }
  np.testing.assert_allclose(after["tensor"]["encoder.a"], -1.0, rtol=1e-5)
  np.testing.assert_allclose(after["tensor"]["encoder.b"], -0.1, rtol=1e-5)
  total = np.hypot(10.0, 30.0)
  np.testing.assert_allclose(after["global"]["encoder.b"], -0.1 / total, rtol=1e-3)
  np.testing.assert_allclose(after["global"]["prototypes.v"], -30.0 / total, rtol=1e-3)
  np.testing.assert_allclose(after["encoder"]["encoder.b"], -0.01, rtol=1e-3)
  np.testing.assert_allclose(after["encoder"]["prototypes.v"], -30.0, rtol=1e-5)


def test_encoder_alone_has_no_state_for_prototypes():
  trained = _params(learned=False)
  after, state = _train(_config(freeze_prototypes_steps=5), trained, [trained, trained], 9)
  assert set(after) == {"encoder"} and set(state.parts) == {"encoder"}


def test_logged_rate_is_the_scaled_one_that_is_applied():
  config = _config(clip=0.0, weight_decay=0.0, final_weight_decay=0.0)
  trained = {"encoder": {"w": jnp.ones(2)}}
  rate = optim.learning_rate(config, num_steps=9, batch_size=512)
  for steps in (1, 3, 4):
    before, _ = _train(config, trained, [trained] * (steps - 1), 9)
    after, _ = _train(config, trained, [trained] * steps, 9)
    moved = float(before["encoder"]["w"][0] - after["encoder"]["w"][0])
    np.testing.assert_allclose(moved, rate(steps - 1), rtol=1e-3, atol=1e-9)
  np.testing.assert_allclose(rate(2), 0.02, rtol=1e-6)


def test_schedules_of_a_longer_run_are_left_early():
  """At 1.25 the last of 8 steps has the rate and the decay of step 7 of 10."""
  config = _config(schedule_scale=1.25, warmup_start=0.005, warmup_steps=3)
  rate = optim.learning_rate(config, num_steps=8, batch_size=512)
  cosine = 1e-4 + 0.5 * (0.02 - 1e-4) * (1 + np.cos(np.pi * np.arange(5) / 7))
  expected = [0.01, 0.015, 0.02, *cosine]
  np.testing.assert_allclose([rate(step) for step in range(8)], expected, rtol=1e-5)
  decay = optim.weight_decay(config, num_steps=8)
  np.testing.assert_allclose(decay(7), 0.4 - 0.18 * (1 + np.cos(np.pi * 0.7)), rtol=1e-5)
  assert "schedules 1.25 times as long as the run" in optim.describe(config)


def test_schedules_shorter_than_the_run_are_refused():
  with pytest.raises(errors.UserError, match="schedule_scale=0.5 .*end before the run"):
    optim.build(_config(schedule_scale=0.5), num_steps=9, batch_size=512)


def test_description_says_only_what_applies():
  config = _config(freeze_prototypes_steps=0, warmup_steps=0)
  config.method.prototypes = "learned"
  config.optim.update({"weight_decay": 0.04, "final_weight_decay": 0.04})
  line = optim.describe(config)
  assert "frozen" not in line and "warm-up" not in line and "weight decay 0.04," in line
  config.optim.update({"final_weight_decay": 0.4, "warmup_steps": 3})
  assert "3 warm-up steps, weight decay 0.04 -> 0.4," in optim.describe(config)


def test_description_is_one_line_with_the_scaled_rate():
  line = optim.describe(_config(lr=5e-4, freeze_prototypes_steps=7))
  assert "\n" not in line and "0.0005 x 512/256 = 0.001" in line and "frozen for 7 steps" in line
  assert "per tensor" in line and "no clipping" in optim.describe(_config(clip=0.0))


@pytest.mark.parametrize("prototypes", ["mixture", "frozen", "none"])
def test_description_has_no_freeze_where_no_prototypes_are_learned(prototypes):
  config = _config(freeze_prototypes_steps=7)
  learned = optim.describe(config)
  config.method.prototypes = prototypes
  assert optim.describe(config) + ", learned prototypes frozen for 7 steps" == learned


@pytest.mark.parametrize("change", [{"name": "adamax"}, {"clip_mode": "leaf"}])
def test_unknown_names_are_one_line(change):
  with pytest.raises(errors.UserError, match="optim.*unknown: choose") as caught:
    optim.build(_config(**change), num_steps=9, batch_size=512)
  assert "\n" not in str(caught.value)
