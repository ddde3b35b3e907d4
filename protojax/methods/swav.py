"""SwAV: predict the balanced assignment of one view from another (arXiv 2006.09882).

Targets are Sinkhorn assignments of the two global views, each view balanced by itself over the
global batch and, if there is one, a queue of earlier features; every view predicts the targets of
the others. There is no teacher. `method.prototypes` chooses between learned ones, as published
(`optim.freeze_prototypes_*` keeps them from moving at the start), a mixture fed by the student's
features and frozen ones.

What differs from the published code: Sinkhorn runs in the log domain; learned prototypes are
weight-normalised, where that code projects them on the sphere before each step; the queue fills
from step 0, where that code makes it at `queue_start_epoch` and waits until it is full.

The loss is at least the entropy of the targets, logged as `target_entropy`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from protojax import errors, losses
from protojax.methods import base
from protojax.methods.networks import student
from protojax.prototypes import soft

OPTIONS = {
  "temperature": 0.1,  # of the predictions
  "epsilon": 0.05,  # Sinkhorn's temperature; smaller is sharper
  "sinkhorn_steps": 3,
  "queue_length": 0,  # features a view, cut to a multiple of batch_size; 0 turns the queue off
  "queue_start_epoch": 15.0,  # Sinkhorn sees the queue from here on, once it is full
}


def targets(scores: soft.Scores, *, epsilon: float, num_steps: int = 3) -> list[soft.Assignments]:
  """Assignments of a batch, each view balanced over the batch and what is queued.

  Args:
    scores: of rows [B, 1 + S, T, D]. [:, 0] is the batch, the rest are S earlier ones.
    epsilon: Sinkhorn's temperature.
    num_steps: of Sinkhorn.

  Returns:
    Of each of T views the assignments of its rows [B, 1, D]; no gradient.
  """
  views = jnp.moveaxis(scores.rows, 2, 0)
  each = (dataclasses.replace(scores, rows=rows).over(epsilon) for rows in views)
  return [soft.first(soft.balanced(view, num_steps=num_steps)) for view in each]


def make(config) -> base.Method:
  """SwAV from `config.method`: OPTIONS, `num_prototypes`, `prototypes`.

  Raises:
    UserError: for options out of range.
  """
  options = config.method
  errors.require_positive(options, "epsilon", "temperature", "sinkhorn_steps")
  if options.queue_length < 0 or 0 < options.queue_length < config.batch_size:
    raise errors.UserError(
      f"method.queue_length={options.queue_length} does not hold a batch of {config.batch_size}: "
      "set it to 0 or to batch_size and more"
    )
  slots = options.queue_length // config.batch_size
  queue_start = max(slots, round(options.queue_start_epoch * config.steps_per_epoch))
  net = student.build_with_prototypes(config)
  num_rows = config.batch_size * max(2 + config.augment.num_local, 2 * (1 + slots))
  balanced = functools.partial(targets, epsilon=options.epsilon, num_steps=options.sinkhorn_steps)

  def init(key):
    variables = net.method.init(key)
    if not slots:
      return variables
    # A ring of batches, to Sinkhorn the same as a queue: it does not see the order of its rows.
    queue = jnp.zeros((config.batch_size, slots, 2, config.head.bottleneck), jnp.float32)
    return variables.replace(carry={**variables.carry, "queue": queue})

  def loss(trained, frozen, views, key, step):
    z, state, stats = net.embed(trained, frozen, views, key)
    scores = functools.partial(net.scores, num_rows=num_rows)
    p = soft.softmax(scores(state, z).over(options.temperature))
    own, detached = jax.lax.stop_gradient((z[:, None, :2], state))
    if slots:
      queue = jax.lax.stop_gradient(frozen.carry["queue"])
      q = jax.lax.cond(
        step >= queue_start,
        lambda: balanced(scores(detached, jnp.concatenate([own, queue], axis=1))),
        lambda: balanced(scores(detached, own)),
      )
      stats |= {"queued": own}
    else:
      q = balanced(scores(detached, own))
    views = [soft.compare_views(p, view) for view in q]
    by_pair = jnp.concatenate([view.cross_entropy for view in views], axis=1)
    value = losses.mean_over_other_views(by_pair)
    entropy = sum(view.entropy.mean() for view in views) / len(views)
    metrics = {
      "loss": value,
      "ln_k": jnp.float32(math.log(options.num_prototypes)),  # of a student that says nothing
      "target_entropy": entropy,
      "kl": value - entropy,
      "mean_entropy": losses.entropy(sum(view.mean for view in views) / len(views)),
    }
    return value, base.LossOut(metrics, stats)

  def update(variables, stats, step):
    variables = net.method.update(variables, stats, step)
    if not slots:
      return variables
    queue = jax.lax.dynamic_update_slice_in_dim(
      variables.carry["queue"], stats["queued"], step % slots, axis=1
    )
    return variables.replace(carry={**variables.carry, "queue": queue})

  return net.method._replace(init=init, loss=loss, update=update)
