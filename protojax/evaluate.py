"""Accuracy, clustering and long tail of a trained encoder, each number with its protocol.

protojax evaluate --workdir=runs/own --protocol=knn
protojax evaluate --compare runs/own runs/other
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from protojax import cli, environment, errors, loading, pretrained
from protojax.evals import protocols, result_files
from protojax.evaluating import floors, judged
from protojax.training import export

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

PROTOCOLS = ("knn", "linear", "low_shot", "clustering", "long_tail")


def _data(model: pretrained.Trained, images: judged.Images, args) -> dict[str, Any]:
  """The part of a protocol that says which images."""
  labels = images.rows["label"]
  return {
    "data": args.data or model.config.probe.name or model.config.data.name,
    "split": images.split,
    "images": labels.size,
    "unreadable": len(images.source) - labels.size,
    "classes": images.source.num_classes,
    "names": result_files.names(images.source),
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
  splits = {"train_split": args.train_split, "test_split": args.test_split}
  for flag, split in splits.items():
    if split and not args.data:
      raise errors.UserError(
        f"--{flag}={split} is of data that --data names; the run's own is config.probe.{flag}"
      )
  images = judged.find(model, args.data, args.data_dir, names, **splits)
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
    role: judged.encode(model, some, ("last",) if role == "tail" else all_layers)
    for role, some in images.items()
  }
  test, root, tasks = images["test"], result_files.folder(args.workdir), {}
  for name in names:
    bank = images["tail" if name == "long_tail" and "tail" in images else "bank"]
    judged.require_known_classes(bank, test)
    encoded = protocols.Encoded(bank.rows, test.rows, test.source.num_classes, model.prototypes)
    task = _task(name, encoded, args, layers)
    protocol = _protocol(name, task, model, bank, test, args)
    if not args.overwrite:
      result_files.require_free(root / name / "result.json", protocol)
    tasks[name] = task, protocol
  results, untrained = {}, []
  for name, (task, protocol) in tasks.items():
    results[name] = task.measure()
    path = root / name / "result.json"
    result_files.write(path, results[name], protocol)
    lines = _table(results[name], protocol, task.notes, path)
    if name in ("knn", "linear"):
      untrained = untrained or floors.lines(model, images["bank"], test, own=not args.data)
      lines += untrained
    print("\n".join(lines), flush=True)
  if args.protocol == "all":
    share = np.bincount(test.rows["label"]).max() / test.rows["label"].size
    rows = [
      row
      for name, (_, protocol) in tasks.items()
      for row in protocols.headlines(name, results[name], protocol, float(share))
    ]
    print("\n".join([*_summary(rows, tasks["knn"][1]), *(line.strip() for line in untrained)]))
  return results


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
  parser.add_argument("--train_split", help="of --data, what k-NN searches; default: train")
  parser.add_argument("--test_split", help="of --data; default: test, or what is held out there")
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
  environment.keep_memory()
  environment.keep_compiled()
  evaluate(args)


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
