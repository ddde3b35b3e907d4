"""Values that change over a run, such as the learning rate: functions of the step.

Each returns a float32 scalar and may be called inside jit; steps beyond the last keep its value.
The forms and constants are those of the code of DINO (arXiv 2104.14294).

A cosine from `start` to `end` over N steps is end + (start - end) sin^2(pi (N - i) / 2N), which
equals the usual (1 + cos) / 2 but does not cancel near the end. `optax.cosine_decay_schedule` has
the usual form: over 250,200 steps in float32 it is off by up to 1.5e-5 (relative) from 1e-3 to
1e-6, and exactly 0 in the last 20 steps of a decay to 0; the one here by 5e-7.
`optax.linear_schedule` is off by 6e-4 at step 1 of 25,020, the ramp here by 4e-7.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array | int], jax.Array]


def stretched(num_steps: int, scale: float) -> int:
  """Length of schedules that a run of `num_steps` leaves early, at 1 / scale of their way."""
  return int(num_steps * scale)


def constant(value: float) -> Schedule:
  """The same `value` at every step."""
  return lambda step: jnp.float32(value)


def _ramp(start: float, end: float, index: jax.Array, count: int) -> jax.Array:
  """Value `index` of `count` points from `start` to `end`, both included."""
  return start + (end - start) * (index.astype(jnp.float32) / max(count - 1, 1))


def cosine(start: float, end: float, num_steps: int) -> Schedule:
  """Half a cosine from `start` at step 0 towards `end`, which step `num_steps` would reach.

  Args:
    start: value at step 0.
    end: approached, never reached.
    num_steps: length of the run.
  """
  count = max(num_steps, 1)

  def schedule(step):
    index = jnp.clip(jnp.asarray(step, jnp.int32), 0, count - 1)
    left = (count - index).astype(jnp.float32)
    return end + (start - end) * jnp.sin(0.5 * jnp.pi * left / count) ** 2

  return schedule


def linear(start: float, end: float, num_steps: int) -> Schedule:
  """Linear from `start` at step 0 towards `end`, which step `num_steps` would reach."""
  count = max(num_steps, 1)

  def schedule(step):
    index = jnp.clip(jnp.asarray(step, jnp.int32), 0, count - 1)
    return _ramp(start, end, index, count + 1)

  return schedule


def warmup_cosine(
  peak: float, final: float, *, warmup_steps: int, num_steps: int, start: float = 0.0
) -> Schedule:
  """Linear from `start` to `peak`, both included, then half a cosine from `peak` towards `final`.

  Step 0 has the value `start`; the last step of the warm-up and the first of the cosine both have
  `peak`.

  >>> rate = warmup_cosine(1.0, 0.0, warmup_steps=3, num_steps=7)
  >>> [round(float(rate(step)), 2) for step in range(7)]
  [0.0, 0.5, 1.0, 1.0, 0.85, 0.5, 0.15]

  Args:
    peak: highest value.
    final: approached, never reached.
    warmup_steps: points of the linear part; 0 leaves it out. With `num_steps` or more of them the
      run ends inside the warm-up.
    num_steps: length of the run, warm-up included.
    start: value at step 0, where there is a warm-up.
  """

  def warmup(step):
    return _ramp(start, peak, jnp.asarray(step, jnp.int32), warmup_steps)

  decay = cosine(peak, final, num_steps - warmup_steps)
  return optax.join_schedules([warmup, decay], [warmup_steps])


def per_epoch_linear(
  start: float, end: float, *, warmup_epochs: int, steps_per_epoch: int
) -> Schedule:
  """Linear from `start` to `end`, both included, constant within an epoch; then `end`.

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
