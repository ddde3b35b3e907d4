"""iBOT: DINO plus distillation of masked patches (arXiv 2111.07832).

The student's global views are masked, and the same forward feeds two losses: DINO's over class
tokens, and the cross entropy of every hidden patch against the teacher's token at its place, which
sees the whole view. Local views are not masked and enter the first alone. Both kinds of token pass
one projector; each has a centre and, unless `method.shared_head`, K prototypes of its own.
`method.prototypes` holds for both sets. Only hidden patches are scored; the patches' centre and
mixture are fed by all of the teacher's.

What differs from the published code: there the student has two sets by default and the teacher one,
the average of the student's class set ("semi-shared"), a mode left out here; the released models
share one on both sides, `shared_head=True`. Class targets warm up to .07, as in the paper's runs;
the code's default is `teacher_temp=.04`. `targets="sinkhorn"` is not in it: as in DINOv2
(arXiv 2304.07193) the hidden patches of the batch are balanced, and no others.

Each loss is at least its targets' entropy, logged beside it; that of patches, like their loss, is a
mean over hidden ones in which a view without a mask counts as 0. `patch_mean_entropy`, of the mean
target, is over all hidden ones alike.
"""

import math

import jax
import jax.numpy as jnp

from protojax import errors, losses, schedules, sizes
from protojax.data import masking
from protojax.methods import base
from protojax.methods.networks import student_teacher
from protojax.models import vit
from protojax.prototypes import assignment, soft

OPTIONS = {
  "targets": "center",  # center or sinkhorn
  "sinkhorn_steps": 3,
  "center_momentum": 0.9,
  "student_temp": 0.1,
  "teacher_temp_start": 0.04,  # class tokens
  "teacher_temp": 0.07,
  "patch_temp_start": 0.04,  # patch tokens
  "patch_temp": 0.07,
  "teacher_temp_warmup_epochs": 30,  # of both
  "class_weight": 1.0,
  "patch_weight": 1.0,
  "shared_head": False,  # one set of prototypes for class and patch tokens
  "mask_shape": "block",  # or "rand"
  # Every global view draws one ratio, all alike, and hides a share of its patches within spread.
  "mask_ratios": (0.0, 0.3),
  "mask_spreads": (0.0, 0.2),
}


def make(config) -> base.Method:
  """iBOT from `config.method`: OPTIONS and `num_prototypes`.

  Raises:
    UserError: for unknown options, an encoder without patch tokens or one with batch norm.
  """
  options, size = config.method, config.augment.global_size
  errors.require_positive(
    options,
    "student_temp",
    "teacher_temp_start",
    "teacher_temp",
    "patch_temp_start",
    "patch_temp",
    "sinkhorn_steps",
  )
  grid = vit.grid_size(*sizes.pair(size), config.model.patch_size)
  mask_of = masking.make(options.mask_ratios, options.mask_spreads, options.mask_shape, grid)
  most = masking.most_hidden(options.mask_ratios, options.mask_spreads, math.prod(grid))
  networks = student_teacher.build_with_prototypes(config, patches=True, shared=options.shared_head)

  def warmup(start, end):
    return schedules.per_epoch_linear(
      start,
      end,
      warmup_epochs=options.teacher_temp_warmup_epochs,
      steps_per_epoch=config.steps_per_epoch,
    )

  temps = {
    "prototypes": warmup(options.teacher_temp_start, options.teacher_temp),
    "patch": warmup(options.patch_temp_start, options.patch_temp),
  }

  def init(key):
    variables = networks.method.init(key)
    center = {kind: jnp.zeros(options.num_prototypes, jnp.float32) for kind in temps}
    return variables.replace(carry={**variables.carry, "center": center})

  def loss(trained, frozen, views, key, step):
    net_key, mask_key = jax.random.split(key)
    mask = mask_of(mask_key, *views["global"].shape[:2])
    hidden, counted = masking.hidden(mask, most)
    scores = networks.scores(trained, frozen, {**views, "mask": mask, "hidden": hidden}, net_key)
    of_teacher = {"prototypes": (scores.teacher, None), "patch": (scores.teacher_patches, counted)}
    # The centre of step n is made of the steps before it.
    q = {
      kind: soft.targets(
        teacher.over(temps[kind](step)),
        frozen.carry["center"][kind],
        kind=options.targets,
        num_steps=options.sinkhorn_steps,
        counted=rows,
      )
      for kind, (teacher, rows) in of_teacher.items()
    }
    of_student = {"prototypes": scores.student, "patch": scores.student_patches}
    p = {kind: soft.softmax(own.over(options.student_temp)) for kind, own in of_student.items()}
    classes = soft.compare_views(p["prototypes"], q["prototypes"])
    patches = soft.compare_rows(p["patch"], q["patch"], counted)
    by_class = losses.mean_over_other_views(classes.cross_entropy)
    by_patch = losses.masked_mean(patches.cross_entropy, counted)
    value = options.class_weight * by_class + options.patch_weight * by_patch
    metrics = {
      "loss": value,
      "cross_entropy": by_class,
      "ln_k": jnp.float32(math.log(options.num_prototypes)),  # of class tokens that say nothing
      "patch_loss": by_patch,
      "masked": mask.mean(dtype=jnp.float32),
      "target_entropy": classes.entropy.mean(),
      "patch_target_entropy": losses.masked_mean(patches.entropy, counted),
      "mean_entropy": losses.entropy(classes.mean),
      "patch_mean_entropy": losses.entropy(patches.mean),
      "teacher_temp": temps["prototypes"](step),
      "patch_temp": temps["patch"](step),
    }
    to_center = {"prototypes": scores.teacher.mean(), "patch": scores.teacher_patch_mean}
    return value, base.LossOut(metrics, {**scores.stats, "to_center": to_center})

  def update(variables, stats, step):
    center = {
      kind: assignment.center_update(old, stats["to_center"][kind], options.center_momentum)
      for kind, old in variables.carry["center"].items()
    }
    variables = networks.method.update(variables, stats, step)
    return variables.replace(carry={**variables.carry, "center": center})

  return networks.method._replace(init=init, loss=loss, update=update)
