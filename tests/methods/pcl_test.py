"""PCL: losses against NumPy, the queue, the teacher, the refresh, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from protojax import errors, losses, methods
from protojax.models import encoder as encoders
from protojax.training import train_step

pytestmark = pytest.mark.xdist_group("pcl")  # one worker: its tests share a fixture that is costly

PCL = {
  "augment__num_local": 0,
  "method__coarse_clusters": (8,),
  "method__queue_size": 48,
  "method__warmup_epochs": 1,
  "teacher__momentum": 0.9,
}


def _config(**changes):
  return tiny.config("pcl", "kmeans", **{**PCL, **changes})


def _unit(*shape, seed=0):
  rows = np.random.default_rng(seed).normal(size=shape)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _reference_info(q, k, queue, temperature):
  logits = np.concatenate([(q * k).sum(-1, keepdims=True), q @ queue.T], axis=1) / temperature
  return (scipy.special.logsumexp(logits, axis=1) - logits[:, 0]).mean()


def _reference_proto(q, centroids, phi, clusters):
  logits = q @ centroids.T / phi
  own = logits[np.arange(len(q)), clusters]
  return (scipy.special.logsumexp(logits, axis=1) - own).mean()


def _both():
  rng = np.random.default_rng(1)
  k, queue, centroids = _unit(5, 4, seed=1), _unit(9, 4, seed=2), _unit(7, 4, seed=3)
  phi, clusters = rng.uniform(0.1, 0.4, 7), np.array([0, 6, 2, 2, 5], np.int32)
  return [
    (
      lambda q: losses.info_nce(q, k, queue, temperature=0.2),
      lambda q: _reference_info(q, k, queue, 0.2),
    ),
    (
      lambda q: losses.proto_nce(q, centroids, phi, clusters),
      lambda q: _reference_proto(q, centroids, phi, clusters),
    ),
  ]


@pytest.mark.parametrize("which", [0, 1], ids=["info_nce", "proto_nce"])
def test_loss_and_gradient_match_numpy(which):
  q = _unit(5, 4)
  with jax.enable_x64(True):
    ours, reference = _both()[which]
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(q))
  np.testing.assert_allclose(value, reference(q), rtol=1e-12)
  numeric = np.zeros_like(q)
  for index in np.ndindex(*q.shape):
    step = np.zeros_like(q)
    step[index] = 1e-6
    numeric[index] = (reference(q + step) - reference(q - step)) / 2e-6
  np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-5 * np.linalg.norm(numeric))


@pytest.mark.parametrize("which", [0, 1], ids=["info_nce", "proto_nce"])
def test_losses_of_bfloat16_and_huge_queries_are_finite_float32(which):
  ours, reference = _both()[which]
  low = ours(jnp.asarray(_unit(5, 4), jnp.bfloat16))
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low, reference(_unit(5, 4)), rtol=2e-2)
  value, gradient = jax.value_and_grad(ours)(jnp.asarray(1e4 * _unit(5, 4), jnp.float32))
  assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.fixture(scope="module")
def started():
  """(config, method, variables with clusters, views) at random."""
  config = _config()
  method = methods.load("pcl").make(config)
  variables = jax.jit(method.init)(jax.random.key(0))
  rng = np.random.default_rng(4)
  clusters = np.stack([rng.integers(0, k, 64) for k in (8, 32)]).astype(np.int32)
  prototypes = {
    name: {**p, "phi": jnp.asarray(rng.uniform(0.1, 0.4, p["phi"].shape), jnp.float32)}
    for name, p in variables.prototypes.items()
  }
  variables = variables.replace(
    prototypes=prototypes, carry={**variables.carry, "clusters": jnp.asarray(clusters)}
  )
  views = {
    "global": jax.random.normal(jax.random.key(1), (16, 2, 16, 16, 3)),
    "index": jnp.asarray(rng.permutation(64)[:16]),
  }
  return config, method, variables, views


def test_step_matches_numpy_before_and_after_the_warmup(started):
  config, method, variables, views = started
  net = encoders.build(config)
  embed = jax.jit(lambda params, x: encoders.embed(net, params, {}, {"global": x}, train=True)[0].z)
  z = [
    np.asarray(embed(params, views["global"][:, v, None])[:, 0], np.float64)
    for v, params in enumerate((variables.encoder, variables.teacher["encoder"]))
  ]
  info = _reference_info(*z, np.asarray(variables.carry["key_queue"], np.float64), 0.2)
  proto = np.mean(
    [
      _reference_proto(
        z[0],
        *(np.asarray(variables.prototypes[name][part]) for part in ("centroids", "phi")),
        np.asarray(variables.carry["clusters"])[i, views["index"]],
      )
      for i, name in enumerate(("clusters8", "prototypes"))
    ]
  )
  trained, frozen = train_step.split(variables, False)
  loss = jax.jit(method.loss)
  early, out = loss(trained, frozen, views, jax.random.key(2), jnp.int32(3))
  late, _ = loss(trained, frozen, views, jax.random.key(2), jnp.int32(4))
  np.testing.assert_allclose(early, info, rtol=1e-5)
  np.testing.assert_allclose(late, info + proto, rtol=1e-5)
  np.testing.assert_allclose(out.stats["keys"], z[1], atol=1e-6)
  for step, place in ((2, 32), (3, 0)):  # the queue holds three batches
    queue = np.array(variables.carry["key_queue"])
    queue[place : place + 16] = z[1]
    moved = method.update(variables, out.stats, jnp.int32(step))
    np.testing.assert_allclose(moved.carry["key_queue"], queue, atol=1e-6)


def test_teacher_moves_by_a_constant_share(started):
  _, method, variables, _ = started
  other = jax.tree.map(lambda x: x + 1.0, variables.encoder)
  stats = {"keys": jnp.zeros((16, 16)), "batch_stats": variables.carry["batch_stats"]}
  for step in (0, 5):
    moved = method.update(variables.replace(encoder=other), stats, jnp.int32(step))
    for new, old in zip(
      jax.tree.leaves(moved.teacher), jax.tree.leaves(variables.teacher), strict=True
    ):
      np.testing.assert_allclose(new - old, 0.1, atol=1e-5)


def test_refresh_gives_every_readable_image_the_cluster_it_lies_in(started):
  _, method, variables, _ = started
  centers = _unit(8, 16, seed=5)
  index = np.delete(np.arange(64), 10).astype(np.int32)[::-1].copy()  # image 10 cannot be read
  rows = centers[index % 8] + 0.01 * _unit(63, 16, seed=6)
  refresh = jax.jit(method.refresh)
  fresh = refresh(variables, jnp.asarray(rows, jnp.float32), index, jax.random.key(0))
  clusters = np.asarray(fresh.carry["clusters"])
  np.testing.assert_array_equal(clusters[:, 10], variables.carry["clusters"][:, 10])
  for name, size, found in zip(("clusters8", "prototypes"), (8, 32), clusters, strict=True):
    state = fresh.prototypes[name]
    assert state["centroids"].shape == (size, 16) and state["phi"].shape == (size,)
    np.testing.assert_allclose(jnp.linalg.norm(state["centroids"], axis=1), 1.0, rtol=1e-5)
    assert len(np.unique(found[index])) > size // 2
    nearest = np.asarray(state["centroids"])[found[index]]
    assert (nearest * rows).sum(axis=1).mean() > (0.7 if size == 8 else 0.99)
  np.testing.assert_allclose(fresh.prototypes["clusters8"]["phi"].mean(), 0.2, rtol=0.05)
  assert jax.tree.structure(fresh) == jax.tree.structure(variables)
  again = refresh(variables, jnp.asarray(rows, jnp.float32), index, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, fresh, again)


def test_sets_are_named_for_the_monitor(started):
  _, method, variables, _ = started
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  codes = jax.eval_shape(method.codes, variables, images)
  shapes = {k: v.shape for k, v in codes.items()}
  assert shapes == {"clusters8": (2, 8), "prototypes": (2, 32)}
  assert set(method.prototype_matrices(variables)) == set(shapes)
  assert set(jax.eval_shape(method.embeddings, variables, images)) == set(shapes)


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"method__prototypes": "mixture"}, "method.prototypes='mixture'"),
    ({"augment__num_local": 2}, "augment.num_local=2"),
    ({"method__queue_size": 40}, "method.queue_size=40"),
    ({"method__num_prototypes": 64}, "64\\] clusters of 64 images"),
    ({"method__coarse_clusters": (1,)}, "1, 32\\] clusters of 64 images"),
    ({"method__coarse_clusters": (8, 8)}, "8, 8, 32\\] clusters of 64 images: choose different"),
    ({"method__kmeans_restarts": 0}, "method.kmeans_restarts=0 must be above 0"),
    ({"head__l2": False}, "head.l2=False: pcl compares the directions"),
  ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(changes, line):
  with pytest.raises(errors.UserError, match=line) as caught:
    methods.load("pcl").make(_config(**changes))
  assert "\n" not in str(caught.value)
