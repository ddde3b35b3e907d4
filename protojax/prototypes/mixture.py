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

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from protojax import losses
from protojax.prototypes import assignment, streaming

Schedule = Callable[[jax.Array], jax.Array | float]  # number of past updates, int32 [] -> value

_TINY = 1e-30
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


class _Components(NamedTuple):
  """What belongs to a component, leaves [..., k] or [..., k, D]: a part of `MixtureState`."""

  mass: jax.Array
  sums: jax.Array
  squares: jax.Array | None
  means: jax.Array
  variances: jax.Array | None
  usage: jax.Array


class _Batch(NamedTuple):
  """Sums over a batch and k components."""

  counts: jax.Array | None  # [k], n_k
  entropy: jax.Array  # [], of the responsibilities
  moved: jax.Array  # [], squared distances of new means to old ones
  cross: jax.Array  # [], sum of n_k mu (mu - 2 mean of the batch)
  max_cos: jax.Array  # [], mean over rows of the cosine to the nearest old mean


def _components(state: MixtureState) -> _Components:
  return _Components(*(getattr(state, name) for name in _Components._fields))


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
  length = jnp.sqrt(jnp.maximum(jnp.sum(features**2, axis=-1, keepdims=True), _TINY))
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
  joint = _log_joint(state, _components(state), rows, beta=beta, use_pi=use_pi, unit=normalize)
  if balance_steps:
    return assignment.log_sinkhorn(joint, num_steps=balance_steps)
  return jax.nn.log_softmax(joint)


def _log_joint(state, components, rows, *, beta, use_pi, unit) -> jax.Array:
  """beta (log pi_k + log N(h; mu_k, Sigma_k)) less a constant: rows [N, D] -> [N, k]."""
  scores = assignment.gaussian_scores(
    rows, components.means, kappa=state.kappa, variances=components.variances, unit_rows=unit
  )
  if use_pi:
    scores += jnp.log(components.mass)[None, :]
  return beta * scores


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
    block = streaming.block_size(options.block, rows.shape[0], num_components)
    components, batch = by_blocks(old, rows, block) if block else at_once(old, rows)

    share = batch.counts / rows.shape[0]
    new = old._replace(step=step + 1, **components._asdict())
    if learn_kappa:
      # distance = sum_ik q_ik |h_i - mu_k|^2 / N
      distance = (jnp.sum(rows**2) + batch.cross) / rows.shape[0]
      forgotten = -jnp.expm1(-age_of(batch.counts, rows.shape[0], step).mean())
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

  def at_once(old: MixtureState, rows: jax.Array) -> tuple[_Components, _Batch]:
    log_q = joint(old, _components(old), rows)
    if balanced:
      log_q = assignment.log_sinkhorn(log_q, num_steps=balance_steps)
    else:
      log_q = jax.nn.log_softmax(log_q)
    components, batch = m_step(old.step, _components(old), rows, log_q, rows.shape[0])
    return components, batch._replace(max_cos=cosines(rows, old.means).max(axis=1).mean())

  def by_blocks(old: MixtureState, rows: jax.Array, block: int) -> tuple[_Components, _Batch]:
    """As `at_once`, without anything of size [N, K] or a second [K, D]."""
    own = streaming.own_rows(rows)  # [m, n, R, D]
    m = own.shape[0]

    def logits(components):  # of k components on each of m devices: [m, n, R, k]
      parts = jax.vmap(functools.partial(joint, old), in_axes=(None, 0))
      return jax.vmap(parts)(components, own)

    blocks = streaming.cut(_components(old), block)
    log_z = streaming.log_partition(logits, blocks)
    offsets = jnp.zeros(num_components)
    if balanced:
      offsets, log_z = streaming.sinkhorn(
        logits, blocks, num_steps=balance_steps, log_z=jnp.zeros_like(log_z)
      )
      offsets = streaming.joined(offsets)

    def on_devices(x):  # [K, ...] -> [m, K / m, ...]
      x = x.reshape(m, -1, *x.shape[1:])
      return x if m == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec("model"))

    def part(x, i):
      return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)

    def put(x, new, i):
      return jax.lax.dynamic_update_slice_in_dim(x, new, i * block, axis=1)

    # A block waits for the next round to be put in its place: computed and put in one round, XLA
    # fuses both and copies all prototypes in every round.
    def move(i, carried):
      everything, waiting, counts, sums = carried
      everything = jax.tree.map(streaming.as_outside, everything)
      everything = jax.tree.map(
        lambda x, new: put(x, new, jnp.maximum(i - 1, 0)), everything, waiting
      )
      components = jax.tree.map(lambda x: part(x, i), everything)
      log_q = logits(components) - log_z[None, ..., None] - part(offsets, i)[:, None, None]
      each = jax.vmap(functools.partial(m_step, old.step), in_axes=(0, 0, 0, None))
      flat = log_q.reshape(m, -1, block)
      waiting, batch = each(components, own.reshape(m, -1, dim), flat, rows.shape[0])
      sums = jax.tree.map(lambda a, b: a + b.sum(), sums, batch._replace(counts=None))
      return everything, waiting, put(counts, batch.counts, i), sums

    offsets = on_devices(offsets)
    everything = jax.tree.map(on_devices, _components(old))
    waiting = jax.tree.map(lambda x: part(x, 0), everything)
    num_blocks = num_components // (m * block)
    everything, waiting, counts, sums = jax.lax.fori_loop(
      0,
      num_blocks,
      move,
      (everything, waiting, jnp.zeros_like(offsets), _Batch(None, *jnp.zeros(4))),
    )
    everything = jax.tree.map(lambda x, new: put(x, new, num_blocks - 1), everything, waiting)
    components = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), everything)
    nearest = streaming.each(
      lambda part: jax.vmap(jax.vmap(cosines, (0, None)))(own, part.means).max(axis=-1), blocks
    )
    return components, sums._replace(
      counts=counts.reshape(-1), max_cos=nearest.max(axis=(0, 1)).mean()
    )

  def joint(old, components, rows):
    return _log_joint(
      old, components, rows, beta=_at(beta, old.step), use_pi=use_pi, unit=normalize
    )

  def cosines(rows, means):
    if not normalize:
      rows, means = losses.l2_normalize(rows), losses.l2_normalize(means)
    return assignment.gaussian_scores(rows, means, unit_rows=True)

  def age_of(count, num_rows, step):
    if window is None:  # the load is 1 when balanced
      return count / num_rows * num_components / _at(horizon_steps, step)
    return count / _at(window, step)

  def m_step(step, old: _Components, rows, log_q, num_rows) -> tuple[_Components, _Batch]:
    """k components after rows [N, D] of which they take exp(log_q), [N, k]."""
    q = jnp.exp(log_q)
    count = q.sum(axis=0)  # n_k
    share = count / num_rows
    load = share * num_components  # 1 when balanced
    received = count[:, None] > 0.0

    def average(x):
      total = jnp.einsum("nk,nd->kd", q, x, precision=jax.lax.Precision.HIGHEST)
      return total / jnp.maximum(count, _TINY)[:, None]

    # Most components receive next to nothing in a step: 1 - exp would be 0 for them, expm1 is not.
    rate = -jnp.expm1(-age_of(count, num_rows, step))
    target = load if mass == "ema" else jnp.ones_like(load)
    new_mass = old.mass + rate * (target - old.mass)

    def move(statistic, of_batch):
      moved = statistic + rate[:, None] * (target[:, None] * of_batch - statistic)
      return jnp.where(received, moved, statistic)

    batch_means = average(rows)
    sums = move(old.sums, batch_means)
    mean = sums / new_mass[:, None]
    means = jnp.where(received, losses.l2_normalize(mean) if normalize else mean, old.means)
    usage = momentum * old.usage + (1.0 - momentum) * share
    new = old._replace(mass=new_mass, sums=sums, means=means, usage=usage)
    if diagonal:
      squares = move(old.squares, average(rows**2))
      variances = jnp.maximum(squares / new_mass[:, None] - mean**2, floor)
      new = new._replace(squares=squares, variances=jnp.where(received, variances, old.variances))
    before, after = old.means, means
    if not normalize:
      before, after = losses.l2_normalize(before), losses.l2_normalize(after)
    return new, _Batch(
      counts=count,
      entropy=-jnp.sum(q * log_q),  # from the logarithms, which are there
      moved=jnp.sum((after - before) ** 2),
      cross=jnp.sum(count[:, None] * means * (means - 2.0 * batch_means)),
      max_cos=jnp.zeros(()),
    )

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
  on_sphere = r * (dim - r**2) / jnp.maximum(1.0 - r**2, _TINY)
  in_space = dim / jnp.maximum(scatter, _TINY)
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
