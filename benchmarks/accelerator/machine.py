"""Whether the machine does what the list asks of it, in seconds: before anything long begins.

A product and a convolution in bfloat16 against float64 of NumPy, the memory, and the first images
of CIFAR-10.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator import records
from protojax import errors
from protojax.data import sources


def run(options: dict, *, folder: pathlib.Path, data_dir: str | None, rehearse: bool) -> dict:
  """{"backend", "device", "memory_bytes", "images"}: what JAX has found.

  Raises:
    UserError: if there is a card and JAX does not use it, or it computes something else.
  """
  del options, folder
  device = jax.devices()[0]
  card = records.machine()["card"]
  if card and device.platform == "cpu" and not rehearse:
    raise errors.UserError(f"JAX runs on the CPU beside {card}: its CUDA plugin does not load")
  _compute()
  return {
    "backend": device.platform,
    "device": device.device_kind,
    "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    "images": _images(data_dir),
  }


def _images(data_dir: str | None) -> int | str:
  """How many of CIFAR-10's first eight can be read, or why none can: speed needs no images."""
  try:
    source = sources.build("cifar10", split="train", data_dir=data_dir)
    return sum(not isinstance(record, sources.CorruptImage) for record in source.read(range(8)))
  except Exception as error:
    return f"{type(error).__name__}: {error}"


def _compute() -> None:
  rng = np.random.default_rng(0)
  x, kernel = rng.standard_normal((2, 16, 16, 8)), rng.standard_normal((3, 3, 8, 8))
  low, weights = (jnp.asarray(a, jnp.bfloat16) for a in (x, kernel))
  layout = ("NHWC", "HWIO", "NHWC")
  convolve = jax.jit(
    lambda a, b: jax.lax.conv_general_dilated(a, b, (1, 1), "VALID", dimension_numbers=layout)
  )
  windows = np.lib.stride_tricks.sliding_window_view(np.float64(low), (3, 3), axis=(1, 2))
  expected = np.einsum("nhwcij,ijco->nhwo", windows, np.float64(weights))
  products = jax.jit(jnp.matmul)(low.reshape(-1, 8), weights[0, 0])
  for what, found, wanted in (
    ("a convolution", convolve(low, weights), expected),
    ("a matrix product", products, np.float64(low).reshape(-1, 8) @ np.float64(weights)[0, 0]),
  ):
    error = np.abs(np.float64(found) - wanted).max() / np.abs(wanted).max()
    if not error < 0.01:  # bfloat16 rounds the result to .004
      raise errors.UserError(f"{what} in bfloat16 is wrong by {error:.2g} of the largest number")
