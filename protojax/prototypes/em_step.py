"""One E-step and one M-step of a mixture, over all components at once or by blocks of them.

`mixture` says what a component is and what the options mean; this is the arithmetic of one batch.
Both ways give the same numbers. By blocks nothing of size [N, K] is made, and the components move
in place, so that an update needs the memory of one block beside the state.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from protojax import losses
from protojax.prototypes import assignment, streaming

TINY = 1e-30


class Components(NamedTuple):
  """What belongs to k components; the fields of `mixture.MixtureState` with these names."""

  mass: jax.Array  # [k]
  sums: jax.Array  # [k, D]
  squares: jax.Array | None  # [k, D]
  means: jax.Array  # [k, D]
  variances: jax.Array | None  # [k, D]
  usage: jax.Array  # [k]


class Rules(NamedTuple):
  """What the options of a mixture come to at one step."""

  num_components: int  # K, of which a block is a part
  num_rows: int  # N
  kappa: jax.Array | None  # [], as in the state
  beta: float | jax.Array
  use_pi: bool
  normalize: bool
  balance_steps: int  # of Sinkhorn; 0: the mixture is not balanced
  mass: str  # ca or ema
  age: Callable[[jax.Array], jax.Array]  # n_k [k] -> n_k over the window, [k]
  variance_floor: float
  momentum: float
  precision: str  # of the products, one of `streaming.PRECISIONS`


class Batch(NamedTuple):
  """Sums over a batch and k components."""

  counts: jax.Array | None  # [k], n_k
  entropy: jax.Array  # [], of the responsibilities
  moved: jax.Array  # [], squared distances of new means to old ones
  cross: jax.Array  # [], sum of n_k mu (mu - 2 mean of the batch)
  max_cos: jax.Array  # [], mean over rows of the cosine to the nearest old mean


def log_joint(
  components: Components, rows: jax.Array, *, kappa, beta, use_pi, unit, precision="highest"
) -> jax.Array:
  """beta (log pi_k + log N(h; mu_k, Sigma_k)) less a constant: rows [N, D] -> [N, k]."""
  scores = assignment.gaussian_scores(
    rows,
    components.means,
    kappa=kappa,
    variances=components.variances,
    unit_rows=unit,
    precision=precision,
  )
  if use_pi:
    scores += jnp.log(components.mass)[None, :]
  return beta * scores


def update(
  rules: Rules, components: Components, rows: jax.Array, block: int
) -> tuple[Components, Batch]:
  """Components after a batch.

  Args:
    rules: of this step.
    components: all K.
    rows: [N, D] float32, as the mixture sees them.
    block: components compared at a time, see `streaming.block_size`; 0: all.
  """
  if block:
    return _by_blocks(rules, components, rows, block)
  log_q = _joint(rules, components, rows)
  if rules.balance_steps:
    log_q = assignment.log_sinkhorn(log_q, num_steps=rules.balance_steps)
  else:
    log_q = jax.nn.log_softmax(log_q)
  new, batch = _move(rules, components, rows, log_q)
  nearest = _cosines(rules, rows, components.means).max(axis=1)
  return new, batch._replace(max_cos=nearest.mean())


def _by_blocks(rules, components, rows, block):
  own = streaming.own_rows(rows)  # [m, n, R, D]
  m, dim = own.shape[0], own.shape[-1]

  def logits(some):  # of k components on each of m devices: [m, n, R, k]
    on_device = jax.vmap(functools.partial(_joint, rules), in_axes=(None, 0))
    return jax.vmap(on_device)(some, own)

  def nearest(some):
    cosines = jax.vmap(functools.partial(_cosines, rules), in_axes=(0, None))
    return jax.vmap(cosines)(own, some.means).max(axis=-1)

  blocks = streaming.cut(components, block)
  log_z = streaming.log_partition(logits, blocks)
  offsets = jnp.zeros(rules.num_components)
  if rules.balance_steps:
    offsets, log_z = streaming.sinkhorn(
      logits, blocks, num_steps=rules.balance_steps, log_z=jnp.zeros_like(log_z)
    )
    offsets = streaming.joined(offsets)
  max_cos = streaming.each(nearest, blocks).max(axis=(0, 1)).mean()

  def on_devices(x):  # [K, ...] -> [m, K / m, ...]
    x = x.reshape(m, -1, *x.shape[1:])
    return x if m == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec("model"))

  def part(x, i):
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)

  def put(x, new, i):
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * block, axis=1)

  # A block waits for the next round to be put in its place: computed and put in one round, XLA
  # fuses both and copies all components in every round.
  def round_of(i, carried):
    everything, waiting, counts, sums = carried
    everything = jax.tree.map(streaming.as_outside, everything)
    everything = jax.tree.map(
      lambda x, new: put(x, new, jnp.maximum(i - 1, 0)), everything, waiting
    )
    some = jax.tree.map(lambda x: part(x, i), everything)
    log_q = logits(some) - log_z[None, ..., None] - part(offsets, i)[:, None, None]
    moved = jax.vmap(functools.partial(_move, rules))
    waiting, batch = moved(some, own.reshape(m, -1, dim), log_q.reshape(m, -1, block))
    sums = jax.tree.map(lambda a, b: a + b.sum(), sums, batch._replace(counts=None))
    return everything, waiting, put(counts, batch.counts, i), sums

  offsets, everything = jax.tree.map(on_devices, (offsets, components))
  waiting = jax.tree.map(lambda x: part(x, 0), everything)
  num_blocks = rules.num_components // (m * block)
  start = everything, waiting, jnp.zeros_like(offsets), Batch(None, *jnp.zeros(4))
  everything, waiting, counts, sums = jax.lax.fori_loop(0, num_blocks, round_of, start)
  everything = jax.tree.map(lambda x, new: put(x, new, num_blocks - 1), everything, waiting)
  new = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), everything)
  return new, sums._replace(counts=counts.reshape(-1), max_cos=max_cos)


def _joint(rules, components, rows):
  return log_joint(
    components,
    rows,
    kappa=rules.kappa,
    beta=rules.beta,
    use_pi=rules.use_pi,
    unit=rules.normalize,
    precision=rules.precision,
  )


def _cosines(rules, rows, means):
  if not rules.normalize:
    rows, means = losses.l2_normalize(rows), losses.l2_normalize(means)
  return assignment.gaussian_scores(rows, means, unit_rows=True, precision=rules.precision)


def _move(rules, old, rows, log_q) -> tuple[Components, Batch]:
  """The M-step: k components after rows [N, D] of which they take exp(log_q), [N, k]."""
  q = jnp.exp(log_q)
  count = q.sum(axis=0)  # n_k
  share = count / rules.num_rows
  load = share * rules.num_components  # 1 when balanced
  received = count[:, None] > 0.0
  # A variance is a difference of two sums.
  precision = rules.precision if old.variances is None else "highest"

  def average(x):
    total = jnp.einsum("nk,nd->kd", q, x, precision=precision)
    return total / jnp.maximum(count, TINY)[:, None]

  # Most components receive next to nothing in a step: 1 - exp would be 0 for them, expm1 is not.
  rate = -jnp.expm1(-rules.age(count))
  target = load if rules.mass == "ema" else jnp.ones_like(load)
  mass = old.mass + rate * (target - old.mass)

  def move(statistic, of_batch):
    moved = statistic + rate[:, None] * (target[:, None] * of_batch - statistic)
    return jnp.where(received, moved, statistic)

  batch_means = average(rows)
  sums = move(old.sums, batch_means)
  mean = sums / mass[:, None]
  means = losses.l2_normalize(mean) if rules.normalize else mean
  means = jnp.where(received, means, old.means)
  usage = rules.momentum * old.usage + (1.0 - rules.momentum) * share
  new = old._replace(mass=mass, sums=sums, means=means, usage=usage)
  if old.variances is not None:
    squares = move(old.squares, average(rows**2))
    variances = jnp.maximum(squares / mass[:, None] - mean**2, rules.variance_floor)
    new = new._replace(squares=squares, variances=jnp.where(received, variances, old.variances))
  before, after = old.means, means
  if not rules.normalize:
    before, after = losses.l2_normalize(before), losses.l2_normalize(after)
  return new, Batch(
    counts=count,
    entropy=-jnp.sum(q * log_q),  # from the logarithms, which are there
    moved=jnp.sum((after - before) ** 2),
    cross=jnp.sum(count[:, None] * means * (means - 2.0 * batch_means)),
    max_cos=jnp.zeros(()),
  )
