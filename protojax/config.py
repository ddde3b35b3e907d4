"""Every setting a user can type, with its default; recipes in configs/ change what they need."""

import pathlib
from typing import Any

import ml_collections
from ml_collections import config_dict

from protojax import errors, files, methods

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def default(method: str = "dino") -> ml_collections.ConfigDict:
  """Every setting with its default: ViT-S/16 with decoupled prototypes; comments give the units.

  >>> config = default("swav")
  >>> config.model.name, config.method.prototypes, config.method.temperature
  ('vit_small', 'mixture', 0.1)

  Args:
    method: name of a file in protojax/methods, whose OPTIONS join `config.method`.

  Raises:
    UserError: if there is no such method.
  """
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.num_steps = 0  # optimizer steps; give this or num_epochs
  config.num_epochs = 0.0
  config.steps_per_epoch = 0  # 0: records of the source // batch_size
  config.batch_size = 1024  # global
  config.precision = "float32"  # of the encoder's matrix products: float32 or bfloat16
  # Microbatches of the encoder's forward inside one exact loss; another number on resume redraws
  # drop path.
  config.accum_steps = 1
  # auto; never: refuse a workdir that holds a run; extend: go on with a larger num_steps or
  # num_epochs, and from there on with the schedules of a run of that length.
  config.resume = "auto"
  config.overwrite = False  # delete the run in the workdir first
  config.init_from = config_dict.placeholder(str)  # another run, its exported/, what convert wrote
  config.log_every = 50
  config.save_every = 1000
  config.eval_every = 5000
  config.keep_checkpoints = 2
  # Project at Weights & Biases that gets the numbers too: pip install "protojax[wandb]"; None: off.
  config.wandb = config_dict.placeholder(str)

  config.data = ml_collections.ConfigDict(
    {
      # digits, folder, parquet, tar, a prepared TFDS data set, or a module, my_package.cells
      "name": "digits",
      "data_dir": config_dict.placeholder(str),
      "split": "train",
      # Longest side that is kept of an image, each side for itself, pixels (docs/data.md).
      "image_size": 512,
      "channels": 3,  # 1: grey; or as many as the files have (docs/images.md)
      # Of images of more than 8 bits: (low, high), what becomes black and white, numbers or one for
      # each channel; None: from a sample at the start.
      "value_range": config_dict.placeholder(tuple),
      "imbalance": config_dict.placeholder(float),  # largest class over smallest
      "num_records": 0,  # 0: found out at the start; a run goes on only with as many
      # Processes that decode, for each stream of images; 0: threads; None: chosen by what is there
      # (data/decoding.py).
      "num_workers": config_dict.placeholder(int),
      # Keep the decoded images on the devices: device; off; or auto, where the devices say how much
      # memory they have and an eighth of it is enough (data/cache.py).
      "cache": "auto",
    }
  )
  config.probe = ml_collections.ConfigDict(
    {  # labelled images for k-NN, linear probe, monitor
      "name": config_dict.placeholder(str),  # None: data.name
      "data_dir": config_dict.placeholder(str),  # None: data.data_dir
      "train_split": "train",
      "test_split": "test",  # a folder's may be called val, validation or valid too
      "batch_size": 64,  # of the online linear probe; 0 turns it off
      "lr": 1e-3,
      "k": 20,
      "temperature": 0.07,
      "crop": 1.0,  # centre crop of the evaluation transform; .875 is "resize 256, crop 224"
      "limit": 0,  # evenly spread subset of the bank; 0 takes all of it
    }
  )
  config.monitor = ml_collections.ConfigDict(
    {
      "every": 1000,
      "images": 2048,
      # Of many prototypes those whose partners are looked for among all: see docs/instruments.md.
      # None: all of 65,536, 2,048 of more while training lasts; 0: all.
      "prototypes": config_dict.placeholder(int),
      "stop_on_collapse": False,
    }
  )
  config.augment = ml_collections.ConfigDict({
    # Pixels of a view's side, or (height, width).
    "global_size": config_dict.FieldReference(224, field_type=object),
    "global_scale": (0.4, 1.0),
    "local_size": config_dict.FieldReference(96, field_type=object),
    "local_scale": (0.05, 0.4),
    "num_local": 8,
    "interpolation": "bicubic",  # of the crops; or bilinear, torchvision's default
    "flip": 0.5,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "jitter_prob": 0.8,
    "gray_prob": 0.2,
    "blur_prob": (1.0, 0.1, 0.5),  # first global view, second, local ones
    "blur_sigma": (0.1, 2.0),
    "solarize_prob": (0.0, 0.2, 0.0),
    **IMAGENET,  # "mean" and "std", one for each channel; None: measured at the start
  })  # fmt: skip
  config.model = ml_collections.ConfigDict(
    {
      "name": "vit_small",
      "patch_size": 16,
      "image_size": config_dict.placeholder(object),  # of the position embedding; None: global_size
      "width": config_dict.placeholder(int),  # None: what the name says
      "depth": config_dict.placeholder(int),
      "heads": config_dict.placeholder(int),
      "drop_path": 0.1,
      "registers": 0,
      "layer_scale": config_dict.placeholder(float),
      "norm_eps": 1e-6,  # of layer norms
      # Patches added to the side of the grid that position embeddings are interpolated to: .1 as
      # DINO's and iBOT's code and checkpoints have it; MSN's: 0.
      "position_offset": 0.1,
      # xla; cudnn: NVIDIA's fused kernel, for bfloat16 on their GPUs; pallas: ours for TPUs; auto:
      # pallas in bfloat16 on TPUs, else xla.
      "attention": "auto",
      # Blocks of a transformer as one loop, compiled once for all; None: on TPUs.
      "scan": config_dict.placeholder(bool),
      "stem": "imagenet",  # ResNets: imagenet, cifar or cifar_pad2
      "zero_init_residual": True,
      "joint_norm": False,  # batch norm over all views together instead of view by view
      "remat": False,
    }
  )
  config.head = ml_collections.ConfigDict(
    {
      "layers": 3,
      "hidden": 2048,
      "bottleneck": 256,
      "norm": "none",
      "norm_output": False,
      "activation": "gelu",
      "bias": True,
      "init": "normal",
      "l2": True,
    }
  )
  config.method = ml_collections.ConfigDict(
    {
      "name": method,
      "prototypes": "mixture",  # learned, mixture or frozen; "none" where a method has none
      "num_prototypes": 65_536,
      "train_prototype_norm": False,  # learned prototypes only
      "em_order": "after_step",  # or before_loss, as in arXiv 2510.20108
      # Prototypes that a device compares at a time: a divisor of those it has; 0: all of them;
      # None: all where their scores need no more than half a GiB (prototypes/streaming.py).
      "block": config_dict.placeholder(int),
      # Of products with prototypes, those of a mixture's EM too: highest; high: half as many
      # passes of a TPU's matrix unit; default: one (docs/scale.md has what they cost in errors).
      "precision": "highest",
      **methods.load(method).OPTIONS,
    }
  )
  config.mixture = ml_collections.ConfigDict(
    {
      # The defaults are the best trade-off found between unique and used; see the README's table.
      # Steps until a component with balanced usage forgets a factor e; 0 takes horizon_epochs, and
      # where that is 0 too, twice the run.
      "horizon_steps": 0.0,
      "horizon_epochs": 0.0,
      "horizon_final": config_dict.placeholder(float),  # None: no change; see anneal_steps
      # Rows of responsibility in which a component forgets a factor e; None: by the horizon.
      "window": config_dict.placeholder(float),
      "mass": "ca",
      "covariance": "isotropic",
      "kappa": 100.0,  # 1 / temperature of the posterior over cosines
      "learn_kappa": False,
      "beta": 1.0,
      "beta_final": config_dict.placeholder(float),
      "anneal_share": 0.0,  # of the run, in which horizon and beta move to their final values
      "anneal_steps": 0,  # replaces anneal_share when not 0
      "balanced": True,
      "balance_steps": 3,
      "use_pi": True,  # changes nothing with mass ca, whose weights stay uniform
      "center_features": True,
      "reseed": False,
      "variance_floor": config_dict.placeholder(float),  # None: max(1e-4, .05 / D)
      "momentum": 0.99,  # of the running usage and mean of the features
    }
  )
  config.optim = ml_collections.ConfigDict(
    {
      "name": "adamw",
      "lr": 5e-4,  # per 256 images
      "final_lr": 1e-6,
      "warmup_epochs": 10.0,
      "warmup_steps": 0,  # replaces warmup_epochs when not 0
      "warmup_start": 0.0,  # learning rate at step 0, per 256 images
      # Schedules of learning rate, weight decay and the teacher's momentum are those of a run so
      # many times as long, which this one leaves early.
      "schedule_scale": 1.0,
      "weight_decay": 0.04,
      "final_weight_decay": 0.4,
      "decay_all": False,  # norms and biases too; under LARS they are then adapted as weights are
      "decay_embeddings": True,  # tokens and position embeddings
      "decay_prototypes": True,  # learned ones
      "clip": 3.0,  # longest gradient; 0 turns it off
      "clip_mode": "tensor",  # each; or global: all together; encoder: all but the prototypes'
      "trust": 0.001,  # of LARS: length of a step over that of the weights, at learning rate 1
      "lars_clip": False,  # LARS no faster than SGD: trust ratio over learning rate, at most 1
      # Updates in a row that may be left out because their loss or gradient is not finite; 0 stops
      # at the first (docs/runs.md).
      "skip_nonfinite": 0,
      "freeze_prototypes_epochs": 1.0,
      "freeze_prototypes_steps": 0,
      # Of weights that were given (init_from): the head learns alone at first, then layer i of n
      # with the rate x layer_decay^(n - i).
      "freeze_backbone_epochs": 0.0,
      "freeze_backbone_steps": 0,  # replaces freeze_backbone_epochs when not 0
      "layer_decay": 1.0,
      "beta1": 0.9,
      "beta2": 0.999,
    }
  )
  config.teacher = ml_collections.ConfigDict(
    {
      "momentum": 0.996,  # at the start
      "schedule": "cosine",  # or linear: to 1; PCL's momentum stays
    }
  )
  config.mesh = ml_collections.ConfigDict(
    {
      "data": -1,  # the rest of the devices
      "model": 1,  # devices that share the prototypes; the batch is split over data x model
      # ((regular expression, "replicate" | "fsdp" | "prototypes" | "dictionary" | "rows" |
      # "images"), ...) over the state's paths, first match wins; () takes sharding.DEFAULT_RULES,
      # or with fsdp FSDP_RULES.
      "rules": (),
      # Of transformers: store encoder, teacher and optimizer split over "data" and gather each
      # kernel where it is used (docs/accelerators.md).
      "fsdp": False,
    }
  )
  return config


def restored(plain: dict[str, Any]) -> ml_collections.ConfigDict:
  """A config from what JSON made of one; settings that are missing there have their defaults.

  Args:
    plain: nested; lists become tuples. Without a method it is DINO's.

  Raises:
    UserError: if there is no such method.
    TypeError: if a setting is of another kind than those of a config.
  """

  def tuples(value: Any) -> Any:
    if isinstance(value, dict):
      return {k: tuples(v) for k, v in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value

  method = plain.get("method", {"name": "dino"}) if isinstance(plain, dict) else None
  name = method.get("name", "dino") if isinstance(method, dict) else None
  if not isinstance(name, str):
    raise TypeError("no settings of a run")
  config = default(name)
  _require_kinds(plain, config)
  with config.unlocked(), config.ignore_type():
    try:
      config.update(tuples(plain))
    except OverflowError as error:  # of a number that no float is as large as
      raise TypeError(str(error)) from None
  return config


def _require_kinds(plain: dict[str, Any], known: Any, section: str = "") -> None:
  for key, there in known.items():
    value, name = plain.get(key), section + key
    if key in plain and isinstance(there, ml_collections.ConfigDict):
      if not isinstance(value, dict):
        raise TypeError(f"{name}={value!r} is no section")
      _require_kinds(value, there, f"{name}.")
    elif key in plain and isinstance(there, int | float) and isinstance(value, str | dict | None):
      raise TypeError(f"{name}={value!r} is no number")
    elif isinstance(there, int | float) and isinstance(value, list) and "size" not in key:
      raise TypeError(f"{name}={value!r} is no number")
    elif isinstance(there, str) and isinstance(value, dict | list | float):
      raise TypeError(f"{name}={value!r} is no word")


def of_run(folder: pathlib.Path) -> ml_collections.ConfigDict:
  """The resolved config of the run in a workdir, from its config.json.

  Raises:
    UserError: if it cannot be read.
  """
  path = folder / "config.json"
  try:
    return restored(files.parse_json(path.read_text()))
  except errors.UserError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"{path} cannot be read ({type(error).__name__}): it says what the run there is; give the "
      "workdir of a run, with its config.json"
    ) from None


def switch_method(config: ml_collections.ConfigDict, name: str) -> None:
  """Makes a recipe one of another method, in place, with that method's settings at their defaults.

  Settings of its own that the method before had go; those that every method has stay, unless the
  new method's OPTIONS name them.

  Args:
    config: of a recipe.
    name: as `methods.load` takes it.

  Raises:
    UserError: if there is no such method.
  """
  before, fresh = methods.load(config.method.name).OPTIONS, default(name).method
  after = methods.load(name).OPTIONS
  with config.unlocked(), config.ignore_type():
    for key in set(config.method) - set(fresh):
      del config.method[key]
    for key in before.keys() | after.keys() | {"name"}:
      if key in fresh:
        config.method[key] = fresh[key]


def debug(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Turns a recipe into a minute's run on a CPU: `digits`, two blocks, at most 256 prototypes.

  A ResNet-50 becomes a ResNet-18, and every classifier of several has at most 256 classes. What is
  changed, and returned, is `config` itself.
  """
  if config.model.name == "resnet50":
    config.model.name = "resnet18"
  if "more_classifiers" in config.method:
    config.method.more_classifiers = tuple(min(k, 256) for k in config.method.more_classifiers)
  config.update(
    {
      "num_steps": 20,
      "num_epochs": 0.0,
      "batch_size": 16,
      "log_every": 5,
      "save_every": 10,
      "eval_every": 20,
      "steps_per_epoch": 0,
    }
  )
  config.data.update(
    {
      "name": "digits",
      "data_dir": None,
      "split": "train",
      "image_size": 32,
      "num_workers": 0,
    }
  )
  config.probe.update(
    {
      "name": None,
      "data_dir": None,
      "train_split": "train",
      "test_split": "test",
      "limit": 512,
      "batch_size": 16,
    }
  )
  config.monitor.update({"every": 10, "images": 128})
  config.augment.update(
    {
      "global_size": 32,
      "local_size": 16,
      "num_local": min(config.augment.num_local, 2),
    }
  )
  # The stem for large images is the cheap one.
  config.model.update({"depth": 2, "patch_size": 8, "width": 96, "heads": 3, "stem": "imagenet"})
  config.head.update({"hidden": 128, "bottleneck": 64})
  for kind in ("warmup", "freeze_prototypes"):
    config.optim[f"{kind}_steps"] = min(config.optim[f"{kind}_steps"], 2)
  still = config.optim.freeze_backbone_steps or config.optim.freeze_backbone_epochs
  config.optim.update({"freeze_backbone_epochs": 0.0, "freeze_backbone_steps": 5 if still else 0})
  config.method.num_prototypes = min(config.method.num_prototypes, 256)
  if config.method.block:  # by blocks all the same
    config.method.block = max(config.method.num_prototypes // 8, 1)
  for key, most in (
    ("partition_size", 64),
    ("queue_length", 64),
    ("queue_start_epoch", 0.0),
    ("buffer_size", 64),
    ("sgld_steps", 4),
    ("queue_size", 64),
    ("warmup_epochs", 0),
  ):
    if key in config.method:
      config.method[key] = min(config.method[key], most)
  if "coarse_clusters" in config.method:
    config.method.coarse_clusters = (32, 64)
  return config
