"""Mixtures of von Mises-Fisher distributions in float32."""

import jax
import jax.numpy as jnp


def log_normalizer(kappa: jax.Array, dim: int) -> jax.Array:
  """ln C_p(kappa) - ln C_p(0), the density exp(kappa mu.y) C_p(kappa) on the unit sphere of R^p.

  ln C_p(kappa) = nu ln kappa - (p / 2) ln 2 pi - ln I_nu(kappa) with nu = p / 2 - 1. The Bessel
  function is the uniform expansion for large nu with two correction terms; with s = sqrt(nu^2 +
  kappa^2) and t = nu / s

    ln I_nu(kappa) = s + nu ln(kappa / (nu + s)) - ln(2 pi s) / 2 + ln(1 + u1 / nu + u2 / nu^2)

  The value at 0 is subtracted inside, term by term: at p = 256 it is 344, which would leave three
  decimals of a float32. A softmax over components does not see it.

  Args:
    kappa: any shape, not negative, any float dtype.
    dim: p, at least 4; the larger, the more exact (p = 64: 6e-7, p = 256: 9e-9, kappa to 500).

  Returns:
    Like `kappa`, at least float32; 0 at 0 and falling. Differentiable everywhere.

  Raises:
    ValueError: if `dim` is below 4.
  """
  if dim < 4:
    raise ValueError(f"the expansion needs dimension 4 or more, got {dim}")
  kappa = kappa.astype(jnp.promote_types(kappa.dtype, jnp.float32))
  nu = dim / 2 - 1

  def correction(t):
    u1 = (3 * t - 5 * t**3) / 24
    u2 = (81 * t**2 - 462 * t**4 + 385 * t**6) / 1152
    return 1 + u1 / nu + u2 / nu**2

  s = jnp.sqrt(nu**2 + kappa**2)
  excess = kappa**2 / (s + nu)  # s - nu without its cancellation
  return (
    nu * jnp.log1p(excess / (2 * nu))
    - excess
    + 0.5 * jnp.log1p(excess / nu)
    - jnp.log(correction(nu / s) / correction(1.0))
  )


def mixture_scores(
  scores: jax.Array, norms: jax.Array, temperature: float | jax.Array, dim: int
) -> jax.Array:
  """Scores that, over the temperature, are the logits of a vMF mixture (arXiv 2405.10939).

  Component k has mean w_k / |w_k|, concentration |w_k| / temperature and weight 1 / K, so its logit
  is w_k.y / temperature + ln C_p(|w_k| / temperature).

  Args:
    scores: [..., K] float32, inner products w_k.y with unit y.
    norms: [K], |w_k|.
    temperature: of the softmax to come.
    dim: p, of w and y.

  Returns:
    [..., K] float32.
  """
  return scores + jnp.expand_dims(offsets(norms, temperature, dim), range(scores.ndim - 1))


def offsets(norms: jax.Array, temperature: float | jax.Array, dim: int) -> jax.Array:
  """What `mixture_scores` adds to the products with each component: [K] -> [K]."""
  return temperature * log_normalizer(norms / temperature, dim)


def log_mean_assignment(logits: jax.Array) -> jax.Array:
  """ln of the mean over all rows of softmax(logits): [..., K] -> float32 [K], finite."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(-1, logits.shape[-1])
  return jax.nn.logsumexp(log_p, axis=0) - jnp.log(log_p.shape[0])
