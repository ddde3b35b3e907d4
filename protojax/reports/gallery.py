"""Pictures of what a run has learned: its prototypes' images, its attention, its training views."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from PIL import Image

from protojax import errors, losses, pretrained, sizes
from protojax.data import augment, decoding, pipeline, sources

LIMIT = 2000  # images among which those nearest to a prototype are sought after training
_SIDE = 96  # pixels of the longer side of a stored picture, at most
_TINY = 48
_CARDS, _NEAREST = 6, 8  # prototypes of a kind, images of each
_IMAGES = 6  # rows of attention maps
_AUGMENTED = 4  # rows of augmented views
_MOST_VIEWS, _HEADS = 8, 12


class Picture(NamedTuple):
  """An image of the page.

  Attributes:
    uri: data URI.
    text: what it shows, in words.
    tiny: so small that its pixels are shown as squares.
  """

  uri: str
  text: str
  tiny: bool


class Card(NamedTuple):
  """A prototype and the images nearest to it.

  Attributes:
    number: row of the prototype matrix.
    count: images of the bank that have it as their code.
    majority, purity: the most frequent class of those and its share; "" and NaN without labels.
    images: the nearest first.
  """

  number: int
  count: int
  majority: str
  purity: float
  images: tuple[Picture, ...]


class Gallery(NamedTuple):
  """Prototypes by how much they are used, {"Most used": cards, ...}, and how they were found."""

  kinds: dict[str, tuple[Card, ...]]
  how: str


class Pictures(NamedTuple):
  """All pictures of a run; a sentence in the place of those that cannot be had.

  Attributes:
    prototypes: of one set, with the images nearest to each.
    attention: of each image the image, the mean over heads, and the heads.
    views: of each image the image, then its views.
  """

  prototypes: Gallery | str
  attention: tuple[tuple[Picture, ...], ...] | str
  views: tuple[tuple[Picture, ...], ...] | str


def collect(
  model: pretrained.Trained | errors.UserError,
  config,
  *,
  bank,
  train,
  arrays: dict[str, np.ndarray],
  limit: int = LIMIT,
) -> Pictures:
  """Makes the pictures of a run. Every process calls it; the passes over images are collective.

  Args:
    model: from `loading.load` or `loading.of_state`. This and the sources may also be the
      UserError that says why there is none.
    config: resolved.
    bank: source of the images that the evaluation trains on.
    train: source of the pretraining.
    arrays: of `evaluation.Snapshot.final`: usage, majority and purity are counted over the bank.
    limit: evenly spread images of the bank among which the nearest are sought; 0 takes all.
  """
  return Pictures(
    _or_sentence(_prototypes, model, bank, arrays, limit),
    _or_sentence(_attention, model, bank),
    _or_sentence(_views, config, train),
  )


def _or_sentence(part, *arguments):
  """What `part` returns; as a sentence the UserError that it raises or that is an argument."""
  try:
    for argument in arguments:
      if isinstance(argument, errors.UserError):
        raise argument
    return part(*arguments)
  except errors.UserError as error:
    return f"{error}."


def _prototypes(model, bank, arrays, limit) -> Gallery:
  if not model.prototypes:
    raise errors.UserError(f"{model.config.method.name} has no prototypes")
  name = "prototypes" if "prototypes" in model.prototypes else next(iter(model.prototypes))
  matrix, usage = model.prototypes[name], arrays.get("usage", ())
  if len(usage) != len(matrix):
    raise errors.UserError(
      "how often each prototype is used is not known before the run ends (eval/final/arrays.npz)"
    )
  chosen = _chosen(usage)
  numbers = [k for kind in chosen.values() for k in kind]
  encoded = pretrained.encoded(model, bank, parts=("embeddings",), limit=limit)
  embeddings = np.asarray(losses.l2_normalize(encoded["embeddings"][name]))
  cosine = np.asarray(losses.l2_normalize(matrix[numbers])) @ embeddings.T  # [P, N]
  nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :_NEAREST]
  images = _read(bank, np.unique(encoded["index"][nearest]), _small)
  cards = {}
  for number, order, cosines in zip(numbers, nearest, cosine, strict=True):
    pictures = []
    for row in order:
      image, label = images[int(encoded["index"][row])]
      kind = f"{bank.class_names[label]}, " if label >= 0 else ""
      pictures.append(_picture(image, f"{kind}cosine {cosines[row]:.3f}"))
    majority, purity = "", float("nan")
    if "purity" in arrays and usage[number]:
      majority = bank.class_names[arrays["majority"][number]]
      purity = float(arrays["purity"][number])
    cards[number] = Card(number, int(usage[number]), majority, purity, tuple(pictures))
  count = f"{len(encoded['index']):,} evenly spread images of {bank.name} ({len(bank):,} images)"
  return Gallery(
    {kind: tuple(cards[k] for k in group) for kind, group in chosen.items()},
    f"Prototypes of the set {name!r}, each with the nearest by cosine of {count}. How many images "
    "have a prototype as their code"
    + (", and the share of their most frequent class, are" if "purity" in arrays else " is")
    + " from eval/final/arrays.npz.",
  )


def _chosen(usage: np.ndarray) -> dict[str, list[int]]:
  """Numbers of the most used, the median and the least used prototypes; none twice."""
  order = np.argsort(-usage, kind="stable")
  used = int(np.sum(usage > 0))
  middle = max(0, used // 2 - _CARDS // 2)
  parts = {
    "Most used": order[: min(_CARDS, used)],
    "Median of the used": order[middle : min(middle + _CARDS, used)],
    f"Least used ({len(usage) - used:,} of {len(usage):,} dead)": order[::-1][:_CARDS],
  }
  taken, chosen = set(), {}
  for kind, numbers in parts.items():
    chosen[kind] = [int(k) for k in numbers if int(k) not in taken]
    taken |= set(chosen[kind])
  return {kind: numbers for kind, numbers in chosen.items() if numbers}


def _attention(model, bank) -> tuple[tuple[Picture, ...], ...]:
  config = model.config
  if not config.model.name.startswith("vit"):
    raise errors.UserError(f"{config.model.name} has no attention")
  wanted = np.unique(np.arange(_IMAGES) * len(bank) // _IMAGES)
  side = config.data.image_size
  found = _read(bank, wanted, lambda image: decoding.resized(image, side, side))
  if not found:
    raise errors.UserError(f"the images of {bank.name} cannot be read")
  images = np.stack([image for image, _ in found.values()])
  attention = pretrained.attention(model, images)  # [N, heads, h, w]
  # The maps lie on what the encoder was given: the centre crop, not the full image.
  size, channels = config.augment.global_size, images.shape[-1]
  images = augment.evaluate(images, size, (0,) * channels, (1,) * channels, crop=config.probe.crop)
  rows = []
  for (index, (_, label)), image, heads in zip(found.items(), images, attention, strict=True):
    image = _pixels(image)
    maps = {"mean of heads": heads.mean(axis=0)}
    maps |= {f"head {i + 1}": weights for i, weights in enumerate(heads[:_HEADS])}
    name = bank.class_names[label] if label >= 0 else bank.describe(index)
    rows.append(
      (
        _picture(image, name),
        *(_picture(_heat(image, w), f"{title}, up to {w.max():.2f}") for title, w in maps.items()),
      )
    )
  return tuple(rows)


def _views(config, train) -> tuple[tuple[Picture, ...], ...]:
  """The first images of the first batch of the run, under the very crops and colours of step 0."""
  batch_size = config.batch_size
  # The part of the first of so many processes that one has few images to read.
  own = next(n for n in range(min(_AUGMENTED, batch_size), batch_size + 1) if batch_size % n == 0)
  stream = pipeline.batches(
    train,
    seed=config.seed,
    step=0,
    batch_size=batch_size,
    image_size=config.data.image_size,
    process_count=batch_size // own,
  )
  try:
    batch = {key: value[:_AUGMENTED] for key, value in next(stream).items()}
  finally:
    stream.close()
  # As train_step.init_state and train_step.train_step derive it at step 0.
  _, _, key = jax.random.split(jax.random.key(config.seed), 3)
  key, _ = jax.random.split(jax.random.fold_in(key, 0))
  views = jax.device_get(jax.jit(augment.make(config.augment))(key, batch))
  mean, std = np.array(config.augment.mean), np.array(config.augment.std)
  rows = []
  for i, square in enumerate(batch["image"]):
    image = _as_it_was(square, batch["size"][i].tolist())
    row = [_picture(image, f"{train.name}, image {batch['index'][i]}")]
    for kind in views:  # "global", "local"
      for j, view in enumerate(views[kind][i, :_MOST_VIEWS]):
        shape = sizes.checked(kind, view.shape[:2])
        text = f"{kind} view {j + 1}, {sizes.text(shape)} px"
        row.append(_picture(_pixels(view * std + mean), text))
    rows.append(tuple(row))
  return tuple(rows)


def _as_it_was(square: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """The image of `size` that `decoding.store` put into a square, in its own shape."""
  height, width = decoding.stored_shape(size, len(square))
  scale = max(height, width) / max(size)
  shape = (max(1, round(side * scale)) for side in size)
  return decoding.resized(square[:height, :width], *shape)


def _read(source, indices: Sequence[int], prepare) -> dict[int, tuple[np.ndarray, int]]:
  """{index: (prepare(uint8 [H, W, 3]), label)} of the records that can be read."""
  records = zip(indices, source.read(indices), strict=True)
  return {
    int(index): (prepare(record["image"]), record["label"])
    for index, record in records
    if not isinstance(record, sources.CorruptImage)
  }


def _small(image: np.ndarray) -> np.ndarray:
  """uint8 [H, W, C] -> [h, w, 3] with no side longer than `_SIDE`."""
  small = Image.fromarray(_visible(image))
  small.thumbnail((_SIDE, _SIDE))
  return np.asarray(small)


def _visible(image: np.ndarray) -> np.ndarray:
  """[H, W, C] -> [H, W, 3]: the first three channels, or the first as grey."""
  return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=-1)


def _pixels(image) -> np.ndarray:
  """[H, W, C] from 0 to 1 -> uint8."""
  return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _picture(image: np.ndarray, text: str) -> Picture:
  """uint8 [H, W, C], made smaller where a side is longer than `_SIDE`."""
  file = io.BytesIO()
  Image.fromarray(_small(image)).save(file, "webp", quality=88, method=4)
  data = base64.b64encode(file.getvalue()).decode()
  return Picture(f"data:image/webp;base64,{data}", text, max(image.shape[:2]) <= _TINY)


def _heat(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """A map [h, w] over a grey image: uint8 [H, W, 3], the largest weight brightest."""
  scaled = Image.fromarray((255 * weights / max(weights.max(), 1e-12)).astype(np.uint8))
  height, width = (round(_SIDE * side / max(image.shape[:2])) for side in image.shape[:2])
  size = (width, height)
  heat = np.asarray(scaled.resize(size, Image.Resampling.BICUBIC))
  colours = 255 * matplotlib.colormaps["viridis"](heat)[..., :3]
  grey = Image.fromarray(_visible(image)).convert("L").resize(size, Image.Resampling.BICUBIC)
  return (0.65 * colours + 0.35 * np.asarray(grey)[..., None]).astype(np.uint8)
