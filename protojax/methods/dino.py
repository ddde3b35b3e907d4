"""DINO: self-distillation with centred, sharpened teacher scores (arXiv 2104.14294).

`method.prototypes` chooses between the joint baseline (learned), decoupled prototypes (mixture,
arXiv 2510.20108) and the control (frozen). `method.targets` is "center", as published, or
"sinkhorn" (three log-domain iterations over the global batch, arXiv 2304.07193).

Options: `koleo` spreads the features of the student's backbone, each global view for itself (as
arXiv 2304.07193, there within a device, here over the global batch). `koleo_proto` spreads learned
prototypes (arXiv 2410.14060, whose weight we do not know). `vmf` reads prototypes of any norm as a
mixture of von Mises-Fisher distributions (arXiv 2405.10939; how its centre moves is our reading).

What differs from the published code: the teacher's temperature warms up from .04 to .07, as in the
paper's runs (the code's default: `teacher_temp=.04`); blur is a true Gaussian, Pillow's nearly one.
`train_prototype_norm` is its `norm_last_layer=False`; DINOv2 has `augment.blur_prob=(0, .9, .5)`.

The cross entropy is at least the entropy of the targets, logged as `target_entropy`; KoLeo's terms
may be negative.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from protojax import errors, losses, schedules
from protojax.methods import base
from protojax.methods.networks import student_teacher
from protojax.prototypes import assignment, soft, vmf, weight_norm

OPTIONS = {
  "targets": "center",  # center or sinkhorn
  "sinkhorn_steps": 3,
  "center_momentum": 0.9,
  "student_temp": 0.1,
  "teacher_temp_start": 0.04,
  "teacher_temp": 0.07,
  "teacher_temp_warmup_epochs": 30,
  "koleo": 0.0,  # weight, summed over the two global views; DINOv2 takes .1
  "koleo_proto": 0.0,  # weight; learned prototypes only
  "koleo_proto_rows": 0,  # random prototypes a step, compared with all; 0 takes all
  "vmf": False,  # learned prototypes with train_prototype_norm only
}


def _check(options, head) -> None:
  learned = options.prototypes == "learned"
  if options.koleo_proto and not learned:
    raise errors.UserError(
      f"method.koleo_proto={options.koleo_proto:g} needs prototypes with a gradient, not "
      f"method.prototypes={options.prototypes}: choose learned or set it to 0"
    )
  if not 0 <= options.koleo_proto_rows <= options.num_prototypes:
    raise errors.UserError(
      f"method.koleo_proto_rows={options.koleo_proto_rows} must be 0 (all) to "
      f"method.num_prototypes={options.num_prototypes}"
    )
  if options.vmf and not (learned and options.train_prototype_norm):
    raise errors.UserError(
      "method.vmf=True changes nothing for prototypes of norm 1: set method.prototypes=learned and "
      "method.train_prototype_norm=True"
    )
  if options.vmf and (head.bottleneck < 4 or not head.l2):
    raise errors.UserError(
      f"head.l2={head.l2}, head.bottleneck={head.bottleneck}: method.vmf=True needs directions in "
      "4 dimensions or more"
    )
  errors.require_positive(
    options, "student_temp", "teacher_temp_start", "teacher_temp", "sinkhorn_steps"
  )


def make(config) -> base.Method:
  """DINO from `config.method`: OPTIONS and `num_prototypes`.

  Raises:
    UserError: for unknown options or ones that do not go together.
  """
  options, head = config.method, config.head
  _check(options, head)
  networks = student_teacher.build_with_prototypes(config)
  teacher_temp = schedules.per_epoch_linear(
    options.teacher_temp_start,
    options.teacher_temp,
    warmup_epochs=options.teacher_temp_warmup_epochs,
    steps_per_epoch=config.steps_per_epoch,
  )

  def init(key):
    variables = networks.method.init(key)
    center = jnp.zeros(options.num_prototypes, jnp.float32)
    return variables.replace(carry={**variables.carry, "center": center})

  def of_mixture(scores, state, temperature):
    """Scores over a temperature, of a vMF mixture if it is one."""
    if options.vmf:
      norms = jnp.abs(state["g"][:, 0])
      scores = scores.plus(vmf.offsets(norms, temperature, head.bottleneck))
    return scores.over(temperature)

  def spread(trained, features, key):
    """The KoLeo terms that are asked for, before their weights."""
    terms = {}
    if options.koleo:
      terms["koleo"] = jax.vmap(losses.koleo, in_axes=1)(features[:, :2]).sum()
    if options.koleo_proto:
      rows, count = weight_norm.rows(trained["prototypes"]), options.koleo_proto_rows
      picked = jax.random.choice(key, len(rows), (count,), replace=False) if count else None
      terms["koleo_proto"] = losses.koleo(rows, picked)
    return terms

  def loss(trained, frozen, views, key, step):
    net_key, row_key = jax.random.split(key) if options.koleo_proto_rows else (key, None)
    scores, temperature = networks.scores(trained, frozen, views, net_key), teacher_temp(step)
    student = of_mixture(scores.student, trained.get("prototypes"), options.student_temp)
    teacher = of_mixture(scores.teacher, frozen.teacher.get("prototypes"), temperature)
    # The centre of step n is made of the steps before it.
    center = frozen.carry["center"]
    q = soft.targets(
      teacher,
      center * temperature if options.vmf else center,  # of a mixture it is a log probability
      kind=options.targets,
      num_steps=options.sinkhorn_steps,
    )
    beside = soft.compare_views(soft.softmax(student), q)
    cross_entropy = losses.mean_over_other_views(beside.cross_entropy)
    entropy = beside.entropy.mean()
    terms = spread(trained, scores.features, row_key)
    value = cross_entropy + sum(options[name] * term for name, term in terms.items())
    metrics = {
      "loss": value,
      "target_entropy": entropy,
      "kl": cross_entropy - entropy,
      "mean_entropy": losses.entropy(beside.mean),
      "teacher_temp": temperature,
      "ln_k": jnp.float32(math.log(options.num_prototypes)),  # of a student that says nothing
    }
    if terms:
      metrics |= {"cross_entropy": cross_entropy, **terms}
    to_center = soft.log_mean(soft.softmax(teacher)) if options.vmf else scores.teacher.mean()
    return value, base.LossOut(metrics, {**scores.stats, "to_center": to_center})

  def update(variables, stats, step):
    center = assignment.center_update(
      variables.carry["center"], stats["to_center"], momentum=options.center_momentum
    )
    variables = networks.method.update(variables, stats, step)
    return variables.replace(carry={**variables.carry, "center": center})

  def codes(variables, images):
    scores, state = networks.method.codes(variables, images), variables.teacher.get("prototypes")
    if not options.vmf:
      return scores
    norms = jnp.abs(state["g"][:, 0])
    offsets = vmf.offsets(norms, options.teacher_temp, head.bottleneck)
    return {kind: found + offsets[None] for kind, found in scores.items()}

  def scoring(variables):
    found = networks.method.scoring(variables)
    if options.vmf:
      norms = jnp.abs(variables.teacher["prototypes"]["g"][:, 0])
      bias = vmf.offsets(norms, options.teacher_temp, head.bottleneck)
      found = {k: dataclasses.replace(one, bias=bias) for k, one in found.items()}
    return found

  return networks.method._replace(init=init, loss=loss, update=update, codes=codes, scoring=scoring)
