"""Sums over all prototypes, a block of them at a time: memory does not grow with K.

Logits [N, K] of a million prototypes fill an accelerator, but no loss needs them at once. It needs
sums over prototypes or over rows. Each function here goes through the prototypes once,
block by block, adds up, and forgets the block's logits; a gradient makes them again likewise.

    blocks = streaming.cut(prototypes, block)
    logits = lambda rows: lambda w: jnp.einsum("mnrd,mkd->mnrk", rows, w)
    z = streaming.log_partition(logits(own), blocks)

Logits come from a function of a block, so a block of anything can be prototypes: rows, or means
with variances. Shapes: K prototypes lie on m devices in nb blocks of k each, N rows on n devices, R
each. Each device goes through its own prototypes with its own rows, alone; what is summed over
devices is summed behind the loop. Without a mesh m = n = 1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from protojax import errors, placement

PyTree = Any
Logits = Callable[[PyTree], jax.Array]  # a block, leaves [m, k, ...] -> float32 [m, n, R, k]

DENSE = 2**27  # logits of a device, 512 MiB of float32, up to which all prototypes are one block
_AT_ONCE = 2**24  # logits of a block above that
LEFT_OUT = 1e30  # the log partition of a row that takes no part: finite, it gives nothing


def block_size(asked: int | None, num_rows: int, num_prototypes: int) -> int:
  """How many prototypes are compared at a time.

  Args:
    asked: `method.block`: None chooses by the memory of a device, 0 is all at once.
    num_rows: of the global batch.
    num_prototypes: K.

  Returns:
    Prototypes of a block on each device, a divisor of those that it has; 0: no blocks.

  Raises:
    UserError: if `asked` is not such a divisor.
  """
  n, m = placement.extent()
  held, rows = num_prototypes // m, -(-num_rows // n)
  if asked is None:
    if rows * held <= DENSE:
      return 0
    most = max(_AT_ONCE // rows, 1)
    return next(size for size in range(min(most, held), 0, -1) if held % size == 0)
  if asked < 0 or (asked and held % asked):
    raise errors.UserError(
      f"method.block={asked} does not cut the {held} prototypes of a device into equal blocks: "
      "choose a divisor, 0 for all at once, or leave it out"
    )
  return asked


def cut(prototypes: PyTree, block: int) -> PyTree:
  """Leaves [K, ...] -> [nb, m, k, ...], k = `block`, a divisor of K / m."""
  m = placement.extent()[1]

  def one(x):
    x = x.reshape(m, -1, block, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 0)
    return x if m == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec(None, "model"))

  return jax.tree.map(one, prototypes)


def joined(blocks: PyTree) -> PyTree:
  """What `cut` took apart: leaves [nb, m, k, ...] -> [K, ...]."""
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:]), blocks)


def own_rows(rows: jax.Array) -> jax.Array:
  """Rows [B, ..., D] as they meet prototypes -> [m, n, R, D]: to each device its own."""
  n, m = placement.extent()
  if rows.shape[0] % n:
    rows = rows.reshape(1, 1, -1, rows.shape[-1])
    return jnp.broadcast_to(rows, (m, *rows.shape[1:]))
  own = placement.parts_beside_prototypes(rows, (n, m))
  return own.reshape(m, n, -1, rows.shape[-1])


def log_partition(logits: Logits, blocks: PyTree) -> jax.Array:
  """ln of the sum of exp(logits) over all prototypes: float32 [n, R]."""

  @jax.checkpoint
  def one(block):
    return jax.nn.logsumexp(logits(block), axis=-1)

  return jax.nn.logsumexp(jax.lax.map(one, blocks), axis=(0, 1))


def log_column_sums(logits: Logits, blocks: PyTree, log_z: jax.Array) -> jax.Array:
  """ln of what each prototype gets of all rows, sum over rows of exp(logits - log_z).

  Args:
    logits, blocks: see the module.
    log_z: [n, R]; that of a row to leave out is LEFT_OUT.

  Returns:
    float32 [K].
  """

  @jax.checkpoint
  def one(block):
    return jax.nn.logsumexp(logits(block) - log_z[None, ..., None], axis=2)  # [m, n, k]

  by_device = jax.lax.map(one, blocks)
  return joined(jax.nn.logsumexp(by_device, axis=2))


class Moments(NamedTuple):
  """What assignments [N, K] say, without them; see `moments`.

  Attributes:
    values: mean of values under each row's assignment, leaves float32 [n, R, d].
    entropy: of each row's assignment in nats, float32 [n, R]; without a gradient.
    counts: what each prototype gets of the rows that count, float32 [K]; without a gradient.
  """

  values: PyTree
  entropy: jax.Array
  counts: jax.Array


def moments(
  logits: Logits,
  blocks: PyTree,
  log_z: jax.Array,
  values: PyTree,
  counted: jax.Array | None = None,
) -> Moments:
  """Means under the assignments exp(logits - log_z): attention without its weights.

  Args:
    logits, blocks: see the module.
    log_z: [n, R], what `log_partition` gives.
    values: leaves [nb, m, k, d], cut like the prototypes.
    counted: bool [n, R], rows that `Moments.counts` is of; None: all.
  """

  @jax.checkpoint
  def means(block, own):
    q = jnp.exp(logits(block) - log_z[None, ..., None])
    return jax.tree.map(lambda v: _product("mnrk,mkd->mnrd", q, v), own)

  def add(total, inputs):
    block, own = inputs
    log_q = jax.lax.stop_gradient(logits(block) - log_z[None, ..., None])
    q = jnp.exp(log_q)
    new = means(block, own), -jnp.sum(q * log_q, axis=-1)
    where = None if counted is None else counted[None, ..., None]
    return jax.tree.map(jnp.add, total, new), jnp.sum(q, axis=2, where=where)

  first = jax.tree.map(lambda x: x[0], (blocks, values))
  own_values = jax.eval_shape(means, *first)
  rows = jax.ShapeDtypeStruct((_one_of(blocks).shape[1], *log_z.shape), jnp.float32)
  total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (own_values, rows))
  (by_values, entropy), counts = jax.lax.scan(add, total, (blocks, values))
  by_values, entropy = jax.tree.map(lambda x: x.sum(axis=0), (by_values, entropy))
  return Moments(by_values, entropy, joined(counts.sum(axis=2)))


def sinkhorn(
  logits: Logits,
  blocks: PyTree,
  *,
  num_steps: int,
  log_z: jax.Array,
  counted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`assignment.log_sinkhorn` by its offsets: log assignments are logits - offsets - partition.

  A step goes through the prototypes once: a block's offsets need the rows' partitions of the step
  before, and add to those of the next.

  Args:
    logits, blocks: see the module; no gradient goes through.
    num_steps: at least 1; static.
    log_z: [n, R], subtracted at the start, which is not neutral; zeros for logits as they are.
    counted: bool [n, R], the rows that are balanced; None: all.

  Returns:
    (offsets [nb, m, k], partition [n, R]), float32.
  """
  rows = log_z.size if counted is None else jnp.maximum(counted.sum(), 1)
  shape = _one_of(blocks).shape[:3]
  balanced = jnp.log(rows / math.prod(shape))

  def one(samples, block):
    own = logits(block)
    left_out = samples if counted is None else jnp.where(counted, samples, LEFT_OUT)
    totals = jax.nn.logsumexp(own - left_out[None, ..., None], axis=(1, 2))
    offsets = jnp.maximum(totals, -LEFT_OUT) - balanced
    return offsets, jax.nn.logsumexp(own - offsets[:, None, None], axis=-1)

  def step(_, carried):
    _, samples = carried
    offsets, by_block = jax.lax.map(lambda block: one(samples, block), blocks)
    return offsets, jax.nn.logsumexp(by_block, axis=(0, 1))

  return jax.lax.fori_loop(0, num_steps, step, (jnp.zeros(shape), log_z))


def _one_of(blocks: PyTree) -> jax.Array:
  return jax.tree.leaves(blocks)[0]


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(subscripts, a, b.astype(a.dtype), precision=jax.lax.Precision.HIGHEST)
