"""From scores over prototypes to assignments: Sinkhorn, centring, partitions, Gaussian posteriors.

Batch statistics are plain reductions over axis 0, so under jit over a mesh they are over the global
batch. Everything is float32 whatever the dtype of the scores.
"""

import math

import jax
import jax.numpy as jnp

from protojax import errors


def log_sinkhorn(
  log_scores: jax.Array, *, num_steps: int = 3, counted: jax.Array | None = None
) -> jax.Array:
  """Balances assignments over the batch: Sinkhorn-Knopp in the log domain.

  One step gives every prototype the same total over the N samples, then every sample a total of one
  (arXiv 2006.09882, 1306.0895). As samples come last, rows are distributions and the totals of the
  prototypes, N / K each in the limit, are approximate. An offset common to a prototype, or to all
  scores, has no effect. An offset of a *sample* does: before they have converged, the steps depend
  on where they start, so subtracting each row's maximum "for safety" is not neutral.

  Args:
    log_scores: [N, K] logarithms of unnormalised assignments, finite, any float dtype.
    num_steps: at least 1; static.
    counted: bool [N], the samples that are balanced; the others, none by default, take part in no
      total, and are assigned with the offsets that these have given the prototypes.

  Returns:
    [N, K] float32, log assignments; the exponentials of a row sum to one.

  Raises:
    ValueError: if `log_scores` has not two axes or `num_steps` is below 1.
  """
  if log_scores.ndim != 2 or num_steps < 1:
    raise ValueError(
      f"log_sinkhorn takes scores [N, K] and num_steps >= 1, got {log_scores.shape} and {num_steps}"
    )
  log_scores = log_scores.astype(jnp.float32)
  num_samples, num_prototypes = log_scores.shape
  if counted is None:
    balanced = math.log(num_samples / num_prototypes)
  else:
    balanced = jnp.log(jnp.maximum(counted.sum(), 1) / num_prototypes)

  where = None if counted is None else counted[:, None]

  def offset(total):  # none where nothing counts
    return jnp.where(jnp.isneginf(total), 0.0, total) - balanced

  # Offsets of prototypes and of samples are carried: to carry [N, K] would be to hold it twice.
  # Those of prototypes are measured from the balanced total, or they would grow with every step.
  # After the first step rows are distributions and prototypes had N / K each, so what prototypes
  # get next lies between 1 / (N K) and N, what samples get then between 1 / K^2 and N K: logarithms
  # of these need no maximum first, on which devices would have to agree.
  def balance(_, offsets):
    by_prototype, by_sample = offsets
    q = jnp.exp(log_scores - by_prototype[None, :] - by_sample[:, None])
    by_prototype = offset(by_prototype + jnp.log(jnp.sum(q, axis=0, where=where)))
    q = jnp.exp(log_scores - by_prototype[None, :] - by_sample[:, None])
    return by_prototype, by_sample + jnp.log(q.sum(axis=1))

  by_prototype = offset(jax.nn.logsumexp(log_scores, axis=0, where=where))
  by_sample = jax.nn.logsumexp(log_scores - by_prototype[None, :], axis=1)
  offsets = jax.lax.fori_loop(1, num_steps, balance, (by_prototype, by_sample))
  return log_scores - offsets[0][None, :] - offsets[1][:, None]


def sinkhorn(
  scores: jax.Array,
  *,
  temperature: float | jax.Array,
  num_steps: int = 3,
  counted: jax.Array | None = None,
) -> jax.Array:
  """Sinkhorn targets exp(log_sinkhorn(scores / temperature)), without a gradient.

  >>> alike = jnp.asarray([[1.0, 0.8], [1.0, 0.9]])  # both samples prefer prototype 0
  >>> print(sinkhorn(alike, temperature=0.05).argmax(axis=1))  # but each has to be used
  [0 1]

  Args:
    scores: [N, K], N rows of the global batch, any float dtype.
    temperature: positive; smaller is sharper.
    num_steps, counted: see `log_sinkhorn`.

  Returns:
    [N, K] float32, rows sum to one.
  """
  scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
  return jnp.exp(log_sinkhorn(scores / temperature, num_steps=num_steps, counted=counted))


def center_update(
  center: jax.Array, logits: jax.Array, momentum: float | jax.Array = 0.9
) -> jax.Array:
  """Moving average of the mean teacher scores (arXiv 2104.14294).

  Args:
    center: [K] float32.
    logits: [..., K] raw scores, before centre and temperature, any float dtype.
    momentum: share of the old centre that stays.

  Returns:
    [K] float32 without a gradient, for the *next* step's targets.
  """
  logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
  mean = logits.mean(axis=tuple(range(logits.ndim - 1)))
  return momentum * jax.lax.stop_gradient(center) + (1.0 - momentum) * mean


def sharpen(logits: jax.Array, center: jax.Array, temperature: float | jax.Array) -> jax.Array:
  """Centred and sharpened targets softmax((logits - center) / temperature), without a gradient.

  Args:
    logits: [..., K] teacher scores, any float dtype.
    center: [K].
    temperature: positive; smaller is sharper.

  Returns:
    [..., K] float32, rows sum to one.
  """
  logits = logits.astype(jnp.float32) - jnp.expand_dims(center, range(logits.ndim - 1))
  return jax.lax.stop_gradient(jax.nn.softmax(logits / temperature))


def targets(
  scores: jax.Array,
  center: jax.Array,
  *,
  kind: str,
  temperature: float | jax.Array,
  num_steps: int = 3,
  counted: jax.Array | None = None,
) -> jax.Array:
  """Targets of a teacher, "center" (`sharpen`) or "sinkhorn" over all rows, without a gradient.

  Args:
    scores: [..., K] of the global batch, any float dtype.
    center: [K]; unused by Sinkhorn.
    kind: `method.targets`.
    temperature: positive; smaller is sharper.
    num_steps: of Sinkhorn.
    counted: bool [...], the rows that Sinkhorn balances; None: all of them.

  Returns:
    [..., K] float32, rows sum to one.

  Raises:
    UserError: for an unknown kind.
  """
  if kind == "center":
    return sharpen(scores, center, temperature=temperature)
  if kind == "sinkhorn":
    flat = scores.reshape(-1, scores.shape[-1])
    counted = None if counted is None else counted.reshape(-1)
    q = sinkhorn(flat, temperature=temperature, num_steps=num_steps, counted=counted)
    return q.reshape(scores.shape)
  raise errors.UserError(f"method.targets={kind!r} is unknown: choose center or sinkhorn")


def random_partition(key: jax.Array, num_prototypes: int) -> jax.Array:
  """A random order of the prototypes, int32 [K], to be cut into blocks by `partition`."""
  return jax.random.permutation(key, num_prototypes).astype(jnp.int32)


def partition(scores: jax.Array, permutation: jax.Array, block: int) -> jax.Array:
  """Cuts reordered scores into blocks of prototypes (Silva and Ramírez Rivera, NeurIPS 2023).

  Args:
    scores: [..., K].
    permutation: int32 [K], each of 0 .. K - 1 once; see `random_partition`.
    block: prototypes a block, a divisor of K.

  Returns:
    [..., P, block] with P = K / block, of the dtype of `scores`.

  Raises:
    ValueError: if `block` does not divide K or `permutation` is not [K].
  """
  num = scores.shape[-1]
  if block < 1 or num % block:
    raise ValueError(f"{num} prototypes cannot be cut into equal blocks of {block}: take a divisor")
  if permutation.shape != (num,):
    raise ValueError(f"a permutation of {num} prototypes has shape {(num,)}: {permutation.shape}")
  # Told that no index comes twice, the gradient is a scatter without collisions.
  ordered = scores.at[..., permutation].get(mode="promise_in_bounds", unique_indices=True)
  return ordered.reshape(*scores.shape[:-1], num // block, block)


def gaussian_scores(
  rows: jax.Array,
  means: jax.Array,
  *,
  kappa: float | jax.Array = 1.0,
  variances: jax.Array | None = None,
  unit_rows: bool = False,
  precision: str = "highest",
) -> jax.Array:
  """log N(h_i; mu_k, Sigma_k), less what no component changes: softmax gives the posterior.

  Args:
    rows: [N, D] float32.
    means: [K, D] float32.
    kappa: [] inverse variance of all components in all dimensions; unused with `variances`.
    variances: [K, D] float32, diagonal covariances.
    unit_rows: rows and means have length one. The isotropic quadratic form is then exactly
      kappa cos(h_i, mu_k).
    precision: of the products, one of `streaming.PRECISIONS`. With `variances` they are always
      "highest": terms of size 1 / variance cancel.

  Returns:
    [N, K] float32.
  """

  def product(a, b, precision):
    return jnp.einsum("nd,kd->nk", a, b, precision=precision)

  if variances is not None:
    inverse = 1.0 / variances
    offset = jnp.sum(means**2 * inverse + jnp.log(variances), axis=1)
    quadratic = product(rows**2, inverse, "highest")
    quadratic -= 2.0 * product(rows, means * inverse, "highest")
    return -0.5 * (quadratic + offset[None, :])
  inner = product(rows, means, precision)
  return kappa * (inner if unit_rows else inner - 0.5 * jnp.sum(means**2, axis=1)[None, :])
