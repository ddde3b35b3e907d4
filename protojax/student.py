"""One encoder without a teacher: what falcon, barlow_twins, vicreg, swav and others share."""

from collections.abc import Callable
from typing import Any, NamedTuple

from protojax.methods import base
from protojax.models import encoder as encoders

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
    return encoders.embed(
      net, trained["encoder"], frozen.carry["batch_stats"]["student"], views,
      train=True, key=key, accum_steps=config.accum_steps,
    )  # fmt: skip

  def carry(variables: base.Variables, batch_stats: PyTree) -> dict[str, PyTree]:
    return {**variables.carry, "batch_stats": {"student": batch_stats}}

  def features(variables, images):
    batch_stats = variables.carry["batch_stats"]["student"]
    return encoders.features(net, variables.encoder, batch_stats, images)

  def project(variables, images):
    batch_stats = variables.carry["batch_stats"]["student"]
    z, _ = encoders.embed(
      net, variables.encoder, batch_stats, {"global": images[:, None]}, train=False
    )
    return z[:, 0]

  return Student(init, embed, carry, features, project)
