"""CARP: consistency over random partitions of prototypes (Silva, Ramírez Rivera, NeurIPS 2023).

Each step cuts a random permutation of the K prototypes into blocks; inside each block the views of
an image must agree, and the mean assignment must be spread. No temperature, centring or Sinkhorn;
features are not normalised, so their norm is the inverse temperature. `method.prototypes` chooses
between the joint baseline (learned), decoupled prototypes (mixture, arXiv 2510.20108) and the
control (frozen). The published code moves the teacher before the optimizer step; here every
teacher moves after it.

The loss is at least 0. In blocks of n prototypes it is ln n if every one is as likely, and if all
images have the same one; certain assignments, as different as possible and the same in all views,
have ln(n / batch_size) or 0, whichever is more.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from absl import logging

from protojax import errors, losses
from protojax.methods import base
from protojax.methods.networks import student_teacher
from protojax.prototypes import assignment, soft

OPTIONS = {"partition_size": 512}  # prototypes a block


def _of_parts(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The two terms of scores cut into parts, and the entropy of the teacher's assignments."""
  entropy = losses.entropy(jax.nn.softmax(jax.lax.stop_gradient(teacher))).mean()
  return (
    losses.carp_consistency(student, teacher),
    losses.carp_entropy(student, teacher),
    entropy,
  )


def _terms(student: soft.Scores, teacher: soft.Scores, order: jax.Array, size: int):
  """`_of_parts` of a random partition; by blocks where prototypes are compared by blocks."""
  if not student.block:
    return _of_parts(
      assignment.partition(student.dense(), order, size),  # [B, V, P, n]
      assignment.partition(teacher.dense(), order, size),  # [B, 2, P, n]
    )

  # A part needs its own prototypes and no others: the mean over parts is one over blocks of them.
  @jax.checkpoint
  def of_part(rows):
    scores = (
      dataclasses.replace(side, prototypes=own).dense()[..., None, :]
      for side, own in zip((student, teacher), rows, strict=True)
    )
    return _of_parts(*scores)

  cut = (
    side.prototypes[order].reshape(-1, size, side.rows.shape[-1]) for side in (student, teacher)
  )
  at_once = max(student.block // size, 1)
  return jax.tree.map(jnp.mean, jax.lax.map(of_part, tuple(cut), batch_size=at_once))


def make(config) -> base.Method:
  """CARP from `config.method.{num_prototypes, partition_size}`.

  Raises:
    UserError: if the partition size does not divide the number of prototypes.
  """
  options = config.method
  if config.head.l2:
    logging.warning(
      "head.l2=True: CARP has no other temperature than the length of embeddings, and with all of "
      "length one assignments stay uniform: set config.head.l2=False"
    )
  size = options.partition_size
  if size < 2 or options.num_prototypes % size:
    raise errors.UserError(
      f"method.partition_size={size} does not cut method.num_prototypes={options.num_prototypes} "
      "into equal blocks of at least 2: choose a divisor"
    )
  networks = student_teacher.build_with_prototypes(config)

  def loss(trained, frozen, views, key, step):
    del step
    net_key, partition_key = jax.random.split(key)
    scores = networks.scores(trained, frozen, views, net_key)
    order = assignment.random_partition(partition_key, options.num_prototypes)
    consistency, spread, entropy = _terms(scores.student, scores.teacher, order, size)
    value = consistency + spread
    metrics = {
      "loss": value,
      "ln_k": jnp.float32(math.log(size)),  # of a student that says nothing: K is a block's size
      "consistency": consistency,
      "entropy_gap": spread,
      "target_entropy": entropy,
      "mean_entropy": math.log(size) - spread,
    }
    return value, base.LossOut(metrics, scores.stats)

  return networks.method._replace(loss=loss)
