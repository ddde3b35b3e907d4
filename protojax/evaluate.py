"""Accuracy, clustering and long tail of a trained encoder, each number with its protocol.

  python -m protojax.evaluate --workdir=runs/own --protocol=knn
  python -m protojax.evaluate --compare runs/own runs/other
"""

import argparse
import sys
from typing import Any

import numpy as np

from protojax import cli, errors, trained
from protojax.data import source as sources
from protojax.evals import certificate, protocols

_DESCRIPTION = """\
Judges frozen features: of the teacher (the encoder where there is none), evaluation transform.

  python -m protojax.evaluate --workdir=runs/own --protocol=knn      a run, its newest checkpoint
  python -m protojax.evaluate --workdir=exported --protocol=all --data=cifar10 --data_dir=DATA
  python -m protojax.evaluate --compare runs/own runs/other          refuses unlike protocols

knn         weighted k-NN at several k, cosine, the whole train split as bank
linear      a grid of linear heads over learning rates and layers; --mode=honest chooses on a tenth
            of the train images, --mode=paper on the test images, as papers do, and says so
low_shot    logistic regression on 1, 2, 5 images a class, 1 % and 10 %, five draws
clustering  prototype codes and k-means against classes: NMI, AMI, ARI, each beside its chance
long_tail   accuracy of frequent and rare classes, and which of them the prototypes serve
all         all of these, from images encoded once

Writes WORKDIR/eval/PROTOCOL/result.json: measures, protocol, environment."""

PROTOCOLS = ("knn", "linear", "low_shot", "clustering", "long_tail")


def _numbers(kind):
  """A type of argparse: "10,20" -> (10, 20)."""

  def parse(text: str) -> tuple:
    return tuple(kind(part) for part in text.split(","))

  parse.__name__ = f"list of {kind.__name__}"
  return parse


def _sources(model: trained.Trained, args) -> tuple[sources.Source, sources.Source]:
  """(bank, test), labelled alike.

  Raises:
    UserError: if there is no such data, it has no labels or one class, or their classes differ.
  """
  bank, test = (
    trained.source(model, split, name=args.data, data_dir=args.data_dir)
    for split in ("train", "test")
  )
  for source in (bank, test):
    sources.require_labels(source, "--protocol")
  _require_alike(bank, test)
  return bank, test


def _require_alike(bank, test) -> None:
  if bank.class_names != test.class_names:
    raise errors.UserError(
      f"{bank.name} and {test.name} have different classes ({bank.num_classes} and "
      f"{test.num_classes}): give both the same sub-folders"
    )
  if bank.num_classes < 2:
    raise errors.UserError(
      f"{bank.name} has one class, so every answer is right: give images of two classes or more"
    )


def _tail_source(model: trained.Trained, args):
  """The long-tailed images that the run was trained on, or None where it was not."""
  data, probe = model.config.data, model.config.probe
  own = (probe.name, probe.data_dir) == (data.name, data.data_dir)
  if args.data is not None or model.kind != "run" or data.imbalance is None or not own:
    return None
  return sources.build(
    data.name, split=data.split, data_dir=args.data_dir or data.data_dir,
    imbalance=data.imbalance, seed=model.config.seed,
  )  # fmt: skip


def _encode(model, source, layers) -> dict[str, Any]:
  """Rows of a labelled source, checked.

  Raises:
    UserError: for labels that are missing, or features that are not finite.
  """
  parts = ("features", "codes") if model.prototypes else ("features",)
  seen = trained.rows(model, source, parts=parts, layers=layers)
  if (missing := int(np.sum(seen["label"] < 0))) or not seen["label"].size:
    raise errors.UserError(
      f"{missing} of {seen['label'].size} images of {source.name} have no label: choose another "
      "split with --config.probe.train_split or .test_split of the run, or other data with --data"
    )
  for layer, rows in seen["features"].items():
    if bad := int(np.sum(~np.isfinite(rows).all(axis=1))):
      raise errors.UserError(
        f"{bad} of {len(rows)} rows of features of {source.name} (layer {layer}) hold NaN or "
        f"infinity at step {model.step}: the encoder has diverged, take an earlier --step"
      )
  return seen


def _require_known_classes(bank, test, names) -> None:
  new = np.setdiff1d(test["label"], bank["label"])
  if new.size:
    raise errors.UserError(
      f"{new.size} classes of the test images have no image in the bank, {names[new[0]]!r} first: "
      "give both splits the same classes"
    )
  if np.unique(bank["label"]).size < 2:
    raise errors.UserError(
      f"all images of the bank are of class {names[bank['label'][0]]!r}: give images of two "
      "classes or more"
    )


def _describe(model, source, seen, *, split: str, args) -> dict[str, Any]:
  """The part of a protocol that says which images."""
  config = model.config
  own = config.probe.name or config.data.name
  return {
    "data": args.data or own,
    "split": split,
    "images": len(seen["label"]),
    "unreadable": len(source) - len(seen["label"]),
    "classes": source.num_classes,
    "content": certificate.content(seen["index"], seen["label"]),
  }


def _model(model: trained.Trained) -> dict[str, Any]:
  config = model.config
  return {
    "path": str(model.path), "kind": model.kind, "step": model.step, "weights": model.weights,
    "method": config.method.name, "prototypes": {k: len(v) for k, v in model.prototypes.items()},
    "backbone": config.model.name, "seed": config.seed if model.kind == "run" else None,
    "mean": list(config.augment.mean), "std": list(config.augment.std),
  }  # fmt: skip


def _task(name: str, seen: protocols.Seen, args, layers) -> protocols.Task:
  match name:
    case "knn":
      return protocols.knn(seen, ks=args.k, temperatures=args.temperature)
    case "linear":
      return protocols.linear_probe(seen, mode=args.mode, layers=layers, epochs=args.epochs)
    case "low_shot":
      return protocols.few_shot(seen)
    case "clustering":
      return protocols.clusters(seen)
    case "long_tail":
      return protocols.tail(seen)


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
  model = trained.load(args.workdir, step=args.step)
  bank, test = _sources(model, args)
  for k in args.k if "knn" in names else ():
    if not 1 <= k <= len(bank):
      raise errors.UserError(
        f"--k={k} neighbours of a bank of {len(bank)} images: choose 1 to {len(bank)}, --k=10,20"
      )
  there = trained.layers(model)
  if unknown := [layer for layer in args.layers or () if layer not in there]:
    raise errors.UserError(f"--layers={unknown[0]} is unknown here: there are {', '.join(there)}")
  layers = (args.layers or there) if "linear" in names else ("last",)
  encoded = dict.fromkeys((*layers, "last"))  # each once; every other protocol looks at the last
  tail = _tail_source(model, args) if "long_tail" in names else None
  if tail is not None:
    _require_alike(tail, test)

  seen_test = _encode(model, test, tuple(encoded))
  banks = {}
  if tail is None or len(names) > 1:
    banks["train"] = bank, _encode(model, bank, tuple(encoded))
  if tail is not None:
    banks["tail"] = tail, _encode(model, tail, ("last",))
  root, tasks = certificate.folder(args.workdir), {}
  look, probe = model.config.augment, model.config.probe
  splits = ("train", "test") if args.data else (probe.train_split, probe.test_split)
  for name in names:
    which = "tail" if name == "long_tail" and tail is not None else "train"
    source, rows = banks[which]
    _require_known_classes(rows, seen_test, source.class_names)
    seen = protocols.Seen(rows, seen_test, source.num_classes, model.prototypes)
    task = _task(name, seen, args, layers)
    split = splits[0]
    if which == "tail":
      data = model.config.data
      split = f"{data.split}, imbalance {data.imbalance:g}, seed {model.config.seed}"
    protocol = {
      "name": name,
      "bank": _describe(model, source, rows, split=split, args=args),
      "test": _describe(model, test, seen_test, split=splits[1], args=args),
      "transform": {
        "storage_px": model.config.data.image_size, "px": look.global_size, "crop": probe.crop,
      },
      "features": "backbone, evaluation mode, frozen",
      **task.settings,
      "model": _model(model),
      "software": certificate.software(),
    }  # fmt: skip
    if not args.overwrite:
      certificate.require_free(root / name / "result.json", protocol)
    tasks[name] = task, protocol
  results = {}
  for name, (task, protocol) in tasks.items():
    results[name] = task.measure()
    path = root / name / "result.json"
    certificate.write(path, results[name], protocol)
    print("\n".join(_table(results[name], protocol, task.notes, path)), flush=True)
  return results


def _table(measures, protocol, notes, path) -> list[str]:
  model, bank, test = protocol["model"], protocol["bank"], protocol["test"]
  lines = [
    f"{protocol['name']}: {model['weights']} of {model['path']}, step {model['step']}; bank "
    f"{bank['data']} {bank['split']} ({bank['images']} images), test {test['data']} "
    f"{test['split']} ({test['images']})"
  ]
  for key in ("rule", "selection", "mode", "lambda"):
    if key in protocol:
      lines.append(f"  {key}: {protocol[key]}")
  if protocol.get("mode") == "paper":
    lines.append("  NOTE: layer and rate were selected on the test images")
  lines += [f"  {name:<36} {certificate.show(value):>10}" for name, value in measures.items()]
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
    "--k", type=_numbers(int), default=(10, 20, 100, 200), help="of knn; default 10,20,100,200"
  )
  parser.add_argument(
    "--temperature", type=_numbers(float), default=(0.07,), help="of knn; default 0.07"
  )
  parser.add_argument("--layers", type=_numbers(str), help="of linear; default: all there are")
  parser.add_argument("--epochs", type=int, default=100, help="of linear; default 100")
  parser.add_argument("--overwrite", action="store_true", help="replace results made otherwise")
  parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="workdirs or result.json")
  args = parser.parse_args(argv)
  if args.compare:
    print("\n".join(certificate.compare(*args.compare, args.protocol)))
    return
  if args.workdir is None:
    raise errors.UserError(
      "--workdir is missing: python -m protojax.evaluate --workdir=RUN --protocol=knn"
    )
  if args.epochs < 1:
    raise errors.UserError(f"--epochs={args.epochs} must be at least 1")
  if not min(args.temperature) > 0:
    raise errors.UserError(f"--temperature={min(args.temperature):g} must be positive")
  evaluate(args)


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
