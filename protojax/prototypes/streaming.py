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

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import layout
from jax.sharding import PartitionSpec

from protojax import errors, placement

PyTree = Any
Logits = Callable[[PyTree], jax.Array]  # a block, leaves [m, k, ...] -> float32 [m, n, R, k]

# Of products, as JAX names them; `method.precision` of a run.
PRECISIONS = ("highest", "high", "default")
DENSE = 2**27  # logits of a device, 512 MiB of float32, up to which all prototypes are one block
_AT_ONCE = 2**24  # logits of a block above that
_AT_ONCE_ON_CPU = 2**19  # what its caches hold: blocks four times as large took 1.6 times as long
LEFT_OUT = 1e30  # the log partition of a row that takes no part: finite, it gives nothing


@functools.cache
def _tell(said: str) -> None:
  """Warns once: a step asks several times, and is traced several times."""
  logging.warning("%s", said)


def block_size(asked: int | None, num_rows: int, num_prototypes: int) -> int:
  """How many prototypes are compared at a time.

  Args:
    asked: `method.block` of a run: None chooses by the memory of a device, 0 is all at once.
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
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_cpu = device.device_kind == "cpu" if device else jax.default_backend() == "cpu"
    most = max((_AT_ONCE_ON_CPU if on_cpu else _AT_ONCE) // rows, 1)
    most = min(most, held)
    found = next(size for size in range(most, 0, -1) if held % size == 0)
    if 16 * found < most:
      _tell(
        f"{held} prototypes of a device cut into equal blocks of {found} only, where {most} would "
        "fit, and each block costs its time: a number with more divisors is faster"
      )
    return found
  if asked < 0 or (asked and held % asked):
    less = next((size for size in range(min(asked, held), 1, -1) if held % size == 0), None)
    near = f", {less} say" if less else ""
    raise errors.UserError(
      f"block={asked} (method.block of a run) does not cut the {held} prototypes of a device into "
      f"equal blocks: choose a divisor{near}, 0 for all at once, or leave it out"
    )
  return asked


def cut(prototypes: PyTree, block: int) -> PyTree:
  """Leaves [K, ...] -> [nb, m, k, ...], k = `block`, a divisor of K / m; for m = 1 [nb, k, ...].

  With an axis of one device XLA would copy all prototypes before each loop over them.
  """
  m = placement.extent()[1]

  def one(x):
    if m == 1:
      return x.reshape(-1, block, *x.shape[1:])
    x = jnp.moveaxis(x.reshape(m, -1, block, *x.shape[1:]), 1, 0)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, "model"))

  return jax.tree.map(one, prototypes)


def as_outside(x: jax.Array) -> jax.Array:
  """An array in the layout that arguments have, inside a loop.

  A TPU's compiler would turn the state of a loop to what its products like, which costs a copy of
  all prototypes before the loop and one behind it. Not where prototypes are split: the constraint
  would bring them together.
  """
  if placement.extent()[1] > 1:
    return x
  return layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))


def joined(blocks: PyTree) -> PyTree:
  """Of what each block gave: leaves [nb, m, k, ...] -> [K, ...]."""
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:]), blocks)


def own_rows(rows: jax.Array) -> jax.Array:
  """Rows [B, ..., D] as they meet prototypes -> [m, n, R, D]: to each device its own."""
  n, m = placement.extent()
  if rows.shape[0] % n:
    rows = rows.reshape(1, 1, -1, rows.shape[-1])
    return jnp.broadcast_to(rows, (m, *rows.shape[1:]))
  own = placement.parts_beside_prototypes(rows, (n, m))
  return own.reshape(m, n, -1, rows.shape[-1])


def beside(x: jax.Array) -> jax.Array:
  """Numbers of rows, [n, ...] -> [m, n, ...]: to each device those of its own rows.

  Read in a loop, their gradient adds up over the devices behind it, not in every turn.
  """
  n, m = placement.extent()
  x = jnp.broadcast_to(x, (m, *x.shape))
  if n * m == 1 or x.shape[1] != n:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec("model", "data"))


def back(x: jax.Array, rows: int) -> jax.Array:
  """What all rows made of each prototype, [nb, m, ...] -> [nb, m, n, ...], to go with the blocks.

  A copy for each of the n devices that rows lie on (`rows`, the n of `own_rows`), for the reason of
  `beside`; without m where that is 1, as the blocks are.
  """
  n, m = placement.extent()
  x = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], rows, *x.shape[2:]))
  if n * m > 1 and rows == n:
    x = jax.lax.with_sharding_constraint(x, PartitionSpec(None, "model", "data"))
  return x[:, 0] if m == 1 else x


def log_partition(logits: Logits, blocks: PyTree) -> jax.Array:
  """ln of the sum of exp(logits) over all prototypes: float32 [n, R]."""
  by_block = each(lambda block: jax.nn.logsumexp(logits(block), axis=-1), blocks)
  return jax.nn.logsumexp(by_block, axis=(0, 1))


def best(logits: Logits, blocks: PyTree) -> jax.Array:
  """The prototype of the largest logit, of equal ones the first: int32 [n, R]."""

  def one(block):
    own = logits(block)
    return own.max(axis=-1), own.argmax(axis=-1).astype(jnp.int32)

  # A device's blocks lie one after the other: [nb, m, n, R] -> [m nb, n, R].
  largest, index = each(one, blocks)
  largest, index = (jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]) for x in (largest, index))
  where = largest.argmax(axis=0)
  within = jnp.take_along_axis(index, where[None], axis=0)[0]
  return (where * _block(blocks) + within).astype(jnp.int32)


def log_column_sums(logits: Logits, blocks: PyTree, log_z: jax.Array) -> jax.Array:
  """ln of what each prototype gets of all rows, sum over rows of exp(logits - log_z).

  Args:
    logits, blocks: see the module.
    log_z: [n, R]; that of a row to leave out is LEFT_OUT.

  Returns:
    float32 [K].
  """

  def one(block):
    return jax.nn.logsumexp(logits(block) - log_z[None, ..., None], axis=2)  # [m, n, k]

  return joined(jax.nn.logsumexp(each(one, blocks), axis=2))


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
  precision: str = "highest",
) -> Moments:
  """Means under the assignments exp(logits - log_z): attention without its weights.

  Args:
    logits, blocks: see the module.
    log_z: [n, R], what `log_partition` gives.
    values: leaves [nb, m, k, d], cut like the prototypes.
    counted: bool [n, R], rows that `Moments.counts` is of; None: all.
    precision: of the products with values, one of PRECISIONS.
  """

  where = None if counted is None else counted[None, ..., None]
  product = functools.partial(jnp.einsum, "mnrk,mkd->mnrd", precision=precision)

  def one(both):
    block, own = both
    log_q = logits(block) - log_z[None, ..., None]
    q = jnp.exp(log_q)
    means = jax.tree.map(lambda v: product(q, v.astype(q.dtype)), own)
    fixed_log_q, fixed_q = jax.lax.stop_gradient((log_q, q))
    entropy = -jnp.sum(fixed_q * fixed_log_q, axis=-1)
    return (means, entropy), jnp.sum(fixed_q, axis=2, where=where)

  (means, entropy), counts = _sum_over(one, (blocks, values))
  means, entropy = jax.tree.map(lambda x: x.sum(axis=0), (means, entropy))
  return Moments(means, entropy, joined(counts.sum(axis=2)))


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
  m = placement.extent()[1]
  num_prototypes = jax.tree.leaves(blocks)[0].shape[0] * m * _block(blocks)
  balanced = jnp.log(rows / num_prototypes)

  def left_out(samples):
    return samples if counted is None else jnp.where(counted, samples, LEFT_OUT)

  def offset(totals):  # none where nothing counts
    return jnp.where(totals > -LEFT_OUT / 2.0, totals, 0.0) - balanced

  def first(block):
    own = logits(block)
    totals = jax.nn.logsumexp(own - left_out(log_z)[None, ..., None], axis=(1, 2))
    offsets = offset(totals)
    return offsets, jax.nn.logsumexp(own - offsets[:, None, None], axis=-1)

  def step(_, carried):
    """Needs no maximum, see `assignment.log_sinkhorn`."""
    before, samples = carried

    def one(both):
      block, known = both
      own = logits(block) - known[:, None, None]
      totals = known + jnp.log(jnp.exp(own - left_out(samples)[None, ..., None]).sum(axis=(1, 2)))
      offsets = offset(totals)
      own += (known - offsets)[:, None, None] - samples[None, ..., None]
      return jnp.exp(own).sum(axis=-1), offsets

    before = before[:, 0] if m == 1 else before  # as the blocks are
    received, offsets = _sum_over(one, (blocks, before))
    return offsets, samples + jnp.log(received.sum(axis=0))

  offsets, by_block = each(first, blocks)
  start = offsets, jax.nn.logsumexp(by_block, axis=(0, 1))
  return jax.lax.fori_loop(1, num_steps, step, start)


def _block(blocks: PyTree) -> int:
  """k, the prototypes of a block on each device; blocks are from `cut`."""
  return jax.tree.leaves(blocks)[0].shape[1 if placement.extent()[1] == 1 else 2]


def _sum_over(one: Callable, blocks: PyTree) -> tuple[PyTree, PyTree]:
  """Of `one`, a function of a block, the first of two results added up, the second stacked.

  Nothing of a block is kept for the gradient, which calls `one` again.
  """
  alone = placement.extent()[1] == 1  # see `cut`

  @jax.checkpoint
  def lean(block):
    return one(jax.tree.map(lambda x: x[None], block) if alone else block)

  def add(total, block):
    new, out = lean(block)
    return jax.tree.map(jnp.add, total, new), out

  shapes, _ = jax.eval_shape(lean, jax.tree.map(lambda x: x[0], blocks))
  start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, start, blocks)


def each(one: Callable, blocks: PyTree) -> PyTree:
  """What `one`, a function of a block, gives of each, stacked; blocks are from `cut`."""
  return _sum_over(lambda block: (None, one(block)), blocks)[1]
