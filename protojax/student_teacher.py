"""What dino and carp share: a student, its moving-average teacher and one set of prototypes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from protojax import errors, prototypes, schedules
from protojax.methods import base
from protojax.models import encoder as encoders
from protojax.models import heads

PyTree = Any


class Scores(NamedTuple):
  """Scores of every view over the prototypes, float32.

  Attributes:
    student: [B, V, K], with a gradient; views 0 and 1 are the global ones.
    teacher: [B, 2, K], without.
    stats: what `StudentTeacher.update` needs.
    embeddings: [B, V, D], what the student's scores were made of, with a gradient; D is
      `head.bottleneck`.
  """

  student: jax.Array
  teacher: jax.Array
  stats: dict[str, PyTree]
  embeddings: jax.Array


class StudentTeacher(NamedTuple):
  """Pure functions; see `build`. Those named as in `base.Method` have its signatures."""

  learns_prototypes: bool
  init: Callable
  scores: Callable
  update: Callable
  features: Callable
  codes: Callable
  embeddings: Callable
  prototype_matrices: Callable


def build(config) -> StudentTeacher:
  """Student and teacher over one prototype set.

  The teacher averages the student's encoder, and its prototypes when those are learned. A mixture
  or frozen set is one array that serves both. The teacher runs without drop path, and its batch
  norm, where it has one, on batch statistics of its own.

  `scores(trained, frozen, views, key) -> Scores`. With `method.em_order = "before_loss"` (the order
  of arXiv 2510.20108) the mixture moves there and the moved one is used; with "after_step" it moves
  in `update`, from the same teacher features.

  Raises:
    UserError: for an unknown `method.em_order` or `method.prototypes`.
  """
  if config.method.em_order not in ("after_step", "before_loss"):
    raise errors.UserError(
      f"method.em_order={config.method.em_order!r} is unknown: choose after_step or before_loss"
    )
  before_loss = config.method.em_order == "before_loss"
  bank = prototypes.build(config)
  student_net = encoders.build(config)
  calm = config.copy_and_resolve_references()
  calm.model.drop_path = 0.0
  teacher_net = encoders.build(calm)
  momentum = schedules.cosine(config.teacher.momentum, 1.0, config.num_steps)

  def init(key):
    encoder_key, prototype_key = jax.random.split(key)
    params, batch_stats = encoders.init(student_net, encoder_key, config.augment.global_size)
    state = bank.init(prototype_key)
    averaged = {"encoder": params, "prototypes": state} if bank.learned else {"encoder": params}
    return base.Variables(
      encoder=params,
      prototypes=state,
      # Copies: a teacher that shares the student's buffers never lags behind it.
      teacher=jax.tree.map(jnp.copy, averaged),
      carry={
        "batch_stats": {"student": batch_stats, "teacher": jax.tree.map(jnp.copy, batch_stats)}
      },
    )

  def scores(trained, frozen, views, key):
    batch_stats = frozen.carry["batch_stats"]
    z_student, student_stats = encoders.embed(
      student_net, trained["encoder"], batch_stats["student"], views,
      train=True, key=key, accum_steps=config.accum_steps,
    )  # fmt: skip
    z_teacher, teacher_stats = encoders.embed(
      teacher_net, frozen.teacher["encoder"], batch_stats["teacher"],
      {"global": views["global"]}, train=True, accum_steps=config.accum_steps,
    )  # fmt: skip
    z_teacher = jax.lax.stop_gradient(z_teacher)
    stats = {"batch_stats": {"student": student_stats, "teacher": teacher_stats}}

    if bank.learned:
      state, teacher_state = trained["prototypes"], frozen.teacher["prototypes"]
    else:
      rows = z_teacher.reshape(-1, z_teacher.shape[-1])
      state = bank.move(frozen.prototypes, rows) if before_loss else frozen.prototypes
      stats |= {"prototypes": state} if before_loss else {"features": rows}
      state = teacher_state = jax.lax.stop_gradient(state)
    return Scores(
      student=heads.prototype_scores(bank.rows(state), bank.align(state, z_student)),
      teacher=heads.prototype_scores(
        bank.rows(teacher_state), bank.align(teacher_state, z_teacher)
      ),
      stats=stats,
      embeddings=z_student,
    )

  def update(variables, stats, step):
    averaged = {"encoder": variables.encoder}
    state = variables.prototypes
    if bank.learned:
      averaged["prototypes"] = state
    elif before_loss:
      state = stats["prototypes"]
    else:
      state = bank.move(state, stats["features"])
    return base.Variables(
      encoder=variables.encoder,
      prototypes=state,
      teacher=optax.incremental_update(averaged, variables.teacher, 1.0 - momentum(step)),
      carry={**variables.carry, "batch_stats": stats["batch_stats"]},
    )

  def features(variables, images):
    batch_stats = variables.carry["batch_stats"]["teacher"]
    return encoders.features(teacher_net, variables.teacher["encoder"], batch_stats, images)

  def prototypes_of(variables):
    return variables.teacher["prototypes"] if bank.learned else variables.prototypes

  def embeddings(variables, images):
    batch_stats = variables.carry["batch_stats"]["teacher"]
    z, _ = encoders.embed(
      teacher_net, variables.teacher["encoder"], batch_stats, {"global": images[:, None]},
      train=False,
    )  # fmt: skip
    return {"prototypes": bank.align(prototypes_of(variables), z[:, 0])}

  def codes(variables, images):
    z = embeddings(variables, images)["prototypes"]
    return {"prototypes": heads.prototype_scores(bank.rows(prototypes_of(variables)), z)}

  def prototype_matrices(variables):
    return {"prototypes": prototypes.unit(bank.rows(prototypes_of(variables)))}

  return StudentTeacher(
    bank.learned, init, scores, update, features, codes, embeddings, prototype_matrices
  )
