"""Decoupled prototypes: the means of a Gaussian mixture that moves by online EM (arXiv 2510.20108).

An encoder that trains its own prototypes can lower its loss by letting them coincide. Here they are
estimated beside it, one E-step and one M-step a batch, without gradient or optimizer. A component
forgets as much as it receives responsibility, so one that receives none stays to the bit.

    em = mixture.online_em(num_components=1024, dim=256, horizon_steps=2000)
    state = em.init(jax.random.key(0))
    state, aux = em.update(state, features)  # every step
    scores = z @ state.means.T

Under jit over a mesh the sums are over the global batch. With K split over one mesh axis and rows
over another, devices exchange one number a row or a component and the sums of their own components.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from protojax import losses
from protojax.prototypes import assignment, em_step, streaming

Schedule = Callable[[jax.Array], jax.Array | float]  # number of past updates, int32 [] -> value

_RESEED_BELOW = 0.1  # usage, in units of 1 / K, under which a component is moved
_RESEED_MOST = 8  # components that one update moves
_RESEED_NOISE = 1.0  # standard deviations of the batch; below 1, copies of few rows cost uniqueness


class MixtureState(NamedTuple):
  """K components in D dimensions; float32 unless said, None where an option is off."""

  step: jax.Array  # int32 [], updates so far
  mass: jax.Array  # [K], S^pi in units of the balanced mass: 1, whatever batch size and horizon
  sums: jax.Array  # [K, D], S^mu in the same units: features weighted by responsibility
  squares: jax.Array | None  # [K, D], S^Sigma: the same of squares; diagonal covariance only
  means: jax.Array  # [K, D], the prototypes; unit rows when features are normalised
  variances: jax.Array | None  # [K, D]; diagonal covariance only
  kappa: jax.Array | None  # [], inverse variance for the next E-step; isotropic covariance only
  scatter: jax.Array | None  # [], running mean squared distance to the means; learned kappa only
  usage: jax.Array  # [K], running share of the batch; unlike `mass` it shows unused components
  feature_mean: jax.Array | None  # [D], running mean of the features as they come; centred only
  key: jax.Array | None  # typed random key []; reseeding only


class MixtureAux(NamedTuple):
  """What one batch did, float32; under jit an entry that nobody reads costs nothing."""

  usage: jax.Array  # [K], share of the batch each component took; sums to 1
  entropy: jax.Array  # [], mean entropy of a row's responsibilities, nats: 0 hard, ln K blind
  perplexity: jax.Array  # [], exp of the entropy of `usage`, 1 to K
  movement: jax.Array  # [], mean over components of 1 - cos(new mean, old mean), before reseeding
  max_cos: jax.Array  # [], mean over rows of the cosine to the nearest old mean


class PrototypeTransformation(NamedTuple):
  """Two pure functions, after `optax.GradientTransformation`; see `online_em`.

  Attributes:
    init: (key, means [K, D] or None for random directions) -> MixtureState.
    update: (state, features [..., D] of any float dtype) -> (MixtureState, MixtureAux). Jit it,
      alone or inside a training step; no gradient passes.
  """

  init: Callable[..., MixtureState]
  update: Callable[[MixtureState, jax.Array], tuple[MixtureState, MixtureAux]]


class Options(NamedTuple):
  """What few mixtures need to change; `online_em` has the rest.

  Attributes:
    mass: where mass moves to. "ca" (the source): to the same value whenever a component is used,
      so weights, which start uniform, are that to the bit for good, and `use_pi` changes nothing.
      "ema": to n_k; weights then follow usage where a batch holds many rows a component (the fixed
      point is E[n_k^2] / E[n_k]: with few, hard ones it is uniform).
    covariance: "isotropic", one 1 / kappa for all, or "diagonal", that of the paper, from 1 / D and
      never below `variance_floor`.
    learn_kappa: start at `kappa`, then follow the mean squared distance of features to means, over
      the horizon: the Gaussian D / distance or, for unit features and r = 1 - distance / 2, the
      von Mises-Fisher r (D - r^2) / (1 - r^2), at least 1 (Banerjee et al., JMLR 6, 2005); at most
      one over the least variance.
    beta: multiplies the log joint, log pi included; below 1 softens (deterministic annealing,
      Ueda and Nakano, Neural Networks 11(2), 1998). A number, or a function of past updates.
    use_pi: weigh components by pi in the posterior, as the paper does; for `mass` "ema".
    normalize: scale features to length 1 and project means on the sphere. If False, a plain
      Gaussian mixture; standardise the features then, their squares are kept in float32.
    balance_steps: of `assignment.log_sinkhorn`, where the mixture is `balanced`.
    reseed: move components with a running usage below .1 / K, the lowest 8 of them, to random rows
      of the batch plus noise of a standard deviation of the batch per dimension.
    variance_floor: least variance of a dimension; None: max(1e-4, .05 / D).
    momentum: of the running usage and the running mean of the features.
    block: components that a device compares at a time, a divisor of those it has, so that an
      update needs the memory of one block; 0: all at once; None: see `streaming.block_size`.
    precision: of the products of features with components, one of `streaming.PRECISIONS`; those
      that variances are made of are always "highest".
  """

  mass: str = "ca"
  covariance: str = "isotropic"
  learn_kappa: bool = False
  beta: float | Schedule = 1.0
  use_pi: bool = True
  normalize: bool = True
  balance_steps: int = 3
  reseed: bool = False
  variance_floor: float | None = None
  momentum: float = 0.99
  block: int | None = None
  precision: str = "highest"


def _components(state: MixtureState) -> em_step.Components:
  return em_step.Components(*(getattr(state, name) for name in em_step.Components._fields))


def weights(state: MixtureState) -> jax.Array:
  """Mixture weights pi: [K] float32, sum to 1."""
  return state.mass / jnp.sum(state.mass)


def center(state: MixtureState, features: jax.Array) -> jax.Array:
  """Features [..., D] in the coordinates of prototypes fitted with `center_features`, float32.

  What a loss has to score against `state.means`. Subtracts the running mean, without a gradient,
  and restores each row's length: a unit row stays one, a learned inverse temperature (CARP) too.
  """
  return without_mean(features, jax.lax.stop_gradient(state.feature_mean))


def without_mean(features: jax.Array, mean: jax.Array) -> jax.Array:
  """Features [..., D] less a mean [D], each row of the length it had; float32."""
  features = losses.as_array(features).astype(jnp.float32)
  length = jnp.sqrt(jnp.maximum(jnp.sum(features**2, axis=-1, keepdims=True), em_step.TINY))
  mean = jnp.expand_dims(mean, range(features.ndim - 1))
  return length * losses.l2_normalize(features - mean)


def log_posterior(
  state: MixtureState,
  features: jax.Array,
  *,
  beta: float | jax.Array = 1.0,
  use_pi: bool = True,
  normalize: bool = True,
  balance_steps: int = 0,
) -> jax.Array:
  """The E-step: log responsibilities [N, K], float32, of features [..., D] with N rows.

  log softmax over k of beta (log pi_k + log N(h; mu_k, Sigma_k)). Arguments as in `Options`;
  `balance_steps` above 0 is `balanced`.
  """
  rows = _coordinates(state, _flatten(features, state.means.shape[1]), normalize)
  joint = em_step.log_joint(
    _components(state), rows, kappa=state.kappa, beta=beta, use_pi=use_pi, unit=normalize
  )
  if balance_steps:
    return assignment.log_sinkhorn(joint, num_steps=balance_steps)
  return jax.nn.log_softmax(joint)


def online_em(
  num_components: int,
  dim: int,
  *,
  horizon_steps: float | Schedule | None = None,
  window: float | Schedule | None = None,
  kappa: float | Schedule = 20.0,
  balanced: bool = False,
  center_features: bool = False,
  options: Options = Options(),  # noqa: B008, it is immutable
) -> PrototypeTransformation:
  """Online EM with forgetting by responsibility, for K components.

  With responsibilities q [N, K], n_k = sum_i q_ik and window W, a component keeps exp(-n_k / W) of
  its statistics and takes the rest from the batch (Celaya, Agostini, Neural Comput. 27(5), 2015).

  >>> em = online_em(num_components=2, dim=3, horizon_steps=2.0, balanced=True)
  >>> state = em.init(jax.random.key(0))
  >>> update = jax.jit(em.update)
  >>> features = jnp.asarray([[9.0, 1.0, 0.0], [9.0, 0.0, 1.0], [0.0, 5.0, -5.0], [0.0, 4.0, -6.0]])
  >>> for _ in range(20):
  ...   state, aux = update(state, features)
  >>> codes = (features @ state.means.T).argmax(axis=1)  # of each row its component
  >>> bool(codes[0] == codes[1] != codes[2] == codes[3])
  True
  >>> print(state.means.shape, aux.usage.round(1))
  (2, 3) [0.5 0.5]

  Args:
    num_components: K, at least 2.
    dim: D.
    horizon_steps: updates in which a component with balanced usage, n_k = N / K, forgets a factor
      e: W = horizon_steps N / K. For a horizon in epochs multiply by the updates an epoch has. Much
      longer than the run, it leaves the prototypes where they started. Like `window` and `kappa`
      a number, or a function of past updates.
    window: W in rows, instead; exactly one of the two. The eta of the source is exp(-1 / W).
    kappa: isotropic inverse variance. Unit features have the posterior softmax(kappa cos).
    balanced: Sinkhorn EM (arXiv 2006.16548): over the batch all components get the same total
      responsibility, to `Options.balance_steps` of `assignment.log_sinkhorn`. pi has no effect
      then.
    center_features: first subtract the running mean, this batch included; see `center`.
    options: the rest, see `Options`.

  Raises:
    ValueError: for options out of range or in conflict; in `update` unless floats [..., D] come.
  """
  mass, covariance, beta = options.mass, options.covariance, options.beta
  learn_kappa, use_pi = options.learn_kappa, options.use_pi
  normalize, balance_steps, reseed = options.normalize, options.balance_steps, options.reseed
  floor, momentum = options.variance_floor, options.momentum
  if floor is None:
    floor = max(1e-4, 0.05 / max(dim, 1))
  diagonal = covariance == "diagonal"
  positive = {
    "horizon_steps": horizon_steps,
    "window": window,
    "kappa": kappa,
    "beta": beta,
    "variance_floor": floor,
  }
  for wrong, message in (
    (num_components < 2 or dim < 1, f"{num_components=}, {dim=}: need at least 2 and 1"),
    ((horizon_steps is None) == (window is None), "give exactly one of horizon_steps and window"),
    (mass not in ("ca", "ema"), f"{mass=}: choose ca or ema"),
    (covariance not in ("isotropic", "diagonal"), f"{covariance=}: choose isotropic or diagonal"),
    (learn_kappa and diagonal, "learn_kappa needs covariance='isotropic'"),
    (learn_kappa and callable(kappa), "learn_kappa starts from a number, not from a schedule"),
    (balance_steps < 1, f"{balance_steps=}: must be at least 1"),
    (
      options.precision not in streaming.PRECISIONS,
      f"precision={options.precision!r}: choose {', '.join(streaming.PRECISIONS)}",
    ),
    (not 0.0 <= momentum < 1.0, f"{momentum=}: must be in [0, 1)"),
    *(
      (not (value is None or callable(value) or value > 0.0), f"{name}={value}: must be positive")
      for name, value in positive.items()
    ),
  ):
    if wrong:
      raise ValueError(message)

  def init(key: jax.Array, means: jax.Array | None = None) -> MixtureState:
    means_key, reseed_key = jax.random.split(key)
    shape = (num_components, dim)
    means = jax.random.normal(means_key, shape) if means is None else jnp.array(means, jnp.float32)
    if means.shape != shape:
      raise ValueError(f"means are [K, D] = {shape}, got {means.shape}")
    means = losses.l2_normalize(means) if normalize else means
    return MixtureState(
      step=jnp.zeros((), jnp.int32),
      mass=jnp.ones(num_components),
      sums=means.copy(),  # donated states must not share buffers
      squares=means**2 + 1.0 / dim if diagonal else None,
      means=means,
      variances=jnp.full(shape, 1.0 / dim, jnp.float32) if diagonal else None,
      kappa=None if diagonal else jnp.asarray(_at(kappa, 0), jnp.float32),
      scatter=jnp.zeros(()) if learn_kappa else None,
      usage=jnp.full(num_components, 1.0 / num_components, jnp.float32),
      feature_mean=jnp.zeros(dim) if center_features else None,
      key=reseed_key if reseed else None,
    )

  def update(state: MixtureState, features: jax.Array) -> tuple[MixtureState, MixtureAux]:
    old, rows = jax.lax.stop_gradient((state, _flatten(features, dim)))
    step = state.step
    if center_features:
      feature_mean = _running(old.feature_mean, rows.mean(axis=0), 1.0 - momentum, step)
      old = old._replace(feature_mean=feature_mean)
    rows = _coordinates(old, rows, normalize)

    def age(count):
      if window is None:  # the load is 1 when balanced
        return count / rows.shape[0] * num_components / _at(horizon_steps, step)
      return count / _at(window, step)

    rules = em_step.Rules(
      num_components=num_components,
      num_rows=rows.shape[0],
      kappa=old.kappa,
      beta=_at(beta, step),
      use_pi=use_pi,
      normalize=normalize,
      balance_steps=balance_steps if balanced else 0,
      mass=mass,
      age=age,
      variance_floor=floor,
      momentum=momentum,
      precision=options.precision,
    )
    block = streaming.block_size(options.block, rows.shape[0], num_components)
    components, batch = em_step.update(rules, _components(old), rows, block)

    share = batch.counts / rows.shape[0]
    new = old._replace(step=step + 1, **components._asdict())
    if learn_kappa:
      # distance = sum_ik q_ik |h_i - mu_k|^2 / N
      distance = (jnp.sum(rows**2) + batch.cross) / rows.shape[0]
      forgotten = -jnp.expm1(-age(batch.counts).mean())
      scatter = _running(old.scatter, distance, forgotten, step)
      new = new._replace(scatter=scatter, kappa=_kappa(scatter, dim, normalize, 1.0 / floor))
    elif not diagonal:
      new = new._replace(kappa=jnp.asarray(_at(kappa, step + 1), jnp.float32))
    aux = MixtureAux(
      usage=share,
      entropy=batch.entropy / rows.shape[0],
      perplexity=jnp.exp(losses.entropy(share)),
      movement=0.5 * batch.moved / num_components,  # 1 - cos, exact near 0
      max_cos=batch.max_cos,
    )
    return (move_unused(new, rows) if reseed else new), aux

  def move_unused(state: MixtureState, rows: jax.Array) -> MixtureState:
    row_key, noise_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    lowest, index = jax.lax.top_k(-state.usage, min(_RESEED_MOST, num_components))
    # An index out of range is dropped by the scatter.
    index = jnp.where(-lowest < _RESEED_BELOW / num_components, index, num_components)
    means = rows[jax.random.randint(row_key, index.shape, 0, rows.shape[0])]
    noise = _RESEED_NOISE * rows.std(axis=0)[None, :] * jax.random.normal(noise_key, means.shape)
    means = losses.l2_normalize(means + noise) if normalize else means + noise
    # Everything as at the start, but for the means.
    fresh = {"mass": 1.0, "sums": means, "means": means, "usage": 1.0 / num_components}
    if diagonal:
      fresh |= {"squares": means**2 + 1.0 / dim, "variances": 1.0 / dim}
    return state._replace(
      **{
        name: getattr(state, name).at[index].set(value, mode="drop")
        for name, value in fresh.items()
      }
    )

  return PrototypeTransformation(init, update)


def _kappa(scatter, dim, normalize, ceiling) -> jax.Array:
  r = 1.0 - 0.5 * scatter
  on_sphere = r * (dim - r**2) / jnp.maximum(1.0 - r**2, em_step.TINY)
  in_space = dim / jnp.maximum(scatter, em_step.TINY)
  return jnp.clip(on_sphere, 1.0, ceiling) if normalize else jnp.minimum(in_space, ceiling)


def _flatten(features, dim) -> jax.Array:
  """Any floats [..., D], of JAX, NumPy or the like -> float32 [N, D]."""
  features = losses.as_array(features)
  if features.shape[-1:] != (dim,) or not jnp.issubdtype(features.dtype, jnp.floating):
    raise ValueError(f"features are floats [..., {dim}], got {features.dtype}{features.shape}")
  return features.reshape(-1, dim).astype(jnp.float32)


def _coordinates(state, rows, normalize) -> jax.Array:
  """Rows [N, D] as the mixture sees them."""
  if state.feature_mean is not None:
    rows = rows - state.feature_mean[None, :]
  return losses.l2_normalize(rows) if normalize else rows


def _running(old, new, rate, step) -> jax.Array:
  """Moving average that starts as a plain one, so its first value does not matter."""
  return old + jnp.maximum(rate, 1.0 / (step + 1)) * (new - old)


def _at(value, step):
  return value(step) if callable(value) else value
