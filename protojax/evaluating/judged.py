"""The labelled images that an encoder is judged on: which they are, and their rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from protojax import errors, pretrained
from protojax.data import sources
from protojax.training import datasets


class Images(NamedTuple):
  """Images of a source; `split` names them in the protocol, `encode` fills in the rows."""

  source: sources.Source
  split: str
  rows: dict[str, Any] | None = None


def find(
  model: pretrained.Trained,
  name: str | None,
  data_dir: str | None,
  protocols: Sequence[str],
  *,
  train_split: str | None = None,
  test_split: str | None = None,
) -> dict[str, Images]:
  """{"bank", "test", and "tail": the long-tailed images that the run was trained on, if it was}.

  Args:
    model: what is judged.
    name, data_dir: of other data than the run's own; None takes those.
    protocols: that are asked for.
    train_split, test_split: of that other data; None takes "train" and the held-out one, which
      `sources.find_split` finds.

  Raises:
    UserError: if there is no such data, it has no labels or one class, or classes differ.
  """
  config = model.config
  data, probe = config.data, config.probe
  roles, splits = ("train", "test"), (probe.train_split, probe.test_split)
  if name:
    held_out = test_split or sources.find_split(name, "test", data_dir)
    roles = splits = (train_split or "train", held_out)
  where = {"name": name, "data_dir": data_dir}
  try:
    bank = pretrained.source(model, roles[0], **where)
    test = pretrained.source(model, roles[1], **where, value_range=bank.value_range)
  except errors.UserError as error:
    if name:
      raise
    raise errors.UserError(
      f"the run's own images cannot judge it ({error}): name labelled ones with --data and "
      "--data_dir, such as a folder of train/ and test/, each of one folder a class"
    ) from None
  bank, test = Images(bank, splits[0]), Images(test, splits[1])
  pairs = (bank.split, bank.source), (test.split, test.source)
  if name and (shared := datasets.shared(name, data_dir, *pairs)):
    raise errors.UserError(
      f"{shared} images of --test_split={test.split} are in --train_split={bank.split} too, where "
      "each would be its own nearest neighbour: name splits that share none"
    )
  found = {"bank": bank, "test": test}
  own = (probe.name, probe.data_dir) == (data.name, data.data_dir)
  if "long_tail" in protocols and not name and own and data.imbalance is not None:
    source = sources.build(
      data.name,
      split=data.split,
      data_dir=data_dir or data.data_dir,
      imbalance=data.imbalance,
      seed=config.seed,
      channels=data.channels,
      value_range=data.value_range,
    )
    split = f"{data.split}, imbalance {data.imbalance:g}, seed {config.seed}"
    found["tail"] = Images(source, split)
    if len(protocols) == 1:
      del found["bank"]
  for images in found.values():
    sources.require_labels(images.source, "--protocol")
  for images in found.values():
    if images.source.class_names != test.source.class_names:
      raise errors.UserError(
        f"{images.source.name} and {test.source.name} have different classes "
        f"({images.source.num_classes} and {test.source.num_classes}): give both the same ones"
      )
  if test.source.num_classes < 2:
    raise errors.UserError(
      f"{test.source.name} has one class, so every answer is right: give two classes or more"
    )
  return found


def encode(model: pretrained.Trained, images: Images, layers: Sequence[str]) -> Images:
  """Fills in the rows: features of some layers, labels, and codes where there are prototypes.

  Raises:
    UserError: for labels that are missing, or features that are not finite.
  """
  parts = ("features", "codes") if model.prototypes else ("features",)
  rows = pretrained.encoded(model, images.source, parts=parts, layers=layers)
  name = images.source.name
  if missing := int(np.sum(rows["label"] < 0)):
    raise errors.UserError(
      f"{missing} of {rows['label'].size} images of {name} have no label: choose other data with "
      "--data and --data_dir, or other splits of it with --train_split and --test_split"
    )
  for layer, x in rows["features"].items():
    if bad := int(np.sum(~np.isfinite(x).all(axis=1))):
      when = "" if model.step is None else f" at step {model.step}"
      why = pretrained.not_finite(model) or "its weights are finite, what they make of these is not"
      raise errors.UserError(
        f"{bad} of {len(x)} rows of features of {name} (layer {layer}) hold NaN or infinity{when}: "
        f"of {model.path} {why}"
      )
  return images._replace(rows=rows)


def require_known_classes(bank: Images, test: Images) -> None:
  """Both encoded: every class of the test has an image in the bank, and the bank has two.

  Raises:
    UserError: where it is not so.
  """
  names, known = bank.source.class_names, np.unique(bank.rows["label"])
  if (new := np.setdiff1d(test.rows["label"], known)).size:
    raise errors.UserError(
      f"{new.size} classes of {test.source.name} have no image in {bank.source.name}, "
      f"{names[new[0]]!r} first: give both splits the same classes"
    )
  if known.size < 2:
    raise errors.UserError(
      f"all images of {bank.source.name} are of class {names[known[0]]!r}, so every answer is "
      "right: give two classes or more"
    )
