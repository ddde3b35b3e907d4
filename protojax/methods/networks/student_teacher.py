"""What methods with a teacher share: a student, its moving average and their prototypes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from protojax import errors, losses, placement, schedules
from protojax.methods import base
from protojax.models import encoder as encoders
from protojax.prototypes import prototype_set, soft, weight_norm
from protojax.prototypes import scoring as scorings

PyTree = Any


class StudentTeacher(NamedTuple):
  """Two encoders, the teacher's a moving average of the student's; see `build`.

  Attributes:
    method: all but `loss`; without prototypes. Its `update` takes the batch statistics of `embed`
      as stats.
    embed: (trained, frozen, views, key) -> (`encoder.Embedded` of the student's views, that of the
      teacher's, batch statistics), training mode. A gradient goes where `trained` and `frozen` let
      it: to the student's parameters.
    project: (variables, images [B, S, S, 3]) -> `encoder.Embedded` of the teacher, evaluation mode,
      placed as prototypes meet it.
  """

  method: base.Method
  embed: Callable
  project: Callable


def build(config, *, patches: bool = False, constant_momentum: bool = False) -> StudentTeacher:
  """A student and its teacher, without prototypes.

  The teacher averages what `Variables.teacher` holds, {name of a field of `Variables`: average}:
  here the encoder, to which `build_with_prototypes` may add prototypes. It runs without drop path,
  and its batch norm, where it has one, on batch statistics of its own. It sees all patches of the
  global views, or of the views "target" [B, T, S, S, 3] if there are any; the other views, and
  "mask", "keep" and "hidden" (see `encoder.embed`), are the student's.

  Args:
    config: reads `model`, `head`, `teacher.{momentum, schedule}`, `optim.schedule_scale` and more.
    patches: embed the patch tokens of the global views too.
    constant_momentum: `teacher.momentum` stays as it is; by default it rises to 1 by a cosine, or
      linearly.

  Raises:
    UserError: for an unknown `teacher.schedule`.
  """
  student_net = encoders.build(config, mask_token=patches)
  teacher_net = encoders.build(encoders.without_drop_path(config), mask_token=patches)
  # What the student adds: 1 - momentum, without the cancellation near 1.
  share = 1.0 - config.teacher.momentum
  shapes = {"cosine": schedules.cosine, "linear": schedules.linear}
  if config.teacher.schedule not in shapes:
    raise errors.UserError(
      f"teacher.schedule={config.teacher.schedule!r} is unknown: choose {' or '.join(shapes)}"
    )
  length = schedules.stretched(config.num_steps, config.optim.schedule_scale)
  pace = shapes[config.teacher.schedule](share, 0.0, length)

  def init(key):
    size, channels = config.augment.global_size, config.data.channels
    params, batch_stats = encoders.init(student_net, key, size, channels)
    return base.Variables(
      encoder=params,
      prototypes=(),
      # Copies: a teacher that shares the student's buffers never lags behind it.
      teacher={"encoder": jax.tree.map(jnp.copy, params)},
      carry={
        "batch_stats": {"student": batch_stats, "teacher": jax.tree.map(jnp.copy, batch_stats)}
      },
    )

  def embed(trained, frozen, views, key):
    views = dict(views)
    target = views.pop("target", views["global"])
    batch_stats = frozen.carry["batch_stats"]
    student, student_stats = encoders.embed(
      student_net,
      trained["encoder"],
      batch_stats["student"],
      views,
      train=True,
      key=key,
      accum_steps=config.accum_steps,
      patches=patches,
    )
    teacher, teacher_stats = encoders.embed(
      teacher_net,
      frozen.teacher["encoder"],
      batch_stats["teacher"],
      {"global": target},
      train=True,
      accum_steps=config.accum_steps,
      patches=patches,
    )
    batch_stats = {"student": student_stats, "teacher": teacher_stats}
    return student, teacher, batch_stats

  def update(variables, batch_stats, step):
    averaged = {name: getattr(variables, name) for name in variables.teacher}
    pace_now = share if constant_momentum else pace(step)
    return variables.replace(
      teacher=optax.incremental_update(averaged, variables.teacher, pace_now),
      carry={**variables.carry, "batch_stats": batch_stats},
    )

  def features(variables, images):
    batch_stats = variables.carry["batch_stats"]["teacher"]
    return encoders.features(teacher_net, variables.teacher["encoder"], batch_stats, images)

  def project(variables, images):
    views, batch_stats = {"global": images[:, None]}, variables.carry["batch_stats"]["teacher"]
    params = variables.teacher["encoder"]
    out, _ = encoders.embed(teacher_net, params, batch_stats, views, train=False, patches=patches)
    return placement.beside_prototypes(out)

  def no_sets(*_):
    return {}

  method = base.Method(
    learns_prototypes=False,
    init=init,
    loss=base.no_loss,
    update=update,
    features=features,
    codes=no_sets,
    embeddings=no_sets,
    prototype_matrices=no_sets,
  )
  return StudentTeacher(method, embed, project)


class Scores(NamedTuple):
  """Scores of every view over the prototypes.

  Attributes:
    student: of rows [B, V, D], with a gradient; global views first.
    teacher: of rows [B, 2, D] of the global views, or [B, T, D] of the views "target", without.
    stats: what `Method.update` needs.
    features: [B, V, F] of the student's backbone, with a gradient.
    student_patches: of rows [B, 2, M, D], the hidden patches of the global views; None unless asked
      for.
    teacher_patches: likewise, of the same patches.
    teacher_patch_mean: float32 [K], the mean over all patches of the global views; None likewise.
  """

  student: soft.Scores
  teacher: soft.Scores
  stats: dict[str, PyTree]
  features: jax.Array
  student_patches: soft.Scores | None = None
  teacher_patches: soft.Scores | None = None
  teacher_patch_mean: jax.Array | None = None


class PrototypeStudentTeacher(NamedTuple):
  """Student, teacher and their prototypes; see `build_with_prototypes`.

  Attributes:
    method: all but `loss`. Its `update` takes `Scores.stats`.
    scores: (trained, frozen, views, key) -> Scores.
  """

  method: base.Method
  scores: Callable


def build_with_prototypes(
  config, *, patches: bool = False, shared: bool = True, average: bool = True
) -> PrototypeStudentTeacher:
  """The student and teacher of `build` over one prototype set, or two.

  The teacher averages the student's encoder, and its prototypes when those are learned, unless
  `average` is off. A mixture or frozen set is one array that serves both.

  With `patches` the patch tokens that the views "hidden" number, int32 [B, 2, M], are scored too,
  by the prototypes of the class tokens (`shared`) or by a set "patch" of their own, see
  `prototype_set.several`; an image is coded in that set by the mean of its patches' embeddings.

  With `method.em_order = "before_loss"` (the order of arXiv 2510.20108) a mixture moves in
  `scores`, which then uses the moved one; with "after_step" it moves in `update`, from the same
  teacher features.

  Raises:
    UserError: for an unknown `method.em_order` or `method.prototypes`.
  """
  kinds = ("prototypes", "patch") if patches else ("prototypes",)  # of tokens
  sets = kinds[:1] if shared else kinds
  prototypes = prototype_set.several(prototype_set.build(config), kinds, shared=shared)
  averaged = prototypes.learned and average  # the prototypes
  net = build(config, patches=patches)

  precision = config.method.precision

  def by_kind(embedded):
    """{kind of token: [B, V, ..., D]}, where the prototypes are"""
    z = {"prototypes": embedded.z, "patch": embedded.patches}
    return placement.beside_prototypes({kind: z[kind] for kind in kinds})

  def init(key):
    encoder_key, prototype_key = jax.random.split(key)
    variables = net.method.init(encoder_key)
    state, teacher = prototypes.init(prototype_key), variables.teacher
    if averaged:
      teacher = {**teacher, "prototypes": jax.tree.map(jnp.copy, state)}
    return variables.replace(prototypes=state, teacher=teacher)

  def scores(trained, frozen, views, key):
    embedded, embedded_teacher, batch_stats = net.embed(trained, frozen, views, key)
    z_student, z_teacher = by_kind(embedded), jax.lax.stop_gradient(by_kind(embedded_teacher))
    state, moved = prototype_set.in_loss(prototypes, trained, frozen, z_teacher)
    teacher_state = frozen.teacher["prototypes"] if averaged else jax.lax.stop_gradient(state)
    student_rows, z_student = prototypes.rows(state), prototypes.align(state, z_student)
    rows, z_teacher = prototypes.rows(teacher_state), prototypes.align(teacher_state, z_teacher)
    patch_mean = None
    if patches:
      z = z_teacher["patch"]
      patch_mean = soft.Scores(z, rows["patch"], precision=precision).mean()
      z_teacher["patch"] = jnp.take_along_axis(z, views["hidden"][..., None], axis=2)

    def of(kind, z, rows):
      compared = z_student[kind].size // z_student[kind].shape[-1]  # no side has more
      block = prototype_set.block_size(config, compared)
      return soft.Scores(z[kind], rows[kind], block=block, precision=precision)

    student = {kind: of(kind, z_student, student_rows) for kind in kinds}
    teacher = {kind: of(kind, z_teacher, rows) for kind in kinds}
    return Scores(
      student["prototypes"],
      teacher["prototypes"],
      {"batch_stats": batch_stats, "prototypes": moved},
      embedded.features,
      student.get("patch"),
      teacher.get("patch"),
      patch_mean,
    )

  def update(variables, stats, step):
    state = prototype_set.after_step(prototypes, variables.prototypes, stats["prototypes"], step)
    return net.method.update(variables.replace(prototypes=state), stats["batch_stats"], step)

  def state_of(variables):
    return variables.teacher["prototypes"] if averaged else variables.prototypes

  def embeddings(variables, images):
    z = {kind: x[:, 0] for kind, x in by_kind(net.project(variables, images)).items()}
    z = prototypes.align(state_of(variables), z)
    return {kind: z[kind].mean(axis=1) if kind == "patch" else z[kind] for kind in sets}

  def codes(variables, images):
    rows = prototypes.rows(state_of(variables))
    z = embeddings(variables, images)
    return {kind: weight_norm.scores(rows[kind], z[kind]) for kind in sets}

  def prototype_matrices(variables):
    rows = prototypes.rows(state_of(variables))
    return {kind: losses.l2_normalize(rows[kind]) for kind in sets}

  def scoring(variables):
    rows, mean = (f(state_of(variables)) for f in (prototypes.rows, prototypes.mean))
    tokens = {"prototypes": "class", "patch": "patch"}
    return {k: scorings.Scoring(rows[k], mean[k], tokens=tokens[k]) for k in sets}

  method = net.method._replace(
    learns_prototypes=prototypes.learned,
    init=init,
    update=update,
    codes=codes,
    embeddings=embeddings,
    prototype_matrices=prototype_matrices,
    scoring=scoring,
  )
  return PrototypeStudentTeacher(method, scores)
