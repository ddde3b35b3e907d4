"""The optimizer of a run from `config.optim`: clip, freeze, AdamW / Adam / LARS / SGD, schedules.

It updates {"encoder": parameters, "prototypes": parameters}, the latter where prototypes are
learned. Each of the two has an optimizer state of its own, so that frozen prototypes can keep
theirs, Adam's count included: had Adam been fed zeros meanwhile, its bias correction would make the
first step after the freeze 2.7 learning rates long (after 1,250 frozen steps) instead of one. For
the same reason a backbone that stands still at first has a state apart from its head's.

What optax has for this was compared (0.2.6): `optax.partition` with
`optax.transforms.conditionally_mask` gives the same parameters to within a rounding, but a state of
another tree with a count more, so that no earlier checkpoint would resume, and 15 % more bytes
moved in a step (65,536 prototypes of 256 dimensions, CPU). `optax.clip_by_global_norm` divides by
the norm alone, DINO's code by norm + 1e-6, which is 2e-6 (relative) less at a norm of .5.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from protojax import errors, schedules

PyTree = Any

_CLIP_MODES = {
  "tensor": "per tensor",
  "global": "of all together",
  "encoder": "of the encoder together",
}
_LAYER = re.compile(r"(blocks_|stage|block)(\d+)")  # of transformers from 0, of ResNets from 1
_EMBEDDINGS = ("cls_token", "mask_token", "pos_embed", "registers")


class OptimState(NamedTuple):
  """State of the optimizer that `build` makes.

  Attributes:
    step: int32 [], updates so far: the position in the schedules.
    parts: {"encoder": ..., "prototypes": ...}, optax states: moments with counts of their own.
      With `optim.freeze_backbone_steps` {"backbone": ..., "rest": ...} take the encoder's place.
  """

  step: jax.Array
  parts: dict[str, PyTree]


def layer_rates(encoder: PyTree, decay: float) -> PyTree:
  """Share of the learning rate that each parameter of an encoder moves with: `optim.layer_decay`.

  Layers count from the image on: 0 embeds it, then blocks of a transformer or stages of a ResNet,
  and the last norm and the head are the n-th, with the whole rate. Layer i has decay^(n - i), as in
  the published BEiT (arXiv 2106.08254) and MAE.

  >>> backbone = {"cls_token": 0, "blocks_0": {"kernel": 0}, "blocks_1": {"kernel": 0}, "norm": 0}
  >>> rates = layer_rates({"backbone": backbone, "head": {"kernel": 0}}, 0.5)
  >>> rates["backbone"]["cls_token"], rates["backbone"]["blocks_1"], rates["head"]["kernel"]
  (0.125, {'kernel': 0.5}, 1.0)

  Args:
    encoder: {"backbone": nested dicts, ...}; all beside the backbone is the head.
    decay: 0 to 1; 1 gives every layer the whole rate.

  Returns:
    Pytree of float, like `encoder`.
  """

  def layer(path) -> int | None:
    name = jax.tree_util.keystr(path[1:2], simple=True)
    if jax.tree_util.keystr(path[:1], simple=True) != "backbone" or name == "norm":
      return None  # with the head
    found = _LAYER.match(name)
    return 0 if found is None else int(found[2]) + (found[1] == "blocks_")

  leaves, shape = jax.tree_util.tree_flatten_with_path(encoder)
  layers = [layer(path) for path, _ in leaves]
  last = max((i for i in layers if i is not None), default=0) + 1
  rates = [decay ** (last - (last if i is None else i)) for i in layers]
  return jax.tree.unflatten(shape, rates)


def decay_mask(params: PyTree, options) -> PyTree:
  """Says which parameters decay: those of two or more dimensions that are no bias or scale.

  By name, not by shape alone: a fused bias may have two dimensions. Tokens, position
  embeddings and learned prototypes (v, and their norms g [K, 1]) do decay, as in DINO's code,
  unless `optim.decay_embeddings` or `optim.decay_prototypes` is False. With `optim.decay_all`, as
  in the published SwAV, Self-Classifier and PCL, biases and scales do too, and under Adam, which is
  PyTorch's, in any case. LARS adapts the parameters that decay.

  >>> import ml_collections
  >>> options = ml_collections.ConfigDict(
  ...   {
  ...     "name": "adamw",
  ...     "decay_all": False,
  ...     "decay_embeddings": False,
  ...     "decay_prototypes": True,
  ...   }
  ... )
  >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2), "cls_token": jnp.ones((1, 1, 4))}
  >>> decay_mask(params, options)
  {'bias': False, 'cls_token': False, 'kernel': True}

  Args:
    params: nested dicts of arrays.
    options: `config.optim`; reads `name`, `decay_all`, `decay_embeddings`, `decay_prototypes`.

  Returns:
    Pytree of bool, like `params`.
  """
  exempt = () if options.decay_embeddings else _EMBEDDINGS
  exempt += () if options.decay_prototypes else ("v", "g")
  everything = options.decay_all or options.name == "adam"

  def decays(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    is_weight = leaf.ndim >= 2 and name not in ("bias", "scale")
    return (is_weight or everything) and name not in exempt

  return jax.tree_util.tree_map_with_path(decays, params)


def _clip(grads: dict[str, PyTree], limit: float, mode: str) -> dict[str, PyTree]:
  """Scales gradients by min(1, limit / (norm + 1e-6)), the norm of each tensor, or of all.

  Mode "encoder" leaves those of the prototypes out and as they are.
  """

  def factor(norm):
    return jnp.minimum(1.0, limit / (norm + 1e-6))

  if mode == "global":
    return optax.tree.scale(factor(optax.tree.norm(grads)), grads)
  if mode == "encoder":
    clipped = optax.tree.scale(factor(optax.tree.norm(grads["encoder"])), grads["encoder"])
    return {**grads, "encoder": clipped}
  return jax.tree.map(lambda g: g * factor(optax.tree.norm(g)), grads)


def _adapt(options, rate, decay) -> optax.GradientTransformation:
  """Layer-wise adaptation of LARS (arXiv 1708.03888) in the form of SwAV's and solo-learn's code.

  Weights: (g + decay w) * trust |w| / (|g| + decay |w| + 1e-8), plain g where either norm is 0.
  Everything that does not decay: plain g; with `optim.decay_all` that is nothing, as under apex's
  LARC, which SwAV and Self-Classifier were trained with. `optim.lars_clip` divides the ratio by the
  learning rate and cuts it at 1, so that no weight moves faster than under SGD. `optax.lars` puts
  |g + decay w| in the denominator, decays zero-norm weights and multiplies by the learning rate
  before the momentum.
  """

  def update(grads, state, params):
    def leaf(g, w, is_weight):
      if not is_weight:
        return g
      norm_g, norm_w = optax.tree.norm(g), optax.tree.norm(w)
      ratio = options.trust * norm_w / (norm_g + decay * norm_w + 1e-8)
      if options.lars_clip:
        ratio = jnp.minimum(ratio / jnp.maximum(rate, 1e-12), 1.0)  # the rate starts at 0
      return jnp.where((norm_g > 0) & (norm_w > 0), ratio * (g + decay * w), g)

    return jax.tree.map(leaf, grads, params, decay_mask(params, options)), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rule(options, rate, decay) -> optax.GradientTransformation:
  """Gradient -> direction, still to be multiplied by minus the learning rate."""
  decayed = optax.add_decayed_weights(decay, mask=lambda params: decay_mask(params, options))
  if options.name == "adamw":
    return optax.chain(optax.scale_by_adam(b1=options.beta1, b2=options.beta2, eps=1e-8), decayed)
  if options.name == "adam":  # PyTorch's: the decay is part of the gradient
    return optax.chain(decayed, optax.scale_by_adam(b1=options.beta1, b2=options.beta2, eps=1e-8))
  if options.name == "lars":
    return optax.chain(_adapt(options, rate, decay), optax.trace(decay=options.beta1))
  if options.name == "sgd":
    return optax.chain(decayed, optax.trace(decay=options.beta1))
  raise errors.UserError(f"optim.name={options.name!r} is unknown: choose adamw, adam, lars or sgd")


def _peak(config, batch_size: int) -> float:
  """The learning rate after the warm-up: `optim.lr` is meant per 256 images."""
  return config.optim.lr * batch_size / 256


def learning_rate(config, *, num_steps: int, batch_size: int) -> schedules.Schedule:
  """The schedule of the learning rate: warm-up to `optim.lr` per 256 images, then a cosine."""
  options = config.optim
  return schedules.warmup_cosine(
    _peak(config, batch_size),
    options.final_lr,
    warmup_steps=options.warmup_steps,
    num_steps=schedules.stretched(num_steps, options.schedule_scale),
    start=options.warmup_start * batch_size / 256,
  )


def weight_decay(config, *, num_steps: int) -> schedules.Schedule:
  """The schedule of the weight decay: cosine to `optim.final_weight_decay`."""
  options = config.optim
  length = schedules.stretched(num_steps, options.schedule_scale)
  return schedules.cosine(options.weight_decay, options.final_weight_decay, length)


def describe(config) -> str:
  """Describes the optimizer in one line for the log: rule, rates, decay, clipping, freezing."""
  o = config.optim
  clip = f"clip {o.clip:g} {_CLIP_MODES.get(o.clip_mode)}"
  learned = config.method.prototypes == "learned"
  steps = o.freeze_prototypes_steps if learned else 0
  parts = [
    f"{o.name}: lr {o.lr:g} x {config.batch_size}/256 = {_peak(config, config.batch_size):g} -> "
    f"{o.final_lr:g}",
    (
      f"{o.warmup_steps} warm-up steps"
      + f" from {o.warmup_start * config.batch_size / 256:g}" * bool(o.warmup_start)
    )
    * bool(o.warmup_steps),
    f"schedules {o.schedule_scale:g} times as long as the run" * (o.schedule_scale != 1.0),
    f"weight decay {o.weight_decay:g}"
    + f" -> {o.final_weight_decay:g}" * (o.final_weight_decay != o.weight_decay),
    clip if o.clip else "no clipping",
    f"learned prototypes frozen for {steps} steps" * bool(steps),
    f"backbone frozen for {o.freeze_backbone_steps} steps" * bool(o.freeze_backbone_steps),
    f"layer decay {o.layer_decay:g}" * (o.layer_decay != 1.0),
  ]
  return ", ".join(part for part in parts if part)


def build(config, *, num_steps: int, batch_size: int) -> optax.GradientTransformation:
  """Makes the optimizer of {"encoder": ..., "prototypes": ...}; its updates are to be added.

  Order of a step, as in DINO's code: clip, freeze, moments, decay, learning rate. AdamW decays
  decoupled, w (1 - lr wd) - lr m / (sqrt(v) + 1e-8); Adam, SGD and LARS add the decay to the
  gradient; what decays is said in `decay_mask`; SGD and LARS take `optim.beta1` as momentum.

  Args:
    config: reads `optim.{name, lr, final_lr, warmup_steps, warmup_start, schedule_scale,
      weight_decay, final_weight_decay, clip, clip_mode, decay_all, decay_embeddings,
      decay_prototypes, trust, lars_clip, freeze_prototypes_steps, freeze_backbone_steps,
      layer_decay, beta1, beta2}`.
    num_steps: length of the schedules.
    batch_size: global, scales `optim.lr`.

  Raises:
    UserError: for an unknown `optim.name` or `optim.clip_mode`, or an `optim.layer_decay` that is
      not above 0 and at most 1.
  """
  options = config.optim
  if options.clip_mode not in _CLIP_MODES:
    raise errors.UserError(
      f"optim.clip_mode={options.clip_mode!r} is unknown: choose {', '.join(_CLIP_MODES)}"
    )
  if options.schedule_scale < 1.0:
    raise errors.UserError(
      f"optim.schedule_scale={options.schedule_scale} is less than 1: schedules would end before "
      "the run"
    )
  if not 0.0 < options.layer_decay <= 1.0:
    raise errors.UserError(
      f"optim.layer_decay={options.layer_decay} must be above 0 and at most 1 (1: one rate for "
      "all layers)"
    )
  frozen_until = {
    "prototypes": options.freeze_prototypes_steps,
    "backbone": options.freeze_backbone_steps,
  }
  start = _rule(options, 0.0, 0.0)
  rate = learning_rate(config, num_steps=num_steps, batch_size=batch_size)
  decay = weight_decay(config, num_steps=num_steps)

  def apart(trained):
    """The parts that have a state each."""
    if not options.freeze_backbone_steps:
      return trained
    encoder = dict(trained["encoder"])
    backbone = encoder.pop("backbone")
    others = {name: part for name, part in trained.items() if name != "encoder"}
    return {"backbone": backbone, "rest": encoder, **others}

  def together(parts):
    if not options.freeze_backbone_steps:
      return parts
    parts = dict(parts)
    encoder = {"backbone": parts.pop("backbone"), **parts.pop("rest")}
    return {"encoder": encoder, **parts}

  def init(trained):
    parts = {name: start.init(params) for name, params in apart(trained).items()}
    return OptimState(jnp.zeros((), jnp.int32), parts)

  def update(grads, state, trained):
    if options.clip:
      grads = _clip(grads, options.clip, options.clip_mode)
    lr = rate(state.step)
    rule = _rule(options, lr, decay(state.step))
    grads, params = apart(grads), apart(trained)
    updates, parts = {}, {}
    for name, old in state.parts.items():
      direction, new = rule.update(grads[name], old, params[name])
      if frozen_until.get(name):
        live = state.step >= frozen_until[name]
        frozen = optax.tree.zeros_like(direction), old
        direction, new = optax.tree.where(live, (direction, new), frozen)
      updates[name], parts[name] = direction, new
    updates = jax.tree.map(lambda d: (-lr * d).astype(d.dtype), together(updates))
    if options.layer_decay != 1.0:
      rates = layer_rates(updates["encoder"], options.layer_decay)
      updates |= {"encoder": jax.tree.map(jnp.multiply, updates["encoder"], rates)}
    return updates, OptimState(optax.safe_increment(state.step), parts)

  return optax.GradientTransformation(init, update)
