"""Schedules: step -> float32 scalar, usable inside jit. Steps beyond the last keep its value.

The forms and constants are those of the code of DINO (arXiv 2104.14294). A cosine from `start` to
`end` over N steps is written end + (start - end) sin^2(pi (N - i) / 2N), which is the usual
(1 + cos) / 2 without its cancellation near the end, where float32 would lose five digits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]


def constant(value: float) -> Schedule:
  """`value` at every step."""
  return lambda step: jnp.float32(value)


def _ramp(start: float, end: float, index: jax.Array, count: int) -> jax.Array:
  """Value `index` of `count` points from `start` to `end`, both included."""
  return start + (end - start) * (index.astype(jnp.float32) / max(count - 1, 1))


def _cosine(start: float, end: float, index: jax.Array, count: int) -> jax.Array:
  left = (count - jnp.clip(index, 0, count - 1)).astype(jnp.float32)
  return end + (start - end) * jnp.sin(0.5 * jnp.pi * left / count) ** 2


def cosine(start: float, end: float, num_steps: int) -> Schedule:
  """Half a cosine from `start` at step 0 towards `end`, which step `num_steps` would reach.

  Args:
    start: value at step 0.
    end: approached, never reached.
    num_steps: length of the run.
  """
  count = max(num_steps, 1)
  return lambda step: _cosine(start, end, jnp.asarray(step, jnp.int32), count)


def warmup_cosine(peak: float, final: float, *, warmup_steps: int, num_steps: int) -> Schedule:
  """Linear from 0 to `peak`, both included, then half a cosine from `peak` towards `final`.

  Step 0 has the value 0; the last step of the warm-up and the first of the cosine both have `peak`.

  Args:
    peak: highest value.
    final: approached, never reached.
    warmup_steps: points of the linear part; 0 leaves it out. With `num_steps` or more of them the
      run ends inside the warm-up.
    num_steps: length of the run, warm-up included.
  """
  count = max(num_steps - warmup_steps, 1)

  def schedule(step):
    step = jnp.asarray(step, jnp.int32)
    return jnp.where(
      step < warmup_steps,
      _ramp(0.0, peak, step, warmup_steps),
      _cosine(peak, final, step - warmup_steps, count),
    )

  return schedule


def per_epoch_linear(
  start: float, end: float, *, warmup_epochs: int, steps_per_epoch: int
) -> Schedule:
  """Linear from `start` to `end` by whole epochs, both included, then `end`.

  Args:
    start: value during epoch 0.
    end: value from epoch `warmup_epochs` - 1 on.
    warmup_epochs: 0 means `end` from the start.
    steps_per_epoch: steps for which a value is held.
  """

  def schedule(step):
    epoch = jnp.asarray(step, jnp.int32) // steps_per_epoch
    ramp = _ramp(start, end, jnp.minimum(epoch, warmup_epochs), warmup_epochs)
    return jnp.where(epoch < warmup_epochs, ramp, jnp.float32(end))

  return schedule
