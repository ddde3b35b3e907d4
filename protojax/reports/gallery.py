"""Pictures of what a run has learned: its prototypes' images, its attention, the views it saw."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from PIL import Image

from protojax import errors, trained
from protojax.data import augment, pipeline
from protojax.data import source as sources

LIMIT = 2000  # images looked at after training
_SIDE = 96  # pixels of the longer side of a stored picture, at most
_TINY = 48
_CARDS, _NEAREST = 6, 8  # prototypes of a kind, images of each
_IMAGES = 6  # rows of attention maps
_VIEWED = 4  # rows of augmentation samples
_LOCALS, _HEADS = 8, 12  # at most shown


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
    count: images of the whole bank that have it as their code.
    majority, purity: the most frequent class of those and its share; "" and NaN without labels.
    images: the nearest first.
  """

  number: int
  count: int
  majority: str
  purity: float
  images: tuple[Picture, ...]


class Looks(NamedTuple):
  """What the page shows in pictures; a sentence in the place of what cannot be shown.

  Attributes:
    prototypes: {"Most used": cards, ...}.
    seen: how the nearest images were found, one sentence.
    attention: of each image the image, the mean over heads, and the heads.
    views: of each image the image, then its views.
  """

  prototypes: dict[str, tuple[Card, ...]] | str
  seen: str
  attention: tuple[tuple[Picture, ...], ...] | str
  views: tuple[tuple[Picture, ...], ...] | str


def look(model, *, bank, train, arrays: dict[str, np.ndarray], limit: int = LIMIT) -> Looks:
  """Looks at a trained run. Every process calls it; the passes over images are collective.

  Args:
    model: from `trained.load` or `trained.of_state`.
    bank: source of the evaluation, or the UserError that says why there is none.
    train: source of the pretraining, or the UserError.
    arrays: of `snapshot.Snapshot.final`: usage, majority and purity are counted over the bank.
    limit: evenly spread images of the bank among which the nearest are sought; 0 takes all.
  """
  found, seen = _said(_prototypes, model, bank, arrays, limit), ""
  if not isinstance(found, str):
    found, seen = found
  return Looks(found, seen, _said(_attention, model, bank), _said(_views, model.config, train))


def _said(part, *arguments):
  """What `part` returns, or its UserError in words."""
  try:
    return part(*_raised(arguments))
  except errors.UserError as error:
    return f"{error}."


def _raised(arguments):
  for argument in arguments:
    if isinstance(argument, errors.UserError):
      raise argument
  return arguments


def _prototypes(model, bank, arrays, limit):
  """({kind: cards}, how they were found)."""
  if not model.prototypes:
    raise errors.UserError(f"{model.config.method.name} has no prototypes")
  name = "prototypes" if "prototypes" in model.prototypes else next(iter(model.prototypes))
  matrix = model.prototypes[name]
  if len(arrays.get("usage", ())) != len(matrix):
    raise errors.UserError(
      "how often each prototype is used is not known before the run ends (eval/final/arrays.npz)"
    )
  chosen = _chosen(arrays["usage"])
  seen = trained.rows(model, bank, parts=("embeddings",), limit=limit)
  rows = [k for numbers in chosen.values() for k in numbers]
  cosine = _unit(matrix[rows]) @ _unit(seen["embeddings"][name]).T  # [P, N]
  nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :_NEAREST]
  images = _read(bank, np.unique(seen["index"][nearest]))
  cards = {}
  for i, number in enumerate(rows):
    pictures = []
    for j in nearest[i]:
      image, label = images[int(seen["index"][j])]
      named = f"{bank.class_names[label]}, " if label >= 0 else ""
      pictures.append(_picture(image, f"{named}cosine {cosine[i, j]:.3f}"))
    most, pure = (arrays[k][number] if k in arrays else None for k in ("majority", "purity"))
    cards[number] = Card(
      number, int(arrays["usage"][number]), "" if most is None or most < 0 else
      bank.class_names[most], float("nan") if pure is None else float(pure), tuple(pictures),
    )  # fmt: skip
  how = (
    f"Prototypes of the set {name!r}; the nearest by cosine of {len(seen['index']):,} evenly "
    f"spread images of {bank.name} ({len(bank):,}); image counts"
    f"{' and purity' if 'purity' in arrays else ''} are those of eval/final/arrays.npz."
  )
  return {kind: tuple(cards[k] for k in numbers) for kind, numbers in chosen.items()}, how


def _chosen(usage: np.ndarray) -> dict[str, list[int]]:
  """Numbers of the most used, the median and the least used prototypes; none twice."""
  order = np.argsort(-usage, kind="stable")
  used = int(np.sum(usage > 0))
  middle = max(0, used // 2 - _CARDS // 2)
  parts = {
    "Most used": order[:_CARDS],
    "Median of the used": order[middle : min(middle + _CARDS, used)],
    f"Least used ({len(usage) - used:,} of {len(usage):,} dead)": order[::-1][:_CARDS],
  }
  taken, chosen = set(), {}
  for kind, numbers in parts.items():
    chosen[kind] = [int(k) for k in numbers if int(k) not in taken]
    taken |= set(chosen[kind])
  return {kind: numbers for kind, numbers in chosen.items() if numbers}


def _attention(model, bank):
  if not model.config.model.name.startswith("vit"):
    raise errors.UserError(f"{model.config.model.name} has no attention")
  found = _read(bank, np.unique(np.arange(_IMAGES) * len(bank) // _IMAGES))
  if not found:
    raise errors.UserError(f"the images of {bank.name} cannot be read")
  images = np.stack([
    pipeline.squash(image, model.config.data.image_size) for image, _ in found.values()
  ])  # fmt: skip
  rows = []
  for (index, (_, label)), image, heads in zip(
    found.items(), images, trained.attention(model, images), strict=True
  ):
    maps = {"mean of heads": heads.mean(axis=0)}
    maps |= {f"head {i + 1}": weights for i, weights in enumerate(heads[:_HEADS])}
    name = bank.class_names[label] if label >= 0 else bank.describe(index)
    rows.append((
      _picture(image, name),
      *(_picture(_heat(image, w), f"{title}, up to {w.max():.2f}") for title, w in maps.items()),
    ))  # fmt: skip
  return tuple(rows)


def _views(config, train):
  """The first images of the first batch of the run, under the very crops and colours of step 0."""
  batch_size = config.batch_size
  own = next(n for n in range(min(_VIEWED, batch_size), batch_size + 1) if batch_size % n == 0)
  stream = pipeline.batches(
    train, seed=config.seed, step=0, batch_size=batch_size, image_size=config.data.image_size,
    process_count=batch_size // own,
  )  # fmt: skip
  try:
    batch = {key: value[:_VIEWED] for key, value in next(stream).items()}
  finally:
    stream.close()
  _, _, key = jax.random.split(jax.random.key(config.seed), 3)
  key, _ = jax.random.split(jax.random.fold_in(key, 0))
  views = jax.device_get(jax.jit(augment.make(config.augment))(key, batch))
  rows = []
  for i, image in enumerate(batch["image"]):
    row = [_picture(image, f"{train.name}, image {batch['index'][i]}")]
    for kind, title in (("global", "global view"), ("local", "local view")):
      for j, view in enumerate(views.get(kind, [()] * len(batch["image"]))[i][:_LOCALS]):
        plain = view * np.array(config.augment.std) + np.array(config.augment.mean)
        pixels = np.round(255 * plain.clip(0, 1)).astype(np.uint8)
        row.append(_picture(pixels, f"{title} {j + 1}, {len(view)} px"))
    rows.append(tuple(row))
  return tuple(rows)


def _read(source, indices: Sequence[int]) -> dict[int, tuple[np.ndarray, int]]:
  """{index: (uint8 [H, W, 3], label)} of the records that can be read."""
  records = zip(indices, source.read(indices), strict=True)
  return {
    int(index): (record["image"], record["label"])
    for index, record in records if not isinstance(record, sources.CorruptImage)
  }  # fmt: skip


def _picture(image: np.ndarray, text: str) -> Picture:
  """uint8 [H, W, 3], made smaller where a side has more than `_SIDE` pixels."""
  small = Image.fromarray(image)
  small.thumbnail((_SIDE, _SIDE))
  file = io.BytesIO()
  small.save(file, "webp", quality=88, method=4)
  data = base64.b64encode(file.getvalue()).decode()
  return Picture(f"data:image/webp;base64,{data}", text, max(image.shape[:2]) <= _TINY)


def _heat(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """A map [h, w] over a grey image: uint8 [H, W, 3], the largest weight brightest."""
  scaled = Image.fromarray((255 * weights / max(weights.max(), 1e-12)).astype(np.uint8))
  side = max(image.shape[0], min(_SIDE, 3 * image.shape[0]))
  heat = np.asarray(scaled.resize((side, side), Image.Resampling.BICUBIC))
  colours = 255 * matplotlib.colormaps["viridis"](heat)[..., :3]
  grey = Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.BICUBIC)
  return (0.65 * colours + 0.35 * np.asarray(grey)[..., None]).astype(np.uint8)


def _unit(rows: np.ndarray) -> np.ndarray:
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
