"""DINO: self-distillation with centred, sharpened teacher scores (arXiv 2104.14294).

`method.prototypes` chooses between the joint baseline (learned), decoupled prototypes (mixture,
arXiv 2510.20108) and the control (frozen). `method.targets` is "center", as published, or
"sinkhorn" (three log-domain iterations over the global batch, arXiv 2304.07193).
"""

import math

import jax
import jax.numpy as jnp

from protojax import assignment, errors, losses, schedules, student_teacher
from protojax.methods import base

OPTIONS = {
  "targets": "center",  # or "sinkhorn"
  "sinkhorn_steps": 3,
  "center_momentum": 0.9,
  "student_temp": 0.1,
  "teacher_temp_start": 0.04,
  "teacher_temp": 0.07,
  "teacher_temp_warmup_epochs": 30,
}


def make(config) -> base.Method:
  """DINO from `config.method`: OPTIONS and `num_prototypes`.

  Raises:
    UserError: for unknown options.
  """
  options = config.method
  if options.targets not in ("center", "sinkhorn"):
    raise errors.UserError(
      f"method.targets={options.targets!r} is unknown: choose center or sinkhorn"
    )
  pair = student_teacher.build(config)
  teacher_temp = schedules.per_epoch_linear(
    options.teacher_temp_start,
    options.teacher_temp,
    warmup_epochs=options.teacher_temp_warmup_epochs,
    steps_per_epoch=config.steps_per_epoch,
  )

  def init(key):
    variables = pair.init(key)
    center = jnp.zeros(options.num_prototypes, jnp.float32)
    return variables.replace(carry={**variables.carry, "center": center})

  def targets(teacher_scores, center, step):
    if options.targets == "center":
      return assignment.sharpen(teacher_scores, center, temperature=teacher_temp(step))
    flat = teacher_scores.reshape(-1, teacher_scores.shape[-1])
    q = assignment.sinkhorn(
      flat, temperature=teacher_temp(step), num_steps=options.sinkhorn_steps
    )
    return q.reshape(teacher_scores.shape)

  def loss(trained, frozen, views, key, step):
    scores = pair.scores(trained, frozen, views, key)
    # The centre of step n is made of the steps before it.
    q = jax.lax.stop_gradient(targets(scores.teacher, frozen.carry["center"], step))
    value = losses.cross_view_entropy(scores.student, q, temperature=options.student_temp)
    entropy = losses.entropy(q).mean()
    metrics = {
      "loss": value,
      "ln_k": jnp.float32(math.log(options.num_prototypes)),  # of a student that says nothing
      "target_entropy": entropy,
      "kl": value - entropy,
      "mean_entropy": losses.entropy(q.mean(axis=(0, 1))),
      "teacher_temp": teacher_temp(step),
    }
    return value, base.LossOut(metrics, {**scores.stats, "teacher_scores": scores.teacher})

  def update(variables, stats, step):
    stats = dict(stats)
    center = assignment.center_update(
      variables.carry["center"], stats.pop("teacher_scores"), momentum=options.center_momentum
    )
    variables = pair.update(variables, stats, step)
    return variables.replace(carry={**variables.carry, "center": center})

  return base.Method(
    learns_prototypes=pair.learns_prototypes,
    init=init,
    loss=loss,
    update=update,
    features=pair.features,
    codes=pair.codes,
    embeddings=pair.embeddings,
    prototype_matrices=pair.prototype_matrices,
  )
