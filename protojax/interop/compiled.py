"""An exported encoder -> a function that runs without protojax: jax.export or ONNX."""

import logging
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from protojax import errors, trees
from protojax.interop import settings
from protojax.models import encoder as encoders

PLATFORMS = ("cpu", "cuda", "tpu")
_TOLERANCE = 1e-3  # of the largest feature, between ONNX Runtime and JAX


def function(tensors: dict[str, np.ndarray], info: dict) -> Callable[[jax.Array], jax.Array]:
  """The backbone in evaluation mode and float32, its weights inside.

  Args:
    tensors, info: from `export.read`.

  Returns:
    images float32 [B, H, W, C], normalised -> features float32 [B, F].
  """
  encoder = settings.encoder_of(info)
  tree = trees.nested(tensors)
  tree["params"]["backbone"].pop("mask_token", None)
  stats = tree.get("batch_stats", {})
  return lambda images: encoders.features(encoder, tree["params"], stats, images)


def serialized(features, image: tuple[int, int, int]) -> bytes:
  """`features` of images [H, W, C] = `image`, any number of them, on CPU, CUDA and TPU.

  `jax.export.deserialize` reads it.

  JAX promises to read it for six months, so it is for serving, not for keeping.
  """
  (batch,) = jax.export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((batch, *image), jnp.float32)
  return bytes(jax.export.export(jax.jit(features), platforms=PLATFORMS)(images).serialize())


def write_onnx(path: str | os.PathLike, features, image: tuple[int, int, int]) -> None:
  """Writes `features` as ONNX, checked with ONNX Runtime against JAX on random images.

  Args:
    path: of the new file; its input is "images" [B, H, W, C], its output "features" [B, F].
    features: from `function`.
    image: H, W, C.

  Raises:
    UserError: if jax2onnx or ONNX Runtime is not installed, or what they make of the encoder is
      not what JAX makes of it.
  """
  try:
    # It logs a traceback for each of its plugins that lacks a package.
    logging.getLogger("jax2onnx").setLevel(logging.CRITICAL)
    import jax2onnx
    import onnxruntime
  except ImportError as error:
    # jax2onnx pins an old orbax, which it does not need for this.
    raise errors.UserError(
      f"format=onnx needs {error.name}, which is not installed: pip install 'protojax[onnx]' and "
      "then pip install --no-deps jax2onnx==0.17.1"
    ) from None
  path = pathlib.Path(path)
  try:
    jax2onnx.to_onnx(
      features,
      [("B", *image)],
      return_mode="file",
      output_path=str(path),
      input_names=["images"],
      output_names=["features"],
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(3, *image)).astype(np.float32)
    (there,) = session.run(None, {"images": images})
  except Exception as error:  # of either library: they have no class of their own for it
    raise errors.UserError(
      f"jax2onnx cannot export this encoder ({' '.join(str(error).split())[:200]}): use "
      "format=timm and torch.onnx, or format=jax"
    ) from None
  here = np.asarray(jax.jit(features)(images))
  error = np.abs(there - here).max() / np.abs(here).max()
  if not error < _TOLERANCE:
    raise errors.UserError(
      f"what jax2onnx made of this encoder differs by {error:.1e} from JAX (jax2onnx 0.17 leaves "
      "out the padding of a ResNet's max pool): use format=timm and torch.onnx, or format=jax"
    )
