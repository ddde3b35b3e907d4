"""Assignments against float64 NumPy, golden numbers of the published code, and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import errors
from protojax.prototypes import assignment


def cosines(rows, cols):
  """The matrix that the golden numbers were made of."""
  i, j = np.mgrid[:rows, :cols]
  return np.cos(0.4 * i + 0.9 * j)


def reference_sinkhorn(scores, temperature, num_steps):
  """The direct form, exponentials and divisions, as published (arXiv 2006.09882)."""
  q = np.exp(np.asarray(scores, np.float64) / temperature).T
  num_prototypes, num_samples = q.shape
  q /= q.sum()
  for _ in range(num_steps):
    q /= q.sum(axis=1, keepdims=True) * num_prototypes
    q /= q.sum(axis=0, keepdims=True) * num_samples
  return (q * num_samples).T


@pytest.mark.parametrize(
  ("temperature", "row", "golden"),
  [
    (0.07, 0, [0.0226851907, 0.6466299891, 0.3306846619, 1.0684e-7]),
    (0.07, 5, [1.0e-9, 2.3e-9, 0.00288075977, 0.99711924791]),
    (0.06, 0, [0.0177293569, 0.6411442161, 0.3411264122, 1.0823e-8]),
  ],
)
def test_sinkhorn_gives_the_golden_rows(temperature, row, golden):
  q = assignment.sinkhorn(jnp.asarray(cosines(6, 4)), temperature=temperature)
  np.testing.assert_allclose(q[row], golden, rtol=1e-5, atol=1e-10)


def test_sinkhorn_is_within_rounding_of_the_variant_of_capi():
  """It adds 1e-8 to every denominator."""
  q = assignment.sinkhorn(jnp.asarray(cosines(6, 4)), temperature=0.06)
  golden = [0.017729842804, 0.641140930220, 0.341129208623, 1.08227e-8]
  np.testing.assert_allclose(q[0], golden, rtol=5e-5, atol=1e-9)


def test_sinkhorn_gives_the_golden_column_sums():
  q = assignment.sinkhorn(jnp.asarray(cosines(6, 4)), temperature=0.07)
  np.testing.assert_allclose(q.sum(axis=0), [1.66580, 1.00142, 1.25700, 2.07578], atol=6e-6)


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_log_domain_equals_the_direct_form(num_steps):
  scores = np.random.default_rng(0).uniform(-1, 1, (40, 12)).astype(np.float32)
  q = assignment.sinkhorn(jnp.asarray(scores), temperature=0.1, num_steps=num_steps)
  np.testing.assert_allclose(q, reference_sinkhorn(scores, 0.1, num_steps), rtol=2e-5, atol=1e-9)


def test_many_steps_balance_the_prototypes():
  scores = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (60, 12)), jnp.float32)
  q = assignment.sinkhorn(scores, temperature=0.2, num_steps=4000)
  np.testing.assert_allclose(q.sum(axis=1), np.ones(60), rtol=2e-6)
  np.testing.assert_allclose(q.sum(axis=0), np.full(12, 5.0), rtol=1e-5)


def test_only_offsets_of_a_sample_matter():
  """Subtracting each row's maximum changes three steps; per prototype or globally it does not."""
  scores = jnp.asarray(cosines(6, 4), jnp.float32)
  plain = assignment.sinkhorn(scores, temperature=0.07)
  per_prototype = jnp.asarray([[0.3, -0.2, 0.7, 0.1]])
  shifts = (scores.max(axis=0, keepdims=True), scores.max(), per_prototype)
  for shift in shifts:
    shifted = assignment.sinkhorn(scores - shift, temperature=0.07)
    np.testing.assert_allclose(shifted, plain, atol=2e-6)
  per_sample = assignment.sinkhorn(scores - scores.max(axis=1, keepdims=True), temperature=0.07)
  assert np.abs(per_sample - plain).max() > 1e-5
  many = {"temperature": 0.07, "num_steps": 400}
  np.testing.assert_allclose(
    assignment.sinkhorn(scores, **many),
    assignment.sinkhorn(scores - scores.max(axis=1, keepdims=True), **many),
    atol=1e-4,
  )


@pytest.mark.parametrize("num_steps", [1, 3])
def test_samples_that_do_not_count_have_no_part_in_the_balance(num_steps):
  scores = np.random.default_rng(0).uniform(-1, 1, (40, 12)).astype(np.float32)
  counted = np.random.default_rng(1).uniform(size=40) < 0.4
  some = {"temperature": 0.1, "num_steps": num_steps}
  q = assignment.sinkhorn(jnp.asarray(scores), **some, counted=jnp.asarray(counted))
  alone = reference_sinkhorn(scores[counted], **some)
  np.testing.assert_allclose(q[counted], alone, rtol=2e-5, atol=1e-9)
  # The others follow: what one prototype's offset does to those that count it does to them.
  offsets = (scores[counted] / 0.1 - np.log(alone))[0]
  others = np.exp(scores[~counted] / 0.1 - offsets)
  others /= others.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(q[~counted], others, rtol=1e-4, atol=1e-9)


def test_assignments_are_finite_where_no_sample_counts():
  scores = jnp.asarray(cosines(6, 4), jnp.float32)
  q = assignment.sinkhorn(scores, temperature=0.07, counted=jnp.zeros(6, bool))
  np.testing.assert_allclose(q.sum(axis=1), np.ones(6), rtol=1e-6)


def test_saturated_scores_of_many_prototypes_stay_finite():
  """65,536 prototypes at temperature .01: scores span 200 nats, far beyond float32's exponent."""
  key = jax.random.key(0)
  scores = jax.random.uniform(key, (8, 65_536), minval=-1.0, maxval=1.0)
  scores = scores.at[:, 0].set(1.0).at[0].set(-1.0)
  log_q = assignment.log_sinkhorn(scores / 0.01)
  assert np.isfinite(log_q).all()
  np.testing.assert_allclose(jnp.exp(log_q).sum(axis=1), np.ones(8), rtol=1e-5)


def test_log_sinkhorn_is_the_logarithm_of_sinkhorn_in_float32():
  scores = jnp.asarray(cosines(6, 4), jnp.bfloat16)
  log_q = assignment.log_sinkhorn(scores.astype(jnp.float32) / 0.1)
  q = assignment.sinkhorn(scores, temperature=0.1)
  assert q.dtype == log_q.dtype == jnp.float32
  np.testing.assert_allclose(jnp.exp(log_q), q, rtol=1e-6)


@pytest.mark.parametrize(("shape", "num_steps"), [((2, 3, 4), 3), ((4,), 3), ((3, 4), 0)])
def test_log_sinkhorn_refuses_other_shapes_and_no_steps(shape, num_steps):
  with pytest.raises(ValueError, match=r"scores \[N, K\] and num_steps >= 1"):
    assignment.log_sinkhorn(jnp.zeros(shape), num_steps=num_steps)


def test_center_is_a_moving_average_of_raw_scores():
  rng = np.random.default_rng(0)
  center, logits = rng.normal(size=5), rng.normal(size=(4, 2, 5))
  expected = 0.9 * center + 0.1 * logits.reshape(8, 5).mean(axis=0)
  out = assignment.center_update(jnp.asarray(center), jnp.asarray(logits), momentum=0.9)
  np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_sharpen_is_a_centred_softmax():
  rng = np.random.default_rng(0)
  center, logits = rng.normal(size=5), rng.normal(size=(4, 2, 5))
  expected = np.exp((logits - center) / 0.04)
  expected /= expected.sum(axis=-1, keepdims=True)
  out = assignment.sharpen(jnp.asarray(logits), jnp.asarray(center), temperature=0.04)
  np.testing.assert_allclose(out, expected, rtol=2e-5)


def test_targets_pass_no_gradient():
  weight = jnp.arange(4.0)
  scores, center = jnp.asarray(cosines(6, 4), jnp.float32), jnp.ones(4)
  for fn in (
    lambda x, c: assignment.sinkhorn(x + c[None, :], temperature=0.1) @ weight,
    lambda x, c: assignment.sharpen(x, c, temperature=0.1) @ weight,
    lambda x, c: assignment.center_update(c, x) * weight,
  ):
    for gradient in jax.grad(lambda *args, fn=fn: fn(*args).sum(), argnums=(0, 1))(scores, center):
      np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_targets_are_centred_or_balanced_over_all_rows():
  scores, center = jnp.asarray(cosines(6, 4), jnp.float32).reshape(2, 3, 4), jnp.arange(4.0)
  centred, balanced = (
    assignment.targets(scores, center, kind=kind, temperature=0.07)
    for kind in ("center", "sinkhorn")
  )
  expected = np.exp((cosines(6, 4) - np.arange(4)) / 0.07).reshape(2, 3, 4)
  expected /= expected.sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(centred, expected, rtol=2e-5, atol=1e-12)
  expected = reference_sinkhorn(cosines(6, 4), 0.07, 3).reshape(2, 3, 4)
  np.testing.assert_allclose(balanced, expected, rtol=2e-5, atol=1e-10)
  with pytest.raises(errors.UserError, match="method.targets='softmax'.*center or sinkhorn"):
    assignment.targets(scores, center, kind="softmax", temperature=0.07)


def test_random_partition_is_a_permutation_that_the_key_decides():
  order = assignment.random_partition(jax.random.key(0), 64)
  assert order.dtype == jnp.int32
  np.testing.assert_array_equal(np.sort(order), np.arange(64))
  assert (order != np.arange(64)).any()
  np.testing.assert_array_equal(order, assignment.random_partition(jax.random.key(0), 64))
  assert (order != assignment.random_partition(jax.random.key(1), 64)).any()


def test_partition_puts_every_prototype_in_one_block():
  scores = np.random.default_rng(0).normal(size=(3, 2, 12)).astype(np.float32)
  order = np.random.default_rng(1).permutation(12)
  blocks = assignment.partition(jnp.asarray(scores), jnp.asarray(order, jnp.int32), 4)
  np.testing.assert_array_equal(blocks, scores[:, :, order].reshape(3, 2, 3, 4))


def test_gradient_of_partition_goes_back_to_each_prototype():
  order = jnp.asarray(np.random.default_rng(1).permutation(12), jnp.int32)
  weight = np.random.default_rng(2).normal(size=(3, 3, 4)).astype(np.float32)
  gradient = jax.grad(lambda x: (assignment.partition(x, order, 4) * weight).sum())(
    jnp.zeros((3, 12))
  )
  expected = np.zeros((3, 12), np.float32)
  expected[:, np.asarray(order)] = weight.reshape(3, 12)
  np.testing.assert_array_equal(gradient, expected)


def test_partition_refuses_unequal_blocks_and_a_wrong_permutation():
  order = jnp.arange(12)
  for block in (5, 0):
    with pytest.raises(ValueError, match="12 prototypes cannot be cut into equal blocks"):
      assignment.partition(jnp.zeros((3, 12)), order, block)
  with pytest.raises(ValueError, match=r"has shape \(12,\)"):
    assignment.partition(jnp.zeros((3, 12)), order[:6], 4)


@pytest.mark.parametrize("kind", ["unit", "isotropic", "diagonal"])
def test_gaussian_scores_have_the_posterior_of_the_densities(kind):
  rng = np.random.default_rng(0)
  rows, means = rng.normal(size=(10, 5)), rng.normal(size=(7, 5))
  variances = np.full((7, 5), 1 / 3.0)
  options = {"kappa": 3.0}
  if kind == "unit":
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    options["unit_rows"] = True
  elif kind == "diagonal":
    variances = rng.uniform(0.1, 2.0, (7, 5))
    options = {"variances": jnp.asarray(variances)}
  squares = (rows[:, None] - means[None]) ** 2 / variances[None]
  density = np.exp(-0.5 * (squares + np.log(2 * np.pi * variances)[None]).sum(axis=2))
  scores = assignment.gaussian_scores(jnp.asarray(rows), jnp.asarray(means), **options)
  np.testing.assert_allclose(
    jax.nn.softmax(scores), density / density.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-7
  )
