"""A trained encoder and what it makes of images; `loading` reads one."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from protojax import errors, sizes, trees
from protojax.data import augment, sources
from protojax.metrics import measures
from protojax.models import encoder as encoders
from protojax.models import features as backbone_layers
from protojax.prototypes import scoring
from protojax.training import encode, sharding

PyTree = Any
_BATCH = 256  # images at a time, over all devices


class Trained(NamedTuple):
  """An encoder with everything that using it needs; see `loading.load`.

      model = protojax.load("runs/gmm")
      model.features(images)  # float32 [N, F]
      model.patches(images)  # float32 [N, h, w, F]
      model.embeddings(images)["prototypes"]  # float32 [N, D]
      model.codes(images)["prototypes"]  # int32 [N]
      model.prototypes["prototypes"]  # float32 [K, D]

  Attributes:
    path: as given.
    kind: "run" or "encoder".
    config: resolved; of exported weights the defaults with model, head, method and image of theirs.
    step: updates done; None where nobody wrote it down.
    weights: "teacher" or "encoder", whose weights these are.
    encoder: modules of the backbone and the head.
    params, batch_stats: {"backbone": ..., "head": ...}; exported weights may lack the head.
    prototypes: {set: float32 [K, D]} unit rows; {} for methods without, and for exported weights
      without prototypes.safetensors. Rows of converted weights may have had other lengths, by which
      `codes` go.
    method, variables: of the run (`methods.base`); of exported weights what takes their place in
      `codes` and `embeddings`, None without prototypes.
    mesh: all devices along "data".
    initialised: tensors that were missing when the weights were converted and are freshly
      initialised, by the names of that file.
  """

  path: str
  kind: str
  config: ml_collections.ConfigDict
  step: int | None
  weights: str
  encoder: encoders.Encoder
  params: PyTree
  batch_stats: PyTree
  prototypes: dict[str, np.ndarray]
  method: Any
  variables: Any
  mesh: jax.sharding.Mesh
  initialised: tuple[str, ...] = ()

  def __repr__(self) -> str:
    """One line: what it is, not the numbers in it."""
    sets = {name: f"{x.shape[0]:,} x {x.shape[1]}" for name, x in self.prototypes.items()}
    step = "" if self.step is None else f"step {self.step}, "
    return (
      f"Trained({self.path!r}, {self.config.model.name}, weights of the {self.weights}, "
      f"{step}prototypes {sets or 'none'})"
    )

  def preprocess(self, images: jax.Array) -> jax.Array:
    """The evaluation transform, for JAX code of your own; may be traced.

    Args:
      images: uint8 [B, H, W, 3], 0 to 255.

    Returns:
      float32 [B, S, S, 3] normalised, what `encoder` and its parameters take. `features` first
      shrinks images that are larger than config.data.image_size a side, so of those its own differ
      from what `encoder` makes of these.
    """
    size = jnp.array(images.shape[1:3], jnp.int32)
    return _transform(self.config)(images, jnp.broadcast_to(size, (images.shape[0], 2)))

  def features(self, images: Any, *, layer: str = "last") -> np.ndarray:
    """Features of images in evaluation mode, those that k-NN and linear probes are measured on.

    Args:
      images: uint8 [N, H, W, 3], 0 to 255, of any size: a NumPy or JAX array, or one that speaks
        DLPack (PyTorch's, TensorFlow's). They are resized, cropped and normalised as in training's
        evaluations, so they must not be normalised before. Of a model of other `data.channels`
        they have as many.
      layer: of `layers(self)`; or one block or stage, "block3" of a ViT, "stage3" of a ResNet:
        see `models.features.features`.

    Returns:
      float32 [N, F].

    Raises:
      UserError: for images of another type or shape, or an unknown layer.
    """
    return _of_images(self, images, "features", (layer,))[layer]

  def patches(self, images: Any, *, layer: str = "last") -> np.ndarray:
    """Patch tokens of images, or the maps of a ResNet, for dense tasks.

    Args:
      images: as for `features`.
      layer: "last", or one block or stage: see `models.features.patches`.

    Returns:
      float32 [N, h, w, F], row by row from the top left of the centre crop.

    Raises:
      UserError: for images of another type or shape, or an unknown layer.
    """
    return _of_images(self, images, "patches", (layer,))[layer]

  def embeddings(self, images: Any) -> dict[str, np.ndarray]:
    """What is compared with the prototypes: the head's output, in the prototypes' coordinates.

    Args:
      images: as for `features`.

    Returns:
      {set: float32 [N, D]}, any norm.

    Raises:
      UserError: for images of another type or shape, or where there are no prototypes.
    """
    return _of_images(self, images, "embeddings")

  def codes(self, images: Any) -> dict[str, np.ndarray]:
    """The prototype of each image, the one with the largest score.

    Args:
      images: as for `features`.

    Returns:
      {set: int32 [N]}, indices into `self.prototypes[set]`.

    Raises:
      UserError: for images of another type or shape, or where there are no prototypes.
    """
    return _of_images(self, images, "codes")


def not_finite(model: Trained) -> str:
  """Which weights hold NaN or infinity, and what to take instead, in words; "" if none does."""
  found = trees.not_finite(trees.flat({"params": model.params, "batch_stats": model.batch_stats}))
  if not found:
    return ""
  if model.kind == "run":
    return f"{found}: the encoder has diverged, take an earlier step=NUMBER"
  return f"{found}: export or convert an earlier or an undamaged checkpoint"


def layers(model: Trained) -> tuple[str, ...]:
  """Names of the layers that a linear probe compares; `encoded` gives single ones beside them."""
  return backbone_layers.available(model.encoder)


_OF_LAYERS = {"features": backbone_layers.features, "patches": backbone_layers.patches}


class _Transform(NamedTuple):
  """The evaluation transform of a model, storage images -> normalised [B, H, W, C]; hashable."""

  size: sizes.Size
  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop: float

  def __call__(self, images: jax.Array, original: jax.Array) -> jax.Array:
    return augment.evaluate(
      images, self.size, self.mean, self.std, crop=self.crop, original=original
    )


def _transform(config: ml_collections.ConfigDict) -> _Transform:
  views = config.augment
  return _Transform(views.global_size, tuple(views.mean), tuple(views.std), config.probe.crop)


@functools.lru_cache(maxsize=32)
def _forward(
  encoder: encoders.Encoder,
  method: Any,
  transform: _Transform,
  parts: tuple[str, ...],
  layers: tuple[str, ...],
  mesh: jax.sharding.Mesh,
) -> Callable:
  """Compiled (params, batch_stats, variables, batch) -> what `encoded` returns of it, replicated.

  Kept, so that calls which differ in their images only are compiled once.
  """

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def forward(
    params: PyTree, batch_stats: PyTree, variables: Any, batch: dict[str, jax.Array]
  ) -> dict[str, Any]:
    images = transform(batch["image"], batch["size"])
    out: dict[str, Any] = {"label": batch["label"], "index": batch["index"]}
    for part, of_layers in _OF_LAYERS.items():
      if part in parts:
        out[part] = of_layers(encoder, params, batch_stats, images, layers)
    if "codes" in parts:
      out["codes"] = scoring.codes(method, variables, images)
    if "embeddings" in parts:
      out["embeddings"] = method.embeddings(variables, images)
    return out

  return forward


def chunks(
  model: Trained,
  source: sources.Source,
  *,
  parts: Sequence[str] = ("features",),
  layers: Sequence[str] = ("last",),
  limit: int = 0,
  batch_size: int = _BATCH,
  num_workers: int | None = None,
) -> Iterator[dict[str, Any]]:
  """What the encoder makes of every image that can be read, in evaluation mode, batch by batch.

  Args:
    model: from `loading.load`.
    source: from `data.build`.
    parts: any of "features" and "patches"; and, with prototypes, "codes" and "embeddings".
    layers: of `layers(model)`, or single ones, see `models.features`; of patches "last" or single
      ones.
    limit: at most so many images, evenly spread; 0 takes all.
    batch_size: images at a time, over all devices.
    num_workers: processes that decode; 0 uses threads, None takes `data.num_workers` of the run.

  Yields:
    Host arrays: "features" {layer: float32 [n, F]}, "patches" {layer: float32 [n, h, w, F]},
    "codes" {set: int32 [n], argmax of the scores}, "embeddings" {set: float32 [n, D], what is
    compared with the prototypes}; always "label" int32 [n], -1 without, and "index" int32 [n],
    number in the source.

  Raises:
    UserError: for an unknown layer, or codes of something without prototypes.
  """
  if {"codes", "embeddings"} & set(parts) and not model.prototypes:
    raise errors.UserError(
      f"{model.path} has no prototypes: some methods have none, and exported weights only with the "
      "head and prototypes.safetensors beside them (older versions wrote none): give the workdir "
      "of a run that has some"
    )
  forward = _forward(
    model.encoder,
    model.method,
    _transform(model.config),
    tuple(parts),
    tuple(layers),
    model.mesh,
  )
  return encode.chunks(
    functools.partial(forward, model.params, model.batch_stats, model.variables),
    source,
    mesh=model.mesh,
    batch_size=batch_size,
    image_size=model.config.data.image_size,
    num_workers=model.config.data.num_workers if num_workers is None else num_workers,
    limit=limit,
  )


def encoded(model: Trained, source: sources.Source, **options: Any) -> dict[str, Any]:
  """The results of `chunks`, which takes the same arguments, in one: host arrays [N, ...]."""
  parts = list(chunks(model, source, **options))
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _of_images(
  model: Trained, images: Any, part: str, layers: tuple[str, ...] = ("last",)
) -> dict[str, np.ndarray]:
  """`encoded(...)[part]` of images in memory, uint8 [N, H, W, C]."""
  channels = model.config.data.channels
  images = np.asarray(measures.as_array(images))
  right = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == channels
  if not right or not images.size:
    first = images.ndim == 4 and images.shape[1] == channels
    hint = "move the channels last" if first else "give those"
    raise errors.UserError(
      f"images are {images.dtype} {list(images.shape)}: a model takes uint8 [N, H, W, {channels}], "
      f"0 to 255 and not normalised; {hint}"
    )
  read = functools.partial(sources.read_items, images, np.full(len(images), -1))
  source = sources.Source("images", np.arange(len(images)), read)
  source.channels = channels
  # A power of two, so that batches of any size compile few programs.
  size = min(_BATCH, 1 << (len(images) - 1).bit_length())
  return encoded(model, source, parts=(part,), layers=layers, batch_size=size, num_workers=0)[part]


def attention(model: Trained, images: np.ndarray) -> np.ndarray:
  """Attention of the class token over the patches, last block of a ViT.

  Args:
    model: from `loading.load`.
    images: uint8 [N, S, S, C] of the storage size.

  Returns:
    float32 [N, heads, h, w]; see `models.features.attention`.

  Raises:
    UserError: for an encoder without attention.
  """
  size = np.full((len(images), 2), images.shape[1], np.int32)
  transform = _transform(model.config)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(model.mesh))
  def forward(params: PyTree, image: jax.Array) -> jax.Array:
    return backbone_layers.attention(model.encoder, params, transform(image, jnp.asarray(size)))

  return np.asarray(forward(model.params, images))


def source(
  model: Trained,
  split: str | None,
  *,
  name: str | None = None,
  data_dir: str | None = None,
  value_range: sources.Range | None = None,
) -> sources.Source:
  """Images of the run's labelled source, or of another; says the range of deep ones, if any.

  Args:
    model: from `loading.load`.
    split: "train" and "test" mean `probe.train_split` and `probe.test_split` of the run's own
      source; anything else, and every split of another source, is taken as it is.
    name, data_dir: of the other source; see `data.build`.
    value_range: of images of more than 8 bits, where the model has seen none; see `data.build`.

  Raises:
    UserError: if there is no such data.
  """
  probe, data = model.config.probe, model.config.data
  if name is None and model.kind == "encoder":
    raise errors.UserError(
      f"{model.path} does not say which images to look at: name a data set, data=NAME"
    )
  if name is None:
    if split is not None:
      split = {"train": probe.train_split, "test": probe.test_split}.get(split, split)
    name, own = probe.name or data.name, probe.data_dir or data.data_dir
    data_dir = data_dir or own
  found = sources.build(
    name,
    split=split,
    data_dir=data_dir,
    channels=data.channels,
    value_range=data.value_range or value_range,
  )
  if found.value_range is not None:
    whose = "as in its training" if data.value_range else "as given"
    if not (data.value_range or value_range):
      whose = "as measured on these, since the weights do not say how it was in their training"
    shown = sources.range_words(found.value_range)
    logging.info("%s: of more than 8 bits %s become 0 to 255, %s", found.name, shown, whose)
  return found
