"""The images that a run needs: to train on, to search and to test on."""

import pathlib

from absl import logging

from protojax import errors
from protojax.data import sources

_TEST = "test"  # the default of probe.test_split


def pretraining(config) -> sources.Source:
  """The images that `config` trains on.

  Raises:
    UserError: if they are missing.
  """
  data = config.data
  if data.name in ("folder", "parquet", "tar") and data.data_dir is None:
    raise errors.UserError(
      f"config.data.data_dir is missing: where are the images of config.data.name={data.name}?"
    )
  return sources.build(
    data.name,
    split=data.split,
    data_dir=data.data_dir,
    imbalance=data.imbalance,
    seed=config.seed,
    channels=data.channels,
    value_range=data.value_range,
  )


def one_source(config) -> bool:
  """Whether the bank of the probe is the very images that `config` trains on."""
  data, probe = config.data, config.probe
  return (
    (probe.name or data.name, probe.data_dir or data.data_dir) == (data.name, data.data_dir)
    and probe.train_split == data.split
    and data.imbalance is None
  )


def shared(
  name: str,
  data_dir: str | None,
  one: tuple[str | None, sources.Source],
  other: tuple[str | None, sources.Source],
) -> int:
  """How many images two splits of a data set have in common: (split, its source), twice.

  What a module of the user's builds is not known so well; there it is all of them for equal splits.
  """
  if sources.is_prepared(name):
    return sources.tfds.overlap(name, (str(one[0]), str(other[0])), data_dir)
  if name in sources.KINDS:
    return sources.shared(one[1], other[1])
  return len(other[1]) if one[0] == other[0] else 0


def of_run(config) -> tuple[sources.Source, sources.Source, sources.Source | None]:
  """The images that a run needs: (to train on, the bank, labelled test images or None).

  The bank is what collapse is measured on and, where it has labels, what k-NN searches.

  Raises:
    UserError: if data is missing, a probe was asked of data without labels, or parts of a data set
      that are searched and tested on share images.
  """
  data, probe = config.data, config.probe
  train = pretraining(config)
  seen_alike = {"channels": data.channels, "value_range": train.value_range}
  name, data_dir = probe.name or data.name, probe.data_dir or data.data_dir
  own = (name, data_dir) == (data.name, data.data_dir)
  test_split = sources.find_split(name, probe.test_split, data_dir)
  if name == "folder" and own and not (pathlib.Path(data_dir).expanduser() / test_split).is_dir():
    logging.info(
      "k-NN and linear probe are off: %s has no folder %r, nor another of %s: move labelled images "
      "into %s/train/CLASS/ and %s/val/CLASS/, or name others with config.probe.name and "
      "config.probe.data_dir",
      data_dir,
      probe.test_split,
      ", ".join(sources.HELD_OUT),
      *(str(data_dir).rstrip("/"),) * 2,
    )
    return train, train, None
  if name in sources.SHARDS and own:
    splits = sorted(sources.shards.found(data_dir, f".{name}"))
    if probe.test_split not in splits:
      logging.info(
        "k-NN and linear probe are off: the shards in %s are of the splits %s, not %r; %s",
        data_dir,
        ", ".join(splits),
        probe.test_split,
        "choose with config.probe.test_split"
        if len(splits) > 1
        else "names such as train-000.tar and val-000.tar say which are which",
      )
      return train, train, None
  if own and sources.is_prepared(name) and test_split == _TEST:
    splits = sources.tfds.splits(name, data_dir)
    if _TEST not in splits:
      logging.info(
        "k-NN and linear probe are off: %s has the splits %s, not %r; take parts for "
        "config.probe.train_split and config.probe.test_split, as train[:80%%] and train[80%%:]",
        name,
        ", ".join(splits),
        _TEST,
      )
      return train, train, None
  bank = (
    train
    if one_source(config)
    else sources.build(name, split=probe.train_split, data_dir=data_dir, **seen_alike)
  )
  if own and not bank.num_classes:
    logging.info("k-NN and linear probe are off: %s has no labels", bank.name)
    return train, bank, None
  sources.require_labels(bank, "probe.train_split")
  seen_alike["value_range"] = bank.value_range
  test = sources.build(name, split=test_split, data_dir=data_dir, **seen_alike)
  prepared = sources.is_prepared(name)
  if both := shared(name, data_dir, (probe.train_split, bank), (test_split, test)):
    raise errors.UserError(
      f"{both} images of probe.test_split={test_split} are in probe.train_split="
      f"{probe.train_split} too, where each would be its own nearest neighbour: take parts that "
      "share none" + (", such as train[:80%] and train[80%:]" if prepared else "")
    )
  if own and name == "folder" and not test.num_classes:
    logging.info(
      "k-NN and linear probe are off: %s has no class folders as %s has", test.name, bank.name
    )
    return train, bank, None
  sources.require_labels(test, "probe.test_split")
  if name == "folder" and probe.test_split == _TEST:
    held_out = sources.find_split(name, "val", data_dir)
    if held_out != test_split:
      logging.info(
        "training looks at the images of %s/%s: to keep them for the end set "
        "config.probe.test_split=%s",
        data_dir,
        test_split,
        held_out,
      )
  if bank.class_names != test.class_names:
    raise errors.UserError(
      f"{bank.name} and {test.name} have different classes ({bank.num_classes} and "
      f"{test.num_classes}): give both the same class_names (of a folder: the same sub-folders)"
    )
  return train, bank, test
