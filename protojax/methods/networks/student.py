"""One encoder without a teacher: what falcon, barlow_twins, vicreg, swav and others share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from protojax import errors, losses
from protojax.methods import base
from protojax.models import encoder as encoders
from protojax.prototypes import prototype_set, weight_norm

PyTree = Any


class Student(NamedTuple):
  """Pure functions; see `build`.

  Attributes:
    init: (key) -> (parameters {"backbone", "head"}, carry {"batch_stats": {"student": ...}}).
    embed: (trained, frozen, views, key) -> (z float32 [B, V, D], batch_stats), training mode, with
      a gradient; views 0 and 1 are the global ones. Hand batch_stats on in `LossOut.stats`.
    carry: (variables, batch_stats) -> carry with the new statistics, for `Method.update`.
    features: as in `base.Method`.
    project: (variables, images [B, S, S, 3]) -> z float32 [B, D], evaluation mode.
  """

  init: Callable
  embed: Callable
  carry: Callable
  features: Callable
  project: Callable


def build(config) -> Student:
  """The encoder of `config.model` and `config.head`, trained alone."""
  net = encoders.build(config)

  def init(key):
    params, batch_stats = encoders.init(net, key, config.augment.global_size)
    return params, {"batch_stats": {"student": batch_stats}}

  def embed(trained, frozen, views, key):
    out, batch_stats = encoders.embed(
      net,
      trained["encoder"],
      frozen.carry["batch_stats"]["student"],
      views,
      train=True,
      key=key,
      accum_steps=config.accum_steps,
    )
    return out.z, batch_stats

  def carry(variables: base.Variables, batch_stats: PyTree) -> dict[str, PyTree]:
    return {**variables.carry, "batch_stats": {"student": batch_stats}}

  def features(variables, images):
    batch_stats = variables.carry["batch_stats"]["student"]
    return encoders.features(net, variables.encoder, batch_stats, images)

  def project(variables, images):
    batch_stats = variables.carry["batch_stats"]["student"]
    out, _ = encoders.embed(
      net, variables.encoder, batch_stats, {"global": images[:, None]}, train=False
    )
    return out.z[:, 0]

  return Student(init, embed, carry, features, project)


def check_pairs(z: jax.Array) -> jax.Array:
  """Embeddings [B, 2, D] of two views, any float dtype -> the same in float32 (float64 stays).

  Raises:
    ValueError: for another shape, or one image, which has no batch statistics.
  """
  if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] != 2:
    raise ValueError(f"embeddings {z.shape} must be [B, 2, D] with 2 images or more")
  return losses.full(z)


def two_views(config, objective: Callable) -> base.Method:
  """A method that compares the embeddings of the two global views and has no prototypes.

  Args:
    config: its `method.prototypes` must be "none", and it may not ask for local views or for
      embeddings of length one, of which such objectives could make nothing.
    objective: (z float32 [B, 2, D] with a gradient) -> (float32 [], {name: float32 []}).

  Raises:
    UserError: if the config asks for them, or for a batch of one image.
  """
  errors.require(
    config,
    {"method.prototypes": "none", "augment.num_local": 0, "head.l2": False},
    f"method.name={config.method.name!r} compares two global views by batch statistics, without "
    "prototypes",
  )
  if config.batch_size < 2:
    raise errors.UserError("batch_size=1: statistics over the batch need 2 images or more")
  net = build(config)

  def init(key):
    params, carry = net.init(key)
    return base.Variables(params, prototypes=(), teacher=(), carry=carry)

  def loss(trained, frozen, views, key, step):
    del step
    z, batch_stats = net.embed(trained, frozen, views, key)
    value, metrics = objective(z)
    return value, base.LossOut({"loss": value, **metrics}, batch_stats)

  def update(variables, batch_stats, step):
    del step
    return variables.replace(carry=net.carry(variables, batch_stats))

  def nothing(*_):
    return {}

  return base.Method(
    learns_prototypes=False,
    init=init,
    loss=loss,
    update=update,
    features=net.features,
    codes=nothing,
    embeddings=nothing,
    prototype_matrices=nothing,
  )


class PrototypeStudent(NamedTuple):
  """Pure functions; see `build_with_prototypes`. Those of `base.Method` have its signatures.

  Attributes:
    embed: (trained, frozen, views, key) -> (z float32 [B, V, D] with a gradient, the state of the
      prototypes that the loss scores with, stats); views 0 and 1 are the global ones.
    scores: (state, z [..., D]) -> float32 [..., K].
    update: (variables, stats) -> Variables, with the stats of `embed`.
  """

  learns_prototypes: bool
  init: Callable
  embed: Callable
  scores: Callable
  update: Callable
  features: Callable
  codes: Callable
  embeddings: Callable
  prototype_matrices: Callable


def build_with_prototypes(config) -> PrototypeStudent:
  """The encoder of `build` over one prototype set, in `Variables.prototypes`.

  A mixture moves on the student's features of the two global views, without a gradient; with
  `method.em_order = "before_loss"` in `embed`, else in `update`.

  Raises:
    UserError: for an unknown `method.em_order` or `method.prototypes`.
  """
  net, bank = build(config), prototype_set.build(config)

  def init(key):
    encoder_key, prototype_key = jax.random.split(key)
    params, carry = net.init(encoder_key)
    return base.Variables(params, bank.init(prototype_key), teacher=(), carry=carry)

  def embed(trained, frozen, views, key):
    z, batch_stats = net.embed(trained, frozen, views, key)
    rows = z[:, :2].reshape(-1, z.shape[-1])
    state, moved = prototype_set.in_loss(bank, trained, frozen, rows)
    return z, state, {"batch_stats": batch_stats, "prototypes": moved}

  def scores(state, z):
    return weight_norm.scores(bank.rows(state), bank.align(state, z))

  def update(variables, stats):
    return variables.replace(
      prototypes=prototype_set.after_step(bank, variables.prototypes, stats["prototypes"]),
      carry=net.carry(variables, stats["batch_stats"]),
    )

  def codes(variables, images):
    return {"prototypes": scores(variables.prototypes, net.project(variables, images))}

  def embeddings(variables, images):
    return {"prototypes": bank.align(variables.prototypes, net.project(variables, images))}

  def prototype_matrices(variables):
    return {"prototypes": losses.l2_normalize(bank.rows(variables.prototypes))}

  return PrototypeStudent(
    bank.learned, init, embed, scores, update, net.features, codes, embeddings, prototype_matrices
  )
