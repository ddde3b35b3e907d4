"""What methods with a teacher share: a student, its moving average and their prototypes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from protojax import losses, schedules
from protojax.methods import base
from protojax.models import encoder as encoders
from protojax.prototypes import prototype_set, weight_norm

PyTree = Any


class Scores(NamedTuple):
  """Scores of every view over the prototypes, float32.

  Attributes:
    student: [B, V, K], with a gradient; global views first.
    teacher: [B, 2, K] of the global views, or [B, T, K] of the views "target", without.
    stats: what `StudentTeacher.update` needs.
    features: [B, V, F] of the student's backbone, with a gradient.
    student_patches: [B, 2, T, K] of the patch tokens of the global views; None unless asked for.
    teacher_patches: likewise.
  """

  student: jax.Array
  teacher: jax.Array
  stats: dict[str, PyTree]
  features: jax.Array
  student_patches: jax.Array | None = None
  teacher_patches: jax.Array | None = None


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


def build(
  config, *, patches: bool = False, shared: bool = True, average: bool = True
) -> StudentTeacher:
  """Student and teacher over one prototype set, or two.

  The teacher averages the student's encoder, and its prototypes when those are learned, unless
  `average` is off. A mixture or frozen set is one array that serves both. The teacher runs without
  drop path, and its batch norm, where it has one, on batch statistics of its own.

  With `patches` the patch tokens of the global views are scored too, by the prototypes of the class
  tokens (`shared`) or by a set "patch" of their own, see `prototype_set.several`; an image is coded
  in that set by the mean of its patches' embeddings. The student's views may hold "mask" and
  "keep", see `encoder.embed`. The teacher sees all patches of the global views, or of the views "target"
  [B, T, S, S, 3] if there are any.

  `scores(trained, frozen, views, key) -> Scores`. With `method.em_order = "before_loss"` (the order
  of arXiv 2510.20108) the mixture moves there and the moved one is used; with "after_step" it moves
  in `update`, from the same teacher features.

  Raises:
    UserError: for an unknown `method.em_order` or `method.prototypes`.
  """
  kinds = ("prototypes", "patch") if patches else ("prototypes",)  # of tokens
  sets = kinds[:1] if shared else kinds
  bank = prototype_set.several(prototype_set.build(config), kinds, shared=shared)
  averaged = bank.learned and average  # the prototypes
  student_net = encoders.build(config, mask_token=patches)
  calm = config.copy_and_resolve_references()
  calm.model.drop_path = 0.0
  teacher_net = encoders.build(calm, mask_token=patches)
  # What the student adds: 1 - momentum, without the cancellation near 1.
  pace = schedules.cosine(1.0 - config.teacher.momentum, 0.0, config.num_steps)

  def embed(net, params, batch_stats, views, **options):
    """({kind of token: [B, V, ..., D]}, features [B, V, F], batch_stats)"""
    out, batch_stats = encoders.embed(net, params, batch_stats, views, patches=patches, **options)
    z = {"prototypes": out.z, "patch": out.patches}
    return {kind: z[kind] for kind in kinds}, out.features, batch_stats

  def score(state, z):
    return jax.tree.map(weight_norm.scores, bank.rows(state), bank.align(state, z))

  def init(key):
    encoder_key, prototype_key = jax.random.split(key)
    params, batch_stats = encoders.init(student_net, encoder_key, config.augment.global_size)
    state = bank.init(prototype_key)
    followed = {"encoder": params, "prototypes": state} if averaged else {"encoder": params}
    return base.Variables(
      encoder=params,
      prototypes=state,
      # Copies: a teacher that shares the student's buffers never lags behind it.
      teacher=jax.tree.map(jnp.copy, followed),
      carry={
        "batch_stats": {"student": batch_stats, "teacher": jax.tree.map(jnp.copy, batch_stats)}
      },
    )

  def scores(trained, frozen, views, key):
    views = dict(views)
    target = views.pop("target", views["global"])
    batch_stats = frozen.carry["batch_stats"]
    z_student, features, student_stats = embed(
      student_net,
      trained["encoder"],
      batch_stats["student"],
      views,
      train=True,
      key=key,
      accum_steps=config.accum_steps,
    )
    z_teacher, _, teacher_stats = embed(
      teacher_net,
      frozen.teacher["encoder"],
      batch_stats["teacher"],
      {"global": target},
      train=True,
      accum_steps=config.accum_steps,
    )
    z_teacher = jax.lax.stop_gradient(z_teacher)
    state, moved = prototype_set.in_loss(bank, trained, frozen, z_teacher)
    teacher_state = frozen.teacher["prototypes"] if averaged else jax.lax.stop_gradient(state)
    student, teacher = score(state, z_student), score(teacher_state, z_teacher)
    stats = {
      "batch_stats": {"student": student_stats, "teacher": teacher_stats},
      "prototypes": moved,
    }
    return Scores(
      student["prototypes"],
      teacher["prototypes"],
      stats,
      features,
      student.get("patch"),
      teacher.get("patch"),
    )

  def update(variables, stats, step):
    followed = {"encoder": variables.encoder}
    state = prototype_set.after_step(bank, variables.prototypes, stats["prototypes"])
    if averaged:
      followed["prototypes"] = state
    return base.Variables(
      encoder=variables.encoder,
      prototypes=state,
      teacher=optax.incremental_update(followed, variables.teacher, pace(step)),
      carry={**variables.carry, "batch_stats": stats["batch_stats"]},
    )

  def features(variables, images):
    batch_stats = variables.carry["batch_stats"]["teacher"]
    return encoders.features(teacher_net, variables.teacher["encoder"], batch_stats, images)

  def prototypes_of(variables):
    return variables.teacher["prototypes"] if averaged else variables.prototypes

  def embeddings(variables, images):
    batch_stats = variables.carry["batch_stats"]["teacher"]
    z, *_ = embed(
      teacher_net,
      variables.teacher["encoder"],
      batch_stats,
      {"global": images[:, None]},
      train=False,
    )
    z = bank.align(prototypes_of(variables), {kind: x[:, 0] for kind, x in z.items()})
    return {kind: z[kind].mean(axis=1) if kind == "patch" else z[kind] for kind in sets}

  def codes(variables, images):
    rows = bank.rows(prototypes_of(variables))
    z = embeddings(variables, images)
    return {kind: weight_norm.scores(rows[kind], z[kind]) for kind in sets}

  def prototype_matrices(variables):
    rows = bank.rows(prototypes_of(variables))
    return {kind: losses.l2_normalize(rows[kind]) for kind in sets}

  return StudentTeacher(
    bank.learned, init, scores, update, features, codes, embeddings, prototype_matrices
  )
