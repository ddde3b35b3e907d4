"""Floating point operations of a JAX function's matrix products and convolutions.

Counted on its jaxpr, before any compiler: neither fusion nor a hand-written kernel changes them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from protojax.data import augment as augmentation
from protojax.training import train_step


def _dot(eqn) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  shape = eqn.invars[0].aval.shape
  return 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)


def _taps(size, taps, out, stride, pad, lhs_dilation, rhs_dilation) -> int:
  """Pairs (output position, kernel tap) of one axis that meet an element of the input."""
  where = np.arange(out)[:, None] * stride + np.arange(taps)[None, :] * rhs_dilation - pad
  inside = (where >= 0) & (where <= (size - 1) * lhs_dilation)
  return int(np.sum(inside & (where % lhs_dilation == 0)))


def _conv(eqn) -> int:
  p, (lhs, rhs) = eqn.params, (v.aval.shape for v in eqn.invars)
  out, spec = eqn.outvars[0].aval.shape, p["dimension_numbers"]
  axes = zip(
    spec.lhs_spec[2:],
    spec.rhs_spec[2:],
    spec.out_spec[2:],
    p["window_strides"],
    p["padding"],
    p["lhs_dilation"],
    p["rhs_dilation"],
    strict=True,
  )
  pairs = math.prod(
    _taps(lhs[i], rhs[j], out[k], stride, pad[0], lhs_dilation, rhs_dilation)
    for i, j, k, stride, pad, lhs_dilation, rhs_dilation in axes
  )
  # The kernel's input features are those of one group already, whichever way there are groups.
  return 2 * out[spec.out_spec[0]] * out[spec.out_spec[1]] * rhs[spec.rhs_spec[1]] * pairs


_COUNTED = {"dot_general": _dot, "conv_general_dilated": _conv}


def _inside(params) -> list:
  """The jaxprs among an equation's parameters, open."""
  flat = jax.tree.leaves(
    list(params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr)
  )
  closed = [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in flat]
  return [x for x in closed if isinstance(x, core.Jaxpr)]


def _of_jaxpr(jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name.startswith("dot_product_attention") or name == "pallas_call":
      raise ValueError(f"{name} hides its products: count the step with model.attention=xla")
    if name in _COUNTED:
      total += _COUNTED[name](eqn)
      continue
    parts = [_of_jaxpr(inner) for inner in _inside(eqn.params)]
    total += (max if name == "cond" and parts else sum)(parts) * eqn.params.get("length", 1)
  return total


def of_function(fn, *args) -> float:
  """Operations of the matrix products and convolutions in `fn(*args)`, 2 a multiply-add.

  What is jitted, differentiated, rematerialised or mapped counts as often as it runs: a scan (and a
  `fori_loop` between numbers known beforehand, which is one) times its length, of a `cond` the
  dearest branch. A `while_loop`, whose number of rounds no jaxpr says, counts as one round.
  A product whose result nothing uses counts too. A convolution counts the taps that meet an
  element of the input, not padding and not the holes of a dilated input, as XLA counts it.

  Args:
    fn: traceable.
    *args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.

  Raises:
    ValueError: `fn` calls fused attention, in which nothing can be counted.
  """
  return float(_of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr))


def of_step(program, *, augment: bool = True) -> float:
  """Operations of `programs.Program.step` for the config's batch, on all devices together.

  Args:
    program: without the online probe, as `Program(config)` has none.
    augment: count the augmentation as well; without, the step gets views that are ready, as
      `peers.make_step` does.

  Raises:
    ValueError: see `of_function`.
  """
  config = program.config
  size = config.data.image_size
  batch = {
    "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
    "size": jax.ShapeDtypeStruct((config.batch_size, 2), jnp.int32),
    "index": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
  }
  make_views = augmentation.make(config.augment)
  if not augment:
    views = jax.eval_shape(lambda x: make_views(jax.random.key(0), x), batch)
    batch = {"views": views, "index": batch["index"]}
    make_views = _ready
  step = functools.partial(
    train_step.train_step,
    method=program.method,
    tx=program.tx,
    augment=make_views,
    evaluation=program.evaluation,
  )
  with jax.set_mesh(program.mesh):
    return of_function(step, program.abstract, batch)


def _ready(key, batch):
  del key
  return batch["views"]
