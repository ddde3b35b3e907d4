"""One set of prototypes, whichever way it moves: learned, mixture or frozen.

A method asks for rows and scores and never for the kind: `in_loss` gives the state it scores with,
`after_step` the state of the next step. What differs:

  learned   weight-normalised rows, trained by optax with the encoder (the joint baseline);
  mixture   means of a Gaussian mixture, moved by online EM on features without a gradient, the
            teacher's where there is one (arXiv 2510.20108);
  frozen    the mixture's starting point, never moved: the control of every uniqueness claim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from protojax import errors, losses
from protojax.prototypes import mixture, streaming, weight_norm

PyTree = Any

_LARGE = 2**24  # numbers of a state, 64 MiB: no copy of it is worth fewer messages


class PrototypeSet(NamedTuple):
  """Pure functions over one set of K prototypes of dimension D.

  Attributes:
    learned: whether the state is trained by gradient.
    init: (key) -> state.
    rows: (state) -> float32 [K, D]; unit rows unless a learned norm is trained.
    align: (state, features [..., D]) -> [..., D], the features in the coordinates of the rows: a
      mixture that subtracts the running mean needs the loss to do so too.
    mean: (state) -> [D], the mean that `align` subtracts, or None.
    move: (state, features [N, D]) -> state, one EM step; identity unless a mixture.
    before_loss: whether a step moves the state before its loss or after the optimizer.
  """

  learned: bool
  init: Callable[[jax.Array], PyTree]
  rows: Callable[[PyTree], jax.Array]
  align: Callable[[PyTree, jax.Array], jax.Array]
  mean: Callable[[PyTree], jax.Array | None]
  move: Callable[[PyTree, jax.Array], PyTree]
  before_loss: bool = False


def _stay(state, features):
  del features
  return state


def _as_they_are(state, features):
  del state
  return features


def _no_mean(state):
  del state


def in_loss(
  prototype_set: PrototypeSet, trained: dict, frozen: Any, features: jax.Array
) -> tuple[PyTree, PyTree]:
  """The state that a loss scores with.

  Args:
    prototype_set: from `build`.
    trained: as in `base.Method.loss`.
    frozen: the rest of the state, as in `base.Method.loss`.
    features: what `move` takes, of the global batch; no gradient reaches them.

  Returns:
    (state, with a gradient only if learned; what `after_step` needs, for `LossOut.stats`).
  """
  if prototype_set.learned:
    return trained["prototypes"], ()
  features = jax.lax.stop_gradient(features)
  state = frozen.prototypes
  if prototype_set.before_loss:
    state = prototype_set.move(state, features)
  state = jax.lax.stop_gradient(state)
  return state, state if prototype_set.before_loss else features


def after_step(
  prototype_set: PrototypeSet, state: PyTree, moved: PyTree, step: jax.Array
) -> PyTree:
  """The state of the next step, for `base.Method.update`; `moved` is from `in_loss`.

  Of a large state, what `step` is made of is done before anything moves (`train_step` makes it of
  all that a loss gives): a loss that still reads prototypes would need a copy of them.
  """
  if prototype_set.learned:
    return state
  if prototype_set.before_loss:
    return moved
  if sum(x.size for x in jax.tree.leaves(state)) >= _LARGE:
    nothing = (step < 0).astype(jnp.float32)  # 0, which XLA does not know
    moved = jax.tree.map(lambda x: x + nothing, moved)
  return prototype_set.move(state, moved)


def several(one: PrototypeSet, kinds: tuple[str, ...], *, shared: bool = False) -> PrototypeSet:
  """A set for each kind of token, or one for all of them.

  Args:
    one: what each set is like.
    kinds: names.
    shared: one set scores every kind; a mixture is fed by all tokens alike. A single kind is that.

  Returns:
    A `PrototypeSet` with dicts by kind in the place of arrays: `rows` gives {kind: [K, D]}, `align`
    and `move` take {kind: [B, ..., D]}, images first. Its state is that of `one` if one set serves
    all, else a dict as well.
  """

  def flat(x):
    return x.reshape(-1, x.shape[-1])

  def move_one(state, features):
    # Joined behind the images, so that no row leaves its device.
    tokens = [x.reshape(x.shape[0], -1, x.shape[-1]) for x in features.values()]
    return one.move(state, flat(jnp.concatenate(tokens, axis=1)))

  if shared or len(kinds) == 1:
    return one._replace(
      rows=lambda state: dict.fromkeys(kinds, one.rows(state)),
      align=lambda state, features: {k: one.align(state, x) for k, x in features.items()},
      mean=lambda state: dict.fromkeys(kinds, one.mean(state)),
      move=move_one,
    )

  def init(key):
    keys = jax.random.split(key, len(kinds))
    return {kind: one.init(key) for kind, key in zip(kinds, keys, strict=True)}

  return one._replace(
    init=init,
    rows=lambda state: {k: one.rows(state[k]) for k in kinds},
    align=lambda state, features: {k: one.align(state[k], x) for k, x in features.items()},
    mean=lambda state: {k: one.mean(state[k]) for k in kinds},
    move=lambda state, features: {k: one.move(state[k], flat(x)) for k, x in features.items()},
  )


def _learned(num: int, dim: int, train_norm: bool) -> PrototypeSet:
  return PrototypeSet(
    learned=True,
    init=lambda key: weight_norm.init(key, num, dim, trainable_norm=train_norm),
    rows=weight_norm.rows,
    align=_as_they_are,
    mean=_no_mean,
    move=_stay,
  )


def _frozen(num: int, dim: int) -> PrototypeSet:
  return PrototypeSet(
    learned=False,
    init=lambda key: {"means": losses.l2_normalize(jax.random.normal(key, (num, dim)))},
    rows=lambda state: state["means"],
    align=_as_they_are,
    mean=_no_mean,
    move=_stay,
  )


def _mixture(num: int, dim: int, config, **products) -> PrototypeSet:
  if not config.anneal_steps and (config.horizon_final, config.beta_final) != (
    config.horizon_steps,
    config.beta,
  ):
    raise ValueError("horizon_final and beta_final need anneal_steps above 0")
  if config.window is not None and config.horizon_final != config.horizon_steps:
    raise ValueError(f"window={config.window} takes the place of a horizon: unset horizon_final")

  def ramp(start, final):
    if config.anneal_steps:
      return optax.linear_schedule(start, final, config.anneal_steps)
    return start

  horizon = ramp(config.horizon_steps, config.horizon_final)
  em = mixture.online_em(
    num,
    dim,
    horizon_steps=horizon if config.window is None else None,
    window=config.window,
    kappa=config.kappa,
    balanced=config.balanced,
    center_features=config.center_features,
    options=mixture.Options(
      mass=config.mass,
      covariance=config.covariance,
      learn_kappa=config.learn_kappa,
      beta=ramp(config.beta, config.beta_final),
      use_pi=config.use_pi,
      balance_steps=config.balance_steps,
      reseed=config.reseed,
      variance_floor=config.variance_floor,
      momentum=config.momentum,
      **products,
    ),
  )

  def align(state, features):
    return mixture.center(state, features) if config.center_features else features

  return PrototypeSet(
    learned=False,
    init=em.init,
    rows=lambda state: state.means,
    align=align,
    mean=(lambda state: state.feature_mean) if config.center_features else _no_mean,
    move=lambda state, features: em.update(state, features)[0],
  )


def block_size(config, num_rows: int = 0) -> int:
  """Prototypes that a loss compares at a time, see `streaming.block_size`; 0: all.

  Args:
    config: reads `method.{block, num_prototypes}`, `batch_size` and `augment.num_local`.
    num_rows: how many embeddings are compared, where they may be more than all views of a batch.
  """
  views = config.batch_size * (2 + config.augment.num_local)
  options = config.method
  return streaming.block_size(options.block, max(views, num_rows), options.num_prototypes)


def precision(config) -> str:
  """`method.precision`: of products of embeddings and features with prototypes.

  Raises:
    UserError: if it is none of `streaming.PRECISIONS`.
  """
  asked = config.method.precision
  if asked not in streaming.PRECISIONS:
    *others, last = streaming.PRECISIONS
    raise errors.UserError(
      f"method.precision={asked!r} is unknown: choose {', '.join(others)} or {last}"
    )
  return asked


def build(config) -> PrototypeSet:
  """The prototype set that `config.method.prototypes` names.

  Args:
    config: reads `method.{prototypes, num_prototypes, train_prototype_norm, em_order, block,
      precision}`, `head.bottleneck` (D) and `mixture.*`.

  Raises:
    UserError: for an unknown kind, `method.em_order` or `method.precision`, fewer than two
      prototypes or mixture options out of range.
  """
  num, dim, kind = config.method.num_prototypes, config.head.bottleneck, config.method.prototypes
  products = precision(config)
  if config.method.em_order not in ("after_step", "before_loss"):
    raise errors.UserError(
      f"method.em_order={config.method.em_order!r} is unknown: choose after_step or before_loss"
    )
  if num < 2:
    raise errors.UserError(
      f"config.method.num_prototypes={num}: a method needs at least 2 prototypes; raise it"
    )
  if kind == "learned":
    return _learned(num, dim, config.method.train_prototype_norm)
  if kind == "mixture":
    try:
      moving = _mixture(num, dim, config.mixture, block=config.method.block, precision=products)
    except ValueError as error:
      raise errors.UserError(f"mixture: {error}; see config.mixture") from None
    return moving._replace(before_loss=config.method.em_order == "before_loss")
  if kind == "frozen":
    return _frozen(num, dim)
  raise errors.UserError(
    f"method.prototypes={kind!r} is unknown: choose learned, mixture or frozen"
  )
