"""How large what each module of a network gives is, without a change to the network."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def norm(x: jax.Array) -> jax.Array:
  """2-norm, float32 []; not finite if and only if an element is not, or it is beyond float32."""
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), initial=0.0)
  scale = jnp.where((largest > 0.0) & jnp.isfinite(largest), largest, 1.0)
  return largest * jnp.sqrt(jnp.sum(jnp.square(x / scale)))


def _root(module: nn.Module) -> str:
  """ "ViT" of any module inside of one."""
  while isinstance(module.parent, nn.Module):
    module = module.parent
  return type(module).__name__


def norms(call: Callable, *args: Any) -> tuple[Any, list[tuple[str, jax.Array]]]:
  """Calls a function and notes what each Flax module inside of it gives; traceable.

  Args:
    call: of `args`. A module inside of a loop of jax is seen by that loop alone: not for such.

  Returns:
    (what it gives, [(module, float32 [], the largest norm of its outputs)] in the order in which
    they were done). "ViT/blocks_0/attn"; of one that is called again "ViT/blocks_0/attn (2)".
  """
  found: list[tuple[str, jax.Array]] = []

  def watched(following, args, kwargs, context):
    out = following(*args, **kwargs)
    arrays = [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array) and x.size]
    floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    if context.method_name == "__call__" and floats:
      name = "/".join([_root(context.module), *context.module.path])
      times = sum(known.split(" (")[0] == name for known, _ in found) + 1
      largest = jnp.max(jnp.stack([norm(x) for x in floats]))
      found.append((name if times == 1 else f"{name} ({times})", largest))
    return out

  with nn.intercept_methods(watched):
    out = call(*args)
  return out, found
