"""One encoder without a teacher: what falcon, barlow_twins, vicreg, swav and others share."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from protojax import errors, losses, placement
from protojax.methods import base
from protojax.models import encoder as encoders
from protojax.prototypes import prototype_set, soft
from protojax.prototypes import scoring as scorings


class Student(NamedTuple):
  """One encoder; see `build`.

  Attributes:
    method: all but `loss`; without prototypes. Its `update` takes the batch statistics of `embed`
      as stats.
    embed: (trained, frozen, views, key) -> (z float32 [B, V, D], batch statistics), training mode,
      with a gradient; views 0 and 1 are the global ones.
    project: (variables, images [B, S, S, 3]) -> z float32 [B, D], evaluation mode, placed as
      prototypes meet it.
  """

  method: base.Method
  embed: Callable
  project: Callable


def build(config) -> Student:
  """The encoder of `config.model` and `config.head`, trained alone."""
  net = encoders.build(config)

  def batch_stats_of(carry):
    return carry["batch_stats"]["student"]

  def init(key):
    params, batch_stats = encoders.init(net, key, config.augment.global_size, config.data.channels)
    carry = {"batch_stats": {"student": batch_stats}}
    return base.Variables(params, prototypes=(), teacher=(), carry=carry)

  def embed(trained, frozen, views, key):
    out, batch_stats = encoders.embed(
      net,
      trained["encoder"],
      batch_stats_of(frozen.carry),
      views,
      train=True,
      key=key,
      accum_steps=config.accum_steps,
    )
    return out.z, batch_stats

  def update(variables, batch_stats, step):
    del step
    return variables.replace(carry={**variables.carry, "batch_stats": {"student": batch_stats}})

  def features(variables, images):
    return encoders.features(net, variables.encoder, batch_stats_of(variables.carry), images)

  def project(variables, images):
    views, batch_stats = {"global": images[:, None]}, batch_stats_of(variables.carry)
    out, _ = encoders.embed(net, variables.encoder, batch_stats, views, train=False)
    return placement.beside_prototypes(out.z[:, 0])

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
  return Student(method, embed, project)


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
    {
      "method.prototypes": "none",
      "method.block": None,
      "method.precision": "highest",
      "augment.num_local": 0,
      "head.l2": False,
    },
    f"method.name={config.method.name!r} compares two global views by batch statistics, without "
    "prototypes",
  )
  if config.batch_size < 2:
    raise errors.UserError("batch_size=1: statistics over the batch need 2 images or more")
  net = build(config)

  def loss(trained, frozen, views, key, step):
    del step
    z, batch_stats = net.embed(trained, frozen, views, key)
    value, metrics = objective(z)
    return value, base.LossOut({"loss": value, **metrics}, batch_stats)

  return net.method._replace(loss=loss)


class PrototypeStudent(NamedTuple):
  """One encoder and its prototypes; see `build_with_prototypes`.

  Attributes:
    method: all but `loss`. Its `update` takes the stats of `embed`.
    embed: (trained, frozen, views, key) -> (z float32 [B, V, D] with a gradient, the state of the
      prototypes that the loss scores with, stats); views 0 and 1 are the global ones.
    scores: (state, z [..., D], num_rows = those of z) -> `soft.Scores`, prototypes in blocks that
      suit so many rows: what is compared with each other needs the same ones.
    project: see `Student`.
  """

  method: base.Method
  embed: Callable
  scores: Callable
  project: Callable


def build_with_prototypes(config) -> PrototypeStudent:
  """The encoder of `build` over one prototype set, in `Variables.prototypes`.

  A mixture moves on the student's features of the two global views, without a gradient; with
  `method.em_order = "before_loss"` in `embed`, else in `update`.

  Raises:
    UserError: for an unknown `method.em_order` or `method.prototypes`.
  """
  net, prototypes = build(config), prototype_set.build(config)

  def init(key):
    encoder_key, prototype_key = jax.random.split(key)
    return net.method.init(encoder_key).replace(prototypes=prototypes.init(prototype_key))

  def embed(trained, frozen, views, key):
    z, batch_stats = net.embed(trained, frozen, views, key)
    z = placement.beside_prototypes(z)
    features = z[:, :2].reshape(-1, z.shape[-1])
    state, moved = prototype_set.in_loss(prototypes, trained, frozen, features)
    return z, state, {"batch_stats": batch_stats, "prototypes": moved}

  def scores(state, z, num_rows=None):
    rows = prototypes.rows(state)
    block = prototype_set.block_size(config, num_rows or z.size // z.shape[-1])
    return soft.Scores(
      prototypes.align(state, z), rows, block=block, precision=config.method.precision
    )

  def update(variables, stats, step):
    state = prototype_set.after_step(prototypes, variables.prototypes, stats["prototypes"], step)
    return net.method.update(variables.replace(prototypes=state), stats["batch_stats"], step)

  def codes(variables, images):
    found = scores(variables.prototypes, net.project(variables, images))
    return {"prototypes": found.dense()}

  def embeddings(variables, images):
    return {"prototypes": prototypes.align(variables.prototypes, net.project(variables, images))}

  def prototype_matrices(variables):
    return {"prototypes": losses.l2_normalize(prototypes.rows(variables.prototypes))}

  def scoring(variables):
    state = variables.prototypes
    return {"prototypes": scorings.Scoring(prototypes.rows(state), prototypes.mean(state))}

  method = net.method._replace(
    learns_prototypes=prototypes.learned,
    init=init,
    update=update,
    codes=codes,
    embeddings=embeddings,
    prototype_matrices=prototype_matrices,
    scoring=scoring,
  )
  return PrototypeStudent(method, embed, scores, net.project)
