"""Accuracy, clustering and long tail of a trained encoder, each number with its protocol.

protojax evaluate --workdir=runs/own --protocol=knn
protojax evaluate --compare runs/own runs/other
"""

import argparse
import functools
import pathlib
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from protojax import cli, environment, errors, loading, pretrained
from protojax.data import sources
from protojax.evals import knn, protocols, result_files
from protojax.training import console, encode, evaluation, export, sharding

_DESCRIPTION = """\
Judges frozen features: of the teacher (the encoder where there is none), evaluation transform.

  protojax evaluate --workdir=runs/own --protocol=knn      a run, its newest checkpoint
  protojax evaluate --workdir=exported --protocol=all --data=cifar10 --data_dir=DATA
  protojax evaluate --compare runs/own runs/other          refuses unlike protocols

knn         weighted k-NN at several k, cosine, the whole train split as bank
linear      a grid of linear heads over learning rates and layers; --mode=honest chooses on a tenth
            of the train images, --mode=paper on the test images, as papers do, and says so
low_shot    logistic regression on 1, 2, 5 images a class, 1 % and 10 %, five draws
clustering  prototype codes and k-means against classes: NMI, AMI, ARI, each beside its chance
long_tail   accuracy of frequent and rare classes, and which of them the prototypes serve
all         all of these, from images encoded once; ends in a table of the main numbers, all of test
            images, with what was chosen on which images and what chance gives

Writes WORKDIR/eval/PROTOCOL/result.json: measures, protocol, environment."""

_PIXELS_AT_A_TIME = 256  # images, over all devices
PROTOCOLS = ("knn", "linear", "low_shot", "clustering", "long_tail")


class Images(NamedTuple):
  """Images of a source; `split` names them in the protocol, `_encode` fills in the rows."""

  source: sources.Source
  split: str
  rows: dict[str, Any] | None = None


def _sources(model: pretrained.Trained, args, names: Sequence[str]) -> dict[str, Images]:
  """{"bank", "test", and "tail": the long-tailed images that the run was trained on, if it was}.

  Raises:
    UserError: if there is no such data, it has no labels or one class, or classes differ.
  """
  config = model.config
  data, probe = config.data, config.probe
  roles, splits = ("train", "test"), (probe.train_split, probe.test_split)
  if args.data:
    roles = splits = ("train", sources.find_split(args.data, "test", args.data_dir))
  where = {"name": args.data, "data_dir": args.data_dir}
  try:
    bank = pretrained.source(model, roles[0], **where)
    test = pretrained.source(model, roles[1], **where, value_range=bank.value_range)
  except errors.UserError as error:
    if args.data:
      raise
    raise errors.UserError(
      f"the run's own images cannot judge it ({error}): name labelled ones with --data and "
      "--data_dir, such as a folder of train/ and test/, each of one folder a class"
    ) from None
  bank, test = Images(bank, splits[0]), Images(test, splits[1])
  found = {"bank": bank, "test": test}
  own = (probe.name, probe.data_dir) == (data.name, data.data_dir)
  if "long_tail" in names and not args.data and own and data.imbalance is not None:
    source = sources.build(
      data.name,
      split=data.split,
      data_dir=args.data_dir or data.data_dir,
      imbalance=data.imbalance,
      seed=config.seed,
      channels=data.channels,
      value_range=data.value_range,
    )
    split = f"{data.split}, imbalance {data.imbalance:g}, seed {config.seed}"
    found["tail"] = Images(source, split)
    if len(names) == 1:
      del found["bank"]
  for images in found.values():
    sources.require_labels(images.source, "--protocol")
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


def _encode(model: pretrained.Trained, images: Images, layers: Sequence[str]) -> Images:
  """Fills in the rows.

  Raises:
    UserError: for labels that are missing, or features that are not finite.
  """
  parts = ("features", "codes") if model.prototypes else ("features",)
  rows = pretrained.encoded(model, images.source, parts=parts, layers=layers)
  name = images.source.name
  if missing := int(np.sum(rows["label"] < 0)):
    raise errors.UserError(
      f"{missing} of {rows['label'].size} images of {name} have no label: choose other data with "
      "--data and --data_dir"
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


def _require_known_classes(bank: Images, test: Images) -> None:
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


def _data(model: pretrained.Trained, images: Images, args) -> dict[str, Any]:
  """The part of a protocol that says which images."""
  labels = images.rows["label"]
  return {
    "data": args.data or model.config.probe.name or model.config.data.name,
    "split": images.split,
    "images": labels.size,
    "unreadable": len(images.source) - labels.size,
    "classes": images.source.num_classes,
    "content": result_files.content(images.rows["index"], labels),
  }


def _protocol(name, task, model, bank, test, args) -> dict[str, Any]:
  """All that could make another run of the same program give other numbers."""
  config = model.config
  augment_config = config.augment
  return {
    "name": name,
    "bank": _data(model, bank, args),
    "test": _data(model, test, args),
    "transform": {
      "storage_px": config.data.image_size,
      "px": augment_config.global_size,
      "crop": config.probe.crop,
    },
    "features": "backbone, evaluation mode, frozen",
    **task.settings,
    "model": {
      "path": str(model.path),
      "kind": model.kind,
      "step": model.step,
      "weights": model.weights,
      "method": config.method.name,
      "backbone": config.model.name,
      "prototypes": {k: len(v) for k, v in model.prototypes.items()},
      "seed": config.seed if model.kind == "run" else None,
      "mean": list(augment_config.mean),
      "std": list(augment_config.std),
      **({"initialised": list(model.initialised)} if model.initialised else {}),
    },
    "software": result_files.software(),
  }


def _task(name: str, encoded: protocols.Encoded, args, layers) -> protocols.Task:
  match name:
    case "knn":
      return protocols.knn(encoded, ks=args.k, temperatures=args.temperature)
    case "linear":
      return protocols.linear_probe(encoded, mode=args.mode, layers=layers, epochs=args.epochs)
    case "low_shot":
      return protocols.few_shot(encoded)
    case "clustering":
      return protocols.clusters(encoded)
    case "long_tail":
      return protocols.tail(encoded)


def evaluate(args: argparse.Namespace) -> dict[str, dict]:
  """Runs the protocols that were asked for, prints and writes their results.

  Args:
    args: what `main` parsed.

  Returns:
    {protocol: measures}.

  Raises:
    UserError: for a mistake of the user; results are written whole or not at all.
  """
  names = PROTOCOLS if args.protocol == "all" else (args.protocol,)
  model = loading.load(args.workdir, step=args.step)
  images = _sources(model, args, names)
  for k in (args.k or (10,)) if "knn" in names else ():
    num = len(images["bank"].source)
    if not 1 <= k <= num:
      raise errors.UserError(
        f"--k={k} neighbours of a bank of {num} images: choose 1 to {num}, such as --k=10,20"
      )
  there = pretrained.layers(model)
  if unknown := [layer for layer in args.layers or () if layer not in there]:
    raise errors.UserError(f"--layers={unknown[0]} is unknown here: there are {', '.join(there)}")
  layers = (args.layers or there) if "linear" in names else ()
  all_layers = tuple(dict.fromkeys(("last", *layers)))  # the other protocols take the last
  images = {
    role: _encode(model, some, ("last",) if role == "tail" else all_layers)
    for role, some in images.items()
  }
  test, root, tasks = images["test"], result_files.folder(args.workdir), {}
  for name in names:
    bank = images["tail" if name == "long_tail" and "tail" in images else "bank"]
    _require_known_classes(bank, test)
    encoded = protocols.Encoded(bank.rows, test.rows, test.source.num_classes, model.prototypes)
    task = _task(name, encoded, args, layers)
    protocol = _protocol(name, task, model, bank, test, args)
    if not args.overwrite:
      result_files.require_free(root / name / "result.json", protocol)
    tasks[name] = task, protocol
  results, floors = {}, []
  for name, (task, protocol) in tasks.items():
    results[name] = task.measure()
    path = root / name / "result.json"
    result_files.write(path, results[name], protocol)
    lines = _table(results[name], protocol, task.notes, path)
    if name in ("knn", "linear"):
      floors = floors or _floors(model, images["bank"], test, own=not args.data)
      lines += floors
    print("\n".join(lines), flush=True)
  if args.protocol == "all":
    share = np.bincount(test.rows["label"]).max() / test.rows["label"].size
    rows = [
      row
      for name, (_, protocol) in tasks.items()
      for row in protocols.headlines(name, results[name], protocol, float(share))
    ]
    print("\n".join([*_summary(rows, tasks["knn"][1]), *(line.strip() for line in floors)]))
  return results


def _floors(model: pretrained.Trained, bank: Images, test: Images, *, own: bool) -> list[str]:
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

  here, lines = (len(bank.rows["label"]), len(test.rows["label"])), []
  known = console.floors(pathlib.Path(model.path)) if model.kind == "run" else {}
  there = tuple(int(known.get(f"floor/{of}_images", 0)) for of in ("bank", "test"))
  if max(here) <= evaluation.FLOOR_IMAGES and not (own and there == here):
    k = min(model.config.probe.k, here[0])
    lines.append(
      f"  floors on these images, k = {k}: {listed(_measured_floors(model, bank, test))}"
    )
    known = {key: value for key, value in known.items() if "knn" not in key}
  if listed(known):
    of = ""
    if any(there) and not (own and there == here):
      of = f" of the training's bank of {there[0]} and test of {there[1]} images, not comparable"
    text = f"floors{of}: {listed(known)}"
    lines += textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="    ")
  return lines or ["  floors: unknown here; raw pixels or an untrained net may do as well"]


def _measured_floors(model: pretrained.Trained, bank: Images, test: Images) -> dict[str, float]:
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


def _summary(rows: Sequence[protocols.Headline], protocol: dict) -> list[str]:
  """The table that ends --protocol=all, at most 80 columns wide."""
  model, test = protocol["model"], protocol["test"]
  lines = [
    "",
    f"{_whose(model)}: on {test['images']} test images ({test['data']} {test['split']}) at "
    f"{protocol['transform']['px']} px",
    f"{'protocol':<11}{'measure':<31}{'value':>8}  {'chosen on':<14}{'chance':>8}",
  ]
  for row in rows:
    chance = "-" if row.chance is None else result_files.show(row.chance)
    lines.append(
      f"{row.protocol:<11}{row.measure:<31}{result_files.show(row.value):>8}  "
      f"{row.chosen_on:<14}{chance:>8}"
    )
  return [
    *lines,
    "held-out bank: a tenth of the train images, no test image; -: nothing was chosen",
  ]


def _whose(model: dict) -> str:
  step = "" if model["step"] is None else f", step {model['step']}"
  return f"{model['weights']} of {model['path']}{step}"


def _table(measures, protocol, notes, path) -> list[str]:
  model, bank, test = protocol["model"], protocol["bank"], protocol["test"]
  lines = [
    f"{protocol['name']}: {_whose(model)}; bank {bank['data']} {bank['split']} "
    f"({bank['images']} images), test {test['data']} {test['split']} ({test['images']})"
  ]
  for key in ("rule", "selection", "mode", "lambda"):
    if key in protocol:
      lines.append(f"  {key}: {protocol[key]}")
  if protocol.get("mode") == "paper":
    lines.append("  NOTE: layer and rate were selected on the test images")
  if fresh := model.get("initialised"):
    lines.append(f"  NOTE: {export.initialised(fresh)}")
  lines += [f"  {name:<36} {result_files.show(value):>10}" for name, value in measures.items()]
  for data in (bank, test):
    if data["unreadable"]:
      total = data["images"] + data["unreadable"]
      lines.append(
        f"  left out: {data['unreadable']} of {total} images of {data['data']} {data['split']}, "
        "which cannot be read"
      )
  lines += [f"  left out: {note}" for note in notes]
  return [*lines, f"  {path}"]


def main(argv: list[str]) -> None:
  parser = cli.parser("evaluate", _DESCRIPTION)
  parser.add_argument("--workdir", help="workdir of a run, or exported weights")
  parser.add_argument("--protocol", default="all", choices=(*PROTOCOLS, "all"))
  parser.add_argument("--mode", default="honest", choices=("honest", "paper"), help="of linear")
  parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
  parser.add_argument("--data", help="digits, folder or a TFDS data set; default: the run's own")
  parser.add_argument("--data_dir", help="where the data is")
  parser.add_argument(
    "--k", type=cli.listed(int), help="of knn; default: those of 10,20,100,200 the bank allows"
  )
  parser.add_argument(
    "--temperature", type=cli.listed(float), default=(0.07,), help="of knn; default 0.07"
  )
  parser.add_argument("--layers", type=cli.listed(str), help="of linear; default: all there are")
  parser.add_argument("--epochs", type=int, default=100, help="of linear; default 100")
  parser.add_argument("--overwrite", action="store_true", help="replace results made otherwise")
  parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="workdirs or result.json")
  args = parser.parse_args(argv)
  if args.compare:
    print("\n".join(result_files.compare(*args.compare, args.protocol)))
    return
  if args.workdir is None:
    raise errors.UserError("--workdir is missing: protojax evaluate --workdir=RUN --protocol=knn")
  if args.epochs < 1:
    raise errors.UserError(f"--epochs={args.epochs} must be at least 1")
  if not min(args.temperature) > 0:
    raise errors.UserError(f"--temperature={min(args.temperature):g} must be positive")
  environment.keep_compiled()
  evaluate(args)


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
