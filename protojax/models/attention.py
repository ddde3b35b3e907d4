"""Self-attention over all tokens of an image, and who computes it.

"xla" writes the logits [N, heads, T, T] in float32 to memory and reads them back, forwards and
backwards; the other two keep them on the chip and compute them again in the backward pass.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")
TILE = 8  # tokens that share one of a TPU's memory
_TOKENS = 256  # of the images that one call of the kernel holds


def on_tpu() -> bool:
  """Whether what is traced is for TPUs: the devices of the mesh in use, else the default ones."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind.startswith("TPU") if device else jax.default_backend() == "tpu"


def choose(name: str, dtype: jnp.dtype) -> str:
  """Who "auto" is, here and now: "pallas" on TPUs in bfloat16, else "xla"; other names stay.

  Without a mesh (`jax.set_mesh`) nobody says how several devices share a kernel's work: "xla".
  """
  if name != "auto":
    return name
  divisible = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
  return "pallas" if dtype == jnp.bfloat16 and on_tpu() and divisible else "xla"


def attend(qkv: jax.Array, num_heads: int, implementation: str, tokens: int) -> jax.Array:
  """softmax(q k / sqrt(head width)) v; logits and softmax are float32 whatever the inputs.

  Args:
    qkv: [N, T, 3 D]: queries of all heads, then keys, then values.
    num_heads: heads that share D.
    implementation: "xla", "cudnn" or "pallas".
    tokens: how many of T there are; the last T - tokens only fill up a tile. Fewer than T with
      "pallas" only.

  Returns:
    [N, T, D] in the dtype of `qkv`.
  """
  n, length, width = qkv.shape
  if implementation == "pallas":
    return _kernel(qkv, num_heads, tokens)
  qkv = qkv.reshape(n, length, 3, num_heads, width // (3 * num_heads))
  query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
  x = jax.nn.dot_product_attention(query, key, value, implementation=implementation)
  return x.reshape(n, length, width // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _kernel(qkv, num_heads, tokens):
  out = jax.ShapeDtypeStruct((*qkv.shape[:2], qkv.shape[2] // 3), qkv.dtype)
  return _over_images(_forward, out, num_heads, tokens, qkv)


def _kernel_forward(qkv, num_heads, tokens):
  return _kernel(qkv, num_heads, tokens), qkv


def _kernel_backward(num_heads, tokens, qkv, gradient):
  return (_over_images(_backward, qkv, num_heads, tokens, qkv, gradient),)


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _over_images(body, out, num_heads, tokens, *inputs):
  """Calls a kernel for a few images at a time, on every device for its own."""
  interpret = not on_tpu()

  def on_device(*inputs):
    n, length = inputs[0].shape[:2]
    images = next(k for k in range(max(1, _TOKENS // length), 0, -1) if n % k == 0)

    def block(width):
      return pl.BlockSpec((images, length, width), lambda i: (i, 0, 0))

    return pl.pallas_call(
      functools.partial(body, num_heads=num_heads, tokens=tokens),
      grid=(n // images,),
      in_specs=[block(x.shape[-1]) for x in inputs],
      out_specs=block(out.shape[-1]),
      out_shape=jax.ShapeDtypeStruct((n, length, out.shape[-1]), out.dtype),
      interpret=interpret,
    )(*inputs)

  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  axes = [name for name, kind in kinds if kind == AxisType.Auto]
  if math.prod(mesh.shape[name] for name in axes) == 1:
    return on_device(*inputs)
  # The compiler cannot divide a kernel: over as many axes as the images allow, the rest repeat it.
  along = list(axes)
  while inputs[0].shape[0] % math.prod(mesh.shape[name] for name in along):
    along.pop()
  rows = PartitionSpec(tuple(along))
  divided = jax.shard_map(
    on_device, in_specs=(rows,) * len(inputs), out_specs=rows, axis_names=set(axes), check_vma=False
  )
  return divided(*inputs)


def _heads(x, num_heads: int, parts: int):
  """Each part's [n, T, D / heads] of every head of a block [n, T, parts D]."""
  width = x.shape[-1] // (parts * num_heads)
  for head in range(num_heads):
    starts = [(part * num_heads + head) * width for part in range(parts)]
    yield [x[:, :, start : start + width] for start in starts]


def _product(formula: str, a, b):
  return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _weights(query, key, tokens: int):
  """Softmax over the keys that are tokens, [n, T, T] float32."""
  logits = _product("nqd,nkd->nqk", query, key) * query.shape[-1] ** -0.5
  if tokens < key.shape[1]:
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    logits = jnp.where(index < tokens, logits, -1e30)
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def _forward(qkv_ref, out_ref, *, num_heads, tokens):
  """[n, T, 3 D] -> [n, T, D]."""
  outputs = []
  for query, key, value in _heads(qkv_ref[...], num_heads, 3):
    weights = _weights(query, key, tokens).astype(value.dtype)
    outputs.append(_product("nqk,nkd->nqd", weights, value))
  out_ref[...] = jnp.concatenate(outputs, axis=-1).astype(out_ref.dtype)


def _backward(qkv_ref, gradient_ref, out_ref, *, num_heads, tokens):
  """([n, T, 3 D], gradient of the output [n, T, D]) -> gradient [n, T, 3 D]."""
  of_heads = zip(
    _heads(qkv_ref[...], num_heads, 3), _heads(gradient_ref[...], num_heads, 1), strict=True
  )
  gradients = []
  for (query, key, value), (gradient,) in of_heads:
    weights = _weights(query, key, tokens)
    of_value = _product("nqk,nqd->nkd", weights.astype(value.dtype), gradient)
    of_weights = _product("nqd,nkd->nqk", gradient, value)
    total = (weights * of_weights).sum(axis=-1, keepdims=True)
    of_logits = (weights * (of_weights - total) * query.shape[-1] ** -0.5).astype(query.dtype)
    of_query = _product("nqk,nkd->nqd", of_logits, key)
    of_key = _product("nqk,nqd->nkd", of_logits, query)
    gradients.append((of_query, of_key, of_value))
  parts = [jnp.concatenate(part, axis=-1) for part in zip(*gradients, strict=True)]
  out_ref[...] = jnp.concatenate(parts, axis=-1).astype(out_ref.dtype)
