"""Settings that a run finds out by looking at its images, and keeps from then on."""

import pathlib

import ml_collections
import numpy as np
from absl import logging

from protojax import config as configs
from protojax import errors, files, progress, resolving
from protojax.data import sources

_KEPT = (("data", "value_range"), ("augment", "mean"), ("augment", "std"))
_SAMPLE = 1024  # images that mean and standard deviation are taken from
_AT_ONCE = 16  # of them that are read at a time
_LOOKED_AT = 16  # images whose sides are compared with the square that they are stored in
_LEAST_STD = 1.0 / 255.0  # a channel that never changes must not be divided by zero


def recalled(config: ml_collections.ConfigDict, workdir: str) -> ml_collections.ConfigDict:
  """A copy in which what an earlier start of the run in `workdir` found out is not sought again."""
  config = config.copy_and_resolve_references()
  known = pathlib.Path(workdir).expanduser() / "config.json"
  if config.overwrite or not known.is_file():
    return config
  try:
    before = files.parse_json(known.read_text())
    configs.restored(before)
  except (ValueError, TypeError, KeyError):
    return config  # `workdir.claim` says so
  with config.unlocked(), config.ignore_type():
    for section, key in _KEPT:
      there = before.get(section, {}).get(key)
      unknown = config[section][key] is None
      if section == "augment":
        unknown = resolving.to_be_measured(config, key)
      if unknown and isinstance(there, list):
        config[section][key] = tuple(tuple(x) if isinstance(x, list) else x for x in there)
  return config


def completed(
  config: ml_collections.ConfigDict, train: sources.Source
) -> ml_collections.ConfigDict:
  """A copy that names the held-out split, the range of deep images, mean and deviation.

  Says so if the images are much smaller than the squares in which they are stored.

  Args:
    config: resolved.
    train: the images to train on.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    probe = config.probe
    probe.test_split = sources.find_split(probe.name, probe.test_split, probe.data_dir)
    config.data.value_range = train.value_range
    if train.value_range is not None:
      logging.info(
        "images of more than 8 bits: %s become 0 to 255 (config.data.value_range)",
        sources.range_words(train.value_range),
      )
    longest, square = _longest_side(train), config.data.image_size
    if 0 < 2 * longest <= square:
      logging.info(
        "images of %s have %d pixels a side at most, of those looked at, and lie in squares of %d: "
        "config.data.image_size=%d would save memory and time",
        train.name,
        longest,
        square,
        longest,
      )
    if config.augment.mean is None or config.augment.std is None:
      mean, std = channel_statistics(train)
      config.augment.mean = config.augment.mean or mean
      config.augment.std = config.augment.std or std
      logging.info(
        "measured on %d images of %s: config.augment.mean=%s config.augment.std=%s",
        min(_SAMPLE, len(train)),
        train.name,
        config.augment.mean,
        config.augment.std,
      )
  return config


def _longest_side(data: sources.Source) -> int:
  """In pixels, of 16 evenly spread images; 0 if none of them can be read."""
  rows = np.unique(np.arange(_LOOKED_AT) * len(data) // _LOOKED_AT).tolist()
  sizes = [r["size"] for r in data.read(rows) if not isinstance(r, sources.CorruptImage)]
  return max((max(size) for size in sizes), default=0)


def channel_statistics(data: sources.Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """(mean, standard deviation) of every channel over all pixels, in 0..1, to four digits.

  Of 1,024 evenly spread images, each with the same weight: a function of the images alone.

  Raises:
    UserError: if none of them can be read.
  """
  sums: list[np.ndarray] = []
  rows = np.unique(np.arange(_SAMPLE) * len(data) // _SAMPLE)
  few = np.array_split(rows, -(-len(rows) // _AT_ONCE))  # large images need not all be in memory
  with progress.Line("measuring the channels", len(few)) as line:
    for part in few:
      for record in data.read(part.tolist()):
        if not isinstance(record, sources.CorruptImage):
          pixels = record["image"].reshape(-1, data.channels) / 255.0
          sums.append(np.stack([pixels.mean(axis=0), np.square(pixels).mean(axis=0)]))
      line.step()
  if not sums:
    raise errors.UserError(f"not one of the first images of {data.name} can be read")
  mean, square = np.mean(sums, axis=0)
  std = np.sqrt(np.maximum(square - np.square(mean), 0.0))
  rounded = (np.round(x, 4).tolist() for x in (mean, np.maximum(std, _LEAST_STD)))
  first, second = (tuple(x) for x in rounded)
  return first, second
