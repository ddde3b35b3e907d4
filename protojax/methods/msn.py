"""MSN: views without some of their patches predict the whole image (arXiv 2204.07141).

The student sees one global view of which a share of the patches is left out, and the local views;
the teacher sees the other global view whole. Its assignment over the prototypes is sharpened, and
by default balanced over the batch, and every view of the student predicts it; the mean assignment
of the student is pulled to the uniform one. Both sides are scored by the student's prototypes,
which no average follows. `method.prototypes` chooses between learned ones, a mixture (arXiv
2510.20108) and frozen ones.

What differs from the published code: batch norm in the head is over one view at a time, there over
the local ones together; the patch embedding starts as in DINO, there by Kaiming's rule. Switches,
set as published in configs/msn_vit_s.py: prototypes that neither decay (`optim.decay_prototypes`)
nor are clipped with the encoder (`optim.clip_mode`), schedules of a run a quarter longer
(`optim.schedule_scale`), a teacher's momentum that rises linearly (`teacher.schedule`), position
embeddings interpolated without DINO's offset (`model.position_offset`). Left out: other priors than
the uniform one (PMSN).

The cross entropy is at least the entropy of the targets, the prior's term at least 0.
"""

import math

import jax
import jax.numpy as jnp

from protojax import errors, losses, sizes
from protojax.data import masking
from protojax.methods import base
from protojax.methods.networks import student_teacher
from protojax.models import vit
from protojax.prototypes import soft

OPTIONS = {
  "temperature": 0.1,  # of the student
  "sharpening": 0.25,  # the teacher's temperature over the student's
  "targets": "sinkhorn",  # or "sharpened"
  "sinkhorn_steps": 3,
  "prior_weight": 1.0,
  "drop_patches": 0.15,  # share of the student's global view that is left out
}


def targets(scores: soft.Scores, options) -> soft.Assignments:
  """Assignments of the teacher, of rows [B, 1, D], without a gradient."""
  scores = jax.lax.stop_gradient(scores).over(options.temperature * options.sharpening)
  if options.targets == "sinkhorn":
    return soft.balanced(scores, num_steps=options.sinkhorn_steps, normalized=True)
  return soft.softmax(scores)


def terms(
  scores: soft.Scores, q: soft.Assignments, temperature: float
) -> tuple[soft.Comparison, jax.Array]:
  """Views beside their targets, and ln K minus the entropy of the mean prediction.

  Args:
    scores: of the student, rows [B, V, D].
    q: targets, of rows [B, 1, D].
    temperature: the student's.

  Returns:
    The comparison, its cross entropy [V, 1]; and float32 [], at least 0.
  """
  p = soft.softmax(scores.over(temperature))
  num = len(scores.prototypes)
  return soft.compare_views(p, q), math.log(num) - losses.entropy(soft.mean(p))


def make(config) -> base.Method:
  """MSN from `config.method`: OPTIONS, `num_prototypes`, `prototypes`.

  Raises:
    UserError: for unknown options, or an encoder that has no patches to leave out.
  """
  options, size = config.method, config.augment.global_size
  errors.require_positive(options, "temperature", "sharpening", "sinkhorn_steps")
  errors.require(config, {"head.l2": True}, "msn compares directions")
  if options.targets not in ("sinkhorn", "sharpened"):
    raise errors.UserError(
      f"method.targets={options.targets!r} is unknown: choose sinkhorn or sharpened"
    )
  if config.model.name not in vit.VARIANTS or not 0.0 <= options.drop_patches < 1.0:
    raise errors.UserError(
      f"method.drop_patches={options.drop_patches} of model.name={config.model.name!r}: choose a "
      f"share in [0, 1) and a transformer, {', '.join(vit.VARIANTS)}"
    )
  num_patches = math.prod(vit.grid_size(*sizes.pair(size), config.model.patch_size))
  networks = student_teacher.build_with_prototypes(config, average=False)

  def loss(trained, frozen, views, key, step):
    del step
    net_key, keep_key = jax.random.split(key)
    student_views = {**views, "global": views["global"][:, :1], "target": views["global"][:, 1:]}
    student_views["keep"] = masking.keep(
      keep_key, config.batch_size, 1, dropped=options.drop_patches, num_patches=num_patches
    )
    scores = networks.scores(trained, frozen, student_views, net_key)
    q = targets(scores.teacher, options)
    beside, prior = terms(scores.student, q, options.temperature)
    cross_entropy = beside.cross_entropy.mean()
    value = cross_entropy + options.prior_weight * prior
    metrics = {
      "loss": value,
      "cross_entropy": cross_entropy,
      "prior": prior,
      "target_entropy": beside.entropy.mean(),
      "mean_entropy": losses.entropy(beside.mean),
      "ln_k": jnp.float32(math.log(options.num_prototypes)),  # of a student that says nothing
    }
    return value, base.LossOut(metrics, scores.stats)

  return networks.method._replace(loss=loss)
