"""The list: what a short time on an accelerator is spent on, in order. Needs no JAX to be read."""

import importlib.util
import pathlib
from typing import NamedTuple


class Item(NamedTuple):
  """Attributes:
  name: also the prefix that --only takes; "part/what".
  work: module of this package whose `run(options, folder, data_dir, rehearse)` does it.
  options: what `run` gets.
  seconds: our guess for an H100, none measured yet.
  """

  name: str
  work: str
  options: dict
  seconds: int


def run(item: Item, *, folder: pathlib.Path, data_dir: str | None, rehearse: bool) -> dict:
  """Does the work of an item in this process.

  Args:
    item: of ITEMS.
    folder: for what must outlive a call that the clock cuts.
    data_dir: of the prepared CIFAR-10.
    rehearse: tiny nets, two steps.

  Returns:
    JSON; {"skipped": reason} where this machine cannot do it.
  """
  if item.work == "peer_speed" and importlib.util.find_spec("torch") is None:
    return {"skipped": "PyTorch is not installed"}
  module = importlib.import_module(f"benchmarks.accelerator.{item.work}")
  return module.run(item.options, folder=folder, data_dir=data_dir, rehearse=rehearse)


# a. The same numbers as on a CPU?
_PARITY = [
  Item(f"parity/{name}", "parity", {"name": name}, 25)
  for name in ("dino", "ibot", "gmm", "swav", "falcon")
]

# b. How fast, and where the time goes. ViT-S/16, two views of 224 px and eight of 96; prototypes
# are not frozen at first, for PyTorch would leave out what ours computes and drops.
_VIEWS = {
  "augment.num_local": 8,
  "augment.global_scale": (0.4, 1.0),
  "optim.freeze_prototypes_epochs": 0.0,
}


# Batches that are tried until one fits. Where the scores alone would fill 80 GB it starts lower: a
# try costs a compilation.
_BATCHES = (256, 128, 64)


def _speed(
  name, config, seconds=100, parts=("augment", "forward", "update"), batches=_BATCHES, **changes
):
  changes = {key.replace("__", "."): value for key, value in changes.items()}
  options = {
    "config": config,
    "changes": _VIEWS | changes,
    "parts": parts,
    "batches": batches,
  }
  return Item(f"speed/{name}", "speed", options, seconds)


_DINO, _GMM = "configs/dino_vit_s.py", "configs/gmm_vit_s.py"
_MOVING = ("augment", "forward", "update", "prototypes")
_BARLOW = {
  "augment__num_local": 0,
  "model__name": "vit_small",
  "optim__name": "adamw",
  "optim__lr": 5e-4,
}


def _peer(name, config, compiled, **changes):
  item = _speed(name, config, 150 if compiled else 40, parts=(), **changes)
  return item._replace(work="peer_speed", options={**item.options, "compiled": compiled})


_RESNET50 = "configs/barlow_twins_resnet50.py"
_SPEED = [
  _speed("dino", _DINO, 150, ("ready",)),
  _speed("dino, cudnn attention", _DINO, 120, ("ready",), model__attention="cudnn"),
  _peer("dino, PyTorch", _DINO, False),
  _peer("dino, PyTorch compiled", _DINO, True),
  _speed("gmm", _GMM, parts=_MOVING),
  _speed("barlow_twins", _RESNET50, 90, ("augment", "update", "ready"), **_BARLOW),
  _peer("barlow_twins, PyTorch", _RESNET50, False, **_BARLOW),
  _peer("barlow_twins, PyTorch compiled", _RESNET50, True, **_BARLOW),
  _speed("gmm, K 4,096", _GMM, 80, ("prototypes",), method__num_prototypes=4096),
  _speed(
    "gmm, K 262,144", _GMM, 80, ("prototypes",), (128, 64, 32), method__num_prototypes=262_144
  ),
  # Prototypes by blocks, beside all at once: chosen by memory above 2^27 scores, asked for below.
  _speed("gmm, by blocks", _GMM, 80, ("prototypes",), method__block=8192),
  _speed(
    "gmm, K 262,144, at once",
    _GMM,
    80,
    ("prototypes",),
    (128, 64, 32),
    method__num_prototypes=262_144,
    method__block=0,
  ),
  _speed(
    "gmm, K 1,048,576", _GMM, 90, ("prototypes",), (128, 64, 32), method__num_prototypes=1_048_576
  ),
  # Beside it products in TF32 (docs/scale.md has their errors); "high" is the same on these cards.
  _speed(
    "gmm, K 1,048,576, default",
    _GMM,
    80,
    ("prototypes",),
    (128, 64, 32),
    method__num_prototypes=1_048_576,
    method__precision="default",
  ),
  _speed(
    "ibot, K 65,536", "configs/ibot_vit_s.py", batches=(64, 32, 16), method__num_prototypes=65_536
  ),
  _speed(
    "carp, ResNet-50, mixture",
    "configs/carp_resnet50.py:gmm",
    120,
    _MOVING,
    augment__num_local=6,
    augment__global_scale=(0.2, 1.0),
  ),
]

# c. The README's table at a real budget: its small ViT, batch 512, 100 epochs.
_BUDGET = {
  "batch_size": 512,
  "num_steps": 0,
  "num_epochs": 100.0,
  "optim.warmup_steps": 0,
  "optim.warmup_epochs": 10.0,
}
_ROWS = {
  "dino joint": ("configs/dino_cifar10.py", {}),
  "dino mixture": ("configs/gmm_cifar10.py", {}),
  # 1,000 units of responsibility are 1,000 balanced steps of 1,024 teacher rows.
  "dino paper": ("configs/gmm_cifar10.py:paper", {"mixture.horizon_steps": 1000.0}),
  "dino frozen": ("configs/frozen_cifar10.py", {}),
  "carp joint": ("configs/carp_cifar10.py", {}),
  "carp mixture": ("configs/carp_cifar10.py:gmm", {}),
  "swav joint": ("configs/swav_cifar10.py", {}),
  "swav mixture": ("configs/swav_cifar10.py:gmm", {}),
  "self-classifier": ("configs/self_classifier_cifar10.py", {}),
  "falcon": ("configs/falcon_cifar10.py", {}),
  "vicreg": ("configs/vicreg_cifar10.py", {}),
  "barlow twins": ("configs/barlow_twins_cifar10.py", {}),
}


def _rows(part, seconds, **more):
  more = {key.replace("__", "."): value for key, value in more.items()}
  return [
    Item(f"{part}/{name}", "row", {"config": path, "changes": _BUDGET | changes | more}, seconds)
    for name, (path, changes) in _ROWS.items()
  ]


# d. ResNet-18 with the CIFAR stem, 200 epochs. Published beside it are k-NN accuracies (k = 200,
# T = .1, the best epoch on the test images) of lightly's CIFAR-10 benchmark, whose settings these
# are as far as ours have them: no warm-up, constant teacher momentum there, ours rises to 1.
_RESNET18 = {
  "batch_size": 512,
  "num_steps": 0,
  "num_epochs": 200.0,
  "precision": "bfloat16",
  "model.name": "resnet18",
  "model.stem": "cifar",
  "model.zero_init_residual": False,
  "augment.num_local": 0,
  "head.layers": 2,
  "head.norm": "batch",
  "optim.clip": 0.0,
  "optim.warmup_steps": 0,
  "optim.warmup_epochs": 0.0,
  "optim.final_lr": 0.0,
  "probe.k": 200,
  "probe.temperature": 0.1,
}
_RESNET18_DINO = _RESNET18 | {
  "head.hidden": 2048,
  "head.bottleneck": 256,
  "method.num_prototypes": 2048,
  "method.targets": "center",
  "method.teacher_temp_start": 0.04,
  "method.teacher_temp": 0.04,
  "optim.name": "sgd",
  "optim.lr": 0.12,
  "optim.weight_decay": 5e-4,
  "optim.final_weight_decay": 5e-4,
}
_RESNET18_SWAV = _RESNET18 | {
  "head.hidden": 512,
  "head.bottleneck": 128,
  "method.num_prototypes": 512,
  "method.epsilon": 0.05,
  "augment.global_scale": (0.14, 1.0),
  "optim.name": "adam",
  "optim.lr": 2e-3,
  "optim.weight_decay": 1e-6,
  "optim.final_weight_decay": 1e-6,
  "optim.freeze_prototypes_epochs": 0.0,
}


def _resnet18(name, path, changes, published=None):
  options = {"config": path, "changes": changes, "published_knn": published}
  return Item(f"resnet18/{name}", "row", options, 900)


# FALCON's Table 1 (arXiv 2410.04959): ResNet-8, c = 16,384, and its four rivals, whose settings the
# paper does not give: heads of solo-learn's CIFAR recipes, 2,048 clusters for GEDI, 3,000 and a
# queue for SwAV, Self-Classifier's smallest classifier; optimizer and views as for FALCON.
_RESNET8 = {
  "batch_size": 256,
  "num_steps": 0,
  "num_epochs": 200.0,
  "model.name": "resnet8",
  "model.width": 128,
}
_FALCON8 = "configs/falcon_resnet8_cifar10.py"
_HEAD8 = {
  "head.norm": "batch",
  "head.activation": "relu",
  "head.norm_output": False,
  "head.hidden": 2048,
}
_TABLE1 = {
  "falcon": (_FALCON8, {}, {"nmi": 0.35, "accuracy": 0.68}),
  "barlow twins": (
    _FALCON8,
    _HEAD8
    | {
      "method.name": "barlow_twins",
      "method.prototypes": "none",
      "method.num_prototypes": 0,
      "head.layers": 3,
      "head.bottleneck": 2048,
      "head.bias": False,
    },
    {"nmi": 0.05, "accuracy": 0.65},
  ),
  "swav": (
    _FALCON8,
    _HEAD8
    | {
      "method.name": "swav",
      "method.prototypes": "learned",
      "method.num_prototypes": 3000,
      "head.layers": 2,
      "head.l2": True,
      "method.queue_length": 3840,
      "method.queue_start_epoch": 50.0,
      "optim.freeze_prototypes_epochs": 2.0,
    },
    {"nmi": 0.29, "accuracy": 0.56},
  ),
  "self-classifier": (
    _FALCON8,
    _HEAD8
    | {
      "method.name": "self_classifier",
      "method.prototypes": "learned",
      "method.num_prototypes": 1000,
      "head.layers": 2,
      "head.l2": True,
      "head.activation": "leaky_relu",
    },
    {"nmi": 0.28, "accuracy": 0.59},
  ),
  "gedi": (
    _FALCON8,
    _HEAD8
    | {
      "method.name": "gedi",
      "method.prototypes": "learned",
      "method.num_prototypes": 2048,
      "head.layers": 2,
      "head.bottleneck": 512,
    },
    {"nmi": 0.29, "accuracy": 0.64},
  ),
}


def _table1(name):
  path, changes, published = _TABLE1[name]
  options = {
    "config": path,
    "changes": _RESNET8 | changes,
    "clusters": True,
    "published": published,
  }
  return Item(f"table1/{name}", "row", options, 300)


# Frequent and rare classes: 12,406 images in as many steps as the 100 epochs have.
_TAIL = _BUDGET | {
  "num_steps": 9700,
  "num_epochs": 0.0,
  "optim.warmup_steps": 970,
  "data.imbalance": 100.0,
}


def _long_tail(name):
  path, changes = _ROWS[name]
  options = {"config": path, "changes": _TAIL | changes, "long_tail": True}
  return Item(f"long_tail/{name}", "row", options, 200)


# A head for the backbone that VICReg has trained above, which has none.
def _adapted(name, mode):
  changes = {"batch_size": 512, "num_steps": 2000, "eval_every": 500}
  options = {"config": f"configs/adapt_cifar10.py{mode}", "changes": changes}
  return Item(f"adapt/{name}", "row", options | {"init_from": "patch8/vicreg"}, 60)


# What is worth most, should the time be short: that the machine works, one method's numbers, our
# step beside PyTorch's, and that a whole training runs to its end.
_FIRST = (
  *("machine/works", "parity/gmm", "speed/dino", "speed/dino, cudnn attention"),
  *("speed/dino, PyTorch", "speed/gmm", "patch8/dino joint", "patch8/dino mixture"),
)
_ALL = [
  Item("machine/works", "machine", {}, 30),
  *_PARITY,
  *_SPEED,
  *_rows("patch8", 150),
  *_rows("patch4", 300, model__patch_size=4),
  _resnet18("dino joint", "configs/dino_cifar10.py", _RESNET18_DINO, 0.813),
  _resnet18("dino mixture", "configs/gmm_cifar10.py", _RESNET18_DINO),
  _resnet18("swav joint", "configs/swav_cifar10.py", _RESNET18_SWAV, 0.842),
  _resnet18("swav mixture", "configs/swav_cifar10.py:gmm", _RESNET18_SWAV),
  *[_table1(name) for name in _TABLE1],
  _adapted("mixture", ""),
  _adapted("joint", ":joint"),
  *[_long_tail(name) for name in ("dino joint", "dino mixture", "dino paper")],
  *_rows("patch8, seed 1", 150, seed=1),
  *_rows("patch8, seed 2", 150, seed=2),
]
ITEMS = [
  *sorted((item for item in _ALL if item.name in _FIRST), key=lambda i: _FIRST.index(i.name)),
  *(item for item in _ALL if item.name not in _FIRST),
]
