"""What accuracies there are without training, to be read beside those of a trained encoder."""

import functools
import pathlib
import textwrap

import jax

from protojax import loading, pretrained
from protojax.evals import knn
from protojax.evaluating import judged
from protojax.training import console, encode, evaluation, sharding

_PIXELS_AT_A_TIME = 256  # images, over all devices


def lines(
  model: pretrained.Trained, bank: judged.Images, test: judged.Images, *, own: bool
) -> list[str]:
  """Lines on what there is without training, for no accuracy is good alone.

  k-NN on these very images where they are few; else what the run has measured in its training,
  and on how many images that was where they are others.

  Args:
    model: what is judged.
    bank, test: encoded.
    own: whether they are the run's own images.
  """
  names = {
    "floor/knn_pixels": "k-NN raw pixels",
    "floor/knn_untrained": "untrained",
    "floor/knn_start": "at the start",
    "floor/linear_pixels": "linear raw pixels",
  }

  def listed(values):
    return ", ".join(f"{name} {values[key]:.1%}" for key, name in names.items() if key in values)

  here, found = (len(bank.rows["label"]), len(test.rows["label"])), []
  known = console.floors(pathlib.Path(model.path)) if model.kind == "run" else {}
  there = tuple(int(known.get(f"floor/{of}_images", 0)) for of in ("bank", "test"))
  if max(here) <= evaluation.FLOOR_IMAGES and not (own and there == here):
    k = min(model.config.probe.k, here[0])
    found.append(f"  floors on these images, k = {k}: {listed(_measured(model, bank, test))}")
    known = {key: value for key, value in known.items() if "knn" not in key}
  if listed(known):
    of = ""
    if any(there) and not (own and there == here):
      of = f" of the training's bank of {there[0]} and test of {there[1]} images, not comparable"
    text = f"floors{of}: {listed(known)}"
    found += textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="    ")
  return found or ["  floors: unknown here; raw pixels or an untrained net may do as well"]


def _measured(
  model: pretrained.Trained, bank: judged.Images, test: judged.Images
) -> dict[str, float]:
  """k-NN accuracy of raw pixels and of an untrained net: of step 0, or of exported weights any.

  Not of a run that started from other weights.
  """
  config = model.config
  forward = jax.jit(
    functools.partial(evaluation.pixels, config), out_shardings=sharding.replicated(model.mesh)
  )

  def accuracy(rows, part):
    bank_rows, test_rows = rows
    return knn.accuracy(
      part(bank_rows),
      bank_rows["label"],
      part(test_rows),
      test_rows["label"],
      num_classes=test.source.num_classes,
      k=min(config.probe.k, len(bank_rows["label"])),
      temperature=config.probe.temperature,
    )

  raw = [
    encode.rows(
      forward,
      images.source,
      mesh=model.mesh,
      batch_size=_PIXELS_AT_A_TIME,
      image_size=config.data.image_size,
      num_workers=config.data.num_workers,
    )
    for images in (bank, test)
  ]
  found = {"floor/knn_pixels": accuracy(raw, lambda rows: rows["pixels"])}
  if not config.init_from:
    fresh = loading.untrained(model)
    rows = [pretrained.encoded(fresh, images.source) for images in (bank, test)]
    found["floor/knn_untrained"] = accuracy(rows, lambda rows: rows["features"]["last"])
  return found
