"""What several recipes share. Not a recipe: it has no command of its own."""

from protojax import config as configs
from protojax import errors


def finish(config, mode: str, *others: str):
  """Applies the mode of `--config=FILE.py:MODE`: "" or "debug" (a minute's run, `digits`, CPU).

  Args:
    config: the recipe's.
    mode: as typed.
    others: modes that the recipe has applied itself.

  Raises:
    UserError: for any other mode; `recipes.load` puts the recipe before it.
  """
  if mode not in ("", "debug", *others):
    known = ", ".join(("debug", *others))
    raise errors.UserError(f"mode {mode!r} is unknown: this recipe has {known}")
  return configs.debug(config) if mode == "debug" else config


def finish_joint_or_mixture(config, mode: str):
  """`finish` for learned prototypes or, in mode "gmm", decoupled ones."""
  config.method.prototypes = "mixture" if mode == "gmm" else "learned"
  return finish(config, mode, "gmm")


def adapted(config, mode: str):
  """`finish` for prototypes new to a given backbone: decoupled or, in mode "joint", learned."""
  config.method.prototypes = "learned" if mode == "joint" else "mixture"
  return finish(config, mode, "joint")


def paper_mixture(config) -> None:
  """The mixture of arXiv 2510.20108 as far as it can be read, in place of the library's.

  Published: components with weights, means and diagonal covariances; responsibilities by annealed
  posterior; forgetting by responsibility; one EM step before each loss, on the teacher's features
  of the global views; means on the sphere. Not read anywhere and chosen here: the form of the
  forgetting and its window (eta = .999), beta from .1 to 1 over half of the run, variances from
  1 / D and their floor, means that start as random directions. The weights stay uniform, see
  `mixture.Options.mass`.
  """
  config.method.em_order = "before_loss"
  config.mixture.update(
    {
      "covariance": "diagonal",
      "mass": "ca",
      "window": 1000.0,
      "use_pi": True,
      "balanced": False,
      "center_features": False,
      "beta": 0.1,
      "beta_final": 1.0,
      "anneal_share": 0.5,
    }
  )


def imagenet(method: str, *, num_epochs: float, batch_size: int):
  """The defaults, which are DINO's for ViT-S/16, on ImageNet-1k in bfloat16."""
  config = configs.default(method)
  config.num_epochs = num_epochs
  config.batch_size = batch_size
  config.precision = "bfloat16"
  config.data.update({"name": "imagenet2012", "image_size": 512})
  config.probe.update({"test_split": "validation", "batch_size": 256, "crop": 0.875})
  config.eval_every = 25_000
  config.save_every = 2500
  return config


def cifar10(method: str = "dino"):
  """CIFAR-10 with a net that trains at some hundred images a second on two CPU cores.

  ViT of .47 M parameters (patch 8, width 96, 4 blocks), 1,024 prototypes of dimension 128, two
  global views of 32 px and two local ones of 16 px.
  """
  config = configs.default(method)
  config.num_steps = 2000
  config.batch_size = 128
  config.save_every = 500
  config.eval_every = 1000
  config.monitor.every = 200
  config.data.update({"name": "cifar10", "image_size": 32})
  config.augment.update({
    "global_size": 32, "global_scale": (0.4, 1.0), "local_size": 16, "local_scale": (0.1, 0.4),
    "num_local": 2, "blur_prob": (0.0, 0.0, 0.0),
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
  })  # fmt: skip
  config.model.update(
    {
      "name": "vit_tiny",
      "patch_size": 8,
      "width": 96,
      "depth": 4,
      "heads": 3,
      "drop_path": 0.0,
    }
  )
  config.head.update({"hidden": 512, "bottleneck": 128})
  if config.method.prototypes != "none":
    config.method.num_prototypes = 1024
  config.optim.update(
    {
      "lr": 1e-3,
      "final_lr": 1e-5,
      "weight_decay": 0.04,
      "final_weight_decay": 0.04,
      "warmup_steps": 200,
      "freeze_prototypes_epochs": 0.0,
    }
  )
  config.teacher.momentum = 0.99
  return config


def dino_cifar10():
  """`cifar10` with DINO's loss and Sinkhorn targets at temperature .05."""
  config = cifar10("dino")
  config.method.update(
    {
      "targets": "sinkhorn",
      "teacher_temp_start": 0.05,
      "teacher_temp": 0.05,
      "teacher_temp_warmup_epochs": 0,
    }
  )
  return config


def _redundancy(config, width: int) -> None:
  """What Barlow Twins and VICReg share: two views and a wide projector with batch norm."""
  config.augment.update({"global_scale": (0.08, 1.0), "num_local": 0})
  config.head.update(
    {
      "hidden": width,
      "bottleneck": width,
      "norm": "batch",
      "activation": "relu",
      "bias": False,
      "init": "uniform",
      "l2": False,
    }
  )
  config.optim.clip = 0.0


def redundancy_cifar10(method: str):
  """`cifar10` for Barlow Twins or VICReg.

  Views and depth of the head are those of solo-learn's recipes for CIFAR; the head is half as wide,
  and AdamW, which suits a ViT, takes the place of LARS. Those recipes are for a ResNet-18 and 1,000
  epochs at a batch of 256, with optim.name=lars, lr=.3, weight_decay=1e-4, trust=.02 and
  lars_clip=True.
  """
  config = cifar10(method)
  _redundancy(config, 1024)
  return config


def redundancy_resnet50(method: str):
  """ResNet-50 on ImageNet-1k for 1,000 epochs, as published for Barlow Twins and for VICReg."""
  config = imagenet(method, num_epochs=1000.0, batch_size=2048)
  config.eval_every = 50_000
  config.save_every = 5000
  _redundancy(config, 8192)
  config.model.update({"name": "resnet50", "zero_init_residual": True})
  config.optim.update(
    {
      "name": "lars",
      "lr": 0.2,
      "final_lr": 1.6e-3,
      "warmup_epochs": 10.0,
      "weight_decay": 1e-6,
      "final_weight_decay": 1e-6,
    }
  )
  return config


def solo_cifar10(method: str, model: str):
  """CIFAR-10 as solo-learn has it, whose fork is the published code of FALCON and GEDI.

  Two asymmetric views; LARS of batches of 256, ten epochs of warm-up. The head, the rates and the
  length of the run are left to the recipe.
  """
  config = configs.default(method)
  config.batch_size = 256
  config.eval_every = 20_000
  config.save_every = 2000
  config.data.update({"name": "cifar10", "image_size": 32})
  config.augment.update({
    "global_size": 32, "global_scale": (0.08, 1.0), "num_local": 0, "blur_prob": (0.0, 0.0, 0.0),
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
  })  # fmt: skip
  config.model.update({"name": model, "zero_init_residual": False})
  config.head.update({"init": "uniform", "l2": False})
  config.optim.update(
    {
      "name": "lars",
      "lr": 0.3,
      "final_lr": 0.0,
      "weight_decay": 1e-4,
      "final_weight_decay": 1e-4,
      "warmup_epochs": 10.0,
      "warmup_start": 3e-5,
      "clip": 0.0,
      "freeze_prototypes_epochs": 0.0,
    }
  )
  return config


def falcon_resnet_cifar10(model: str):
  """CIFAR-10 as the code of arXiv 2410.04959 has it for its own method: Adam with L2, batch 64.

  16,384 codes; `head.bottleneck` and the length of the run are left to the recipe.
  """
  config = solo_cifar10("falcon", model)
  config.batch_size = 64
  config.save_every = 5000
  config.head.update({"layers": 1, "norm_output": True})
  config.method.num_prototypes = 16_384
  # 3e-5 for the batch at the start.
  config.optim.update({"name": "adam", "lr": 1e-3, "warmup_start": 1.2e-4})
  return config


def gedi_solo_cifar10(model: str):
  """GEDI without the generative term, as that code has it: 2,048 clusters, LARS on everything."""
  config = solo_cifar10("gedi", model)
  config.head.update(
    {
      "layers": 2,
      "hidden": 2048,
      "bottleneck": 512,
      "norm": "batch",
      "activation": "relu",
    }
  )
  config.method.update({"prototypes": "learned", "num_prototypes": 2048})
  config.optim.decay_all = True
  return config
