"""The contract between a method and the training step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

from protojax.prototypes import scoring as scorings

PyTree = Any
Batch = dict[str, jax.Array]


@flax.struct.dataclass
class Variables:
  """What a method owns: the training state without step, optimizer state and key.

  Attributes:
    encoder: parameters trained by optax, {"backbone": ..., "head": ...} and further ones of yours.
    prototypes: a pytree of its own, never inside `encoder`: trained by optax when
      `Method.learns_prototypes`, else moved (mixture) or left alone (frozen) by `Method.update`.
    teacher: moving average of what is trained, float32; () without a teacher.
    carry: dict of everything else without a gradient (centre, batch-norm statistics, ...).
  """

  encoder: PyTree
  prototypes: PyTree
  teacher: PyTree
  carry: dict[str, PyTree]


class LossOut(NamedTuple):
  """What a loss hands on besides its value.

  Attributes:
    metrics: scalars, float32 [], logged as they are.
    stats: input of `Method.update`; never differentiated.
  """

  metrics: dict[str, jax.Array]
  stats: PyTree


def no_loss(*_) -> tuple[jax.Array, LossOut]:
  """Stands in `Method.loss` of a network until a method puts its own there."""
  raise NotImplementedError("this network has no loss yet: method._replace(loss=...)")


class Method(NamedTuple):
  """A self-supervised method as pure functions.

  Networks (`methods.networks`) hand over one whose loss is `no_loss`; a method replaces that, and
  whatever else is its own, by `_replace`.

  Attributes:
    learns_prototypes: whether `prototypes` is trained by gradient.
    init: (key) -> Variables. Traceable; shapes come from the config.
    loss: (trained, frozen, views, key, step) -> (float32 [], LossOut). `trained` is
      {"encoder": ...} plus "prototypes" when `learns_prototypes`; `frozen` is a `Variables`
      whose trained fields are (). `views` is {"global": [B, 2, S, S, 3], "local": [B, L, s, s, 3],
      "index": int32 [B], number of the image in its source}.
    update: (variables, stats, step) -> Variables, after the optimizer step.
    features: (variables, images [B, S, S, 3]) -> [B, D] float32, evaluation mode.
    codes: (variables, images [B, S, S, 3]) -> {set: [B, K]} scores over each prototype set.
    embeddings: (variables, images [B, S, S, 3]) -> {set: [B, D]}, what the codes compare with the
      prototypes, any norm.
    prototype_matrices: (variables) -> {set: [K, D]} unit rows, float32; {} if there are none.
    refresh: (variables, embeddings [N, D], index int32 [N], key) -> Variables, before the first
      step of an epoch, or None: what a method learns from all training images at once. Embeddings
      are those of the set "prototypes" under the evaluation transform, one row for each image that
      can be read; index is that image's number, as in views["index"].
    refresh_from: step of the first refresh.
    scoring: (variables) -> {set: `scoring.Scoring`}, the same scores as arrays, for exported
      weights: `codes` and `embeddings` up to rounding and a positive factor. A method that replaces
      one of those replaces it too; None exports no prototypes.
  """

  learns_prototypes: bool
  init: Callable[[jax.Array], Variables]
  loss: Callable[[dict, Variables, Batch, jax.Array, jax.Array], tuple[jax.Array, LossOut]]
  update: Callable[[Variables, PyTree, jax.Array], Variables]
  features: Callable[[Variables, jax.Array], jax.Array]
  codes: Callable[[Variables, jax.Array], dict[str, jax.Array]]
  embeddings: Callable[[Variables, jax.Array], dict[str, jax.Array]]
  prototype_matrices: Callable[[Variables], dict[str, jax.Array]]
  refresh: Callable[[Variables, jax.Array, jax.Array, jax.Array], Variables] | None = None
  refresh_from: int = 0
  scoring: Callable[[Variables], dict[str, scorings.Scoring]] | None = None
