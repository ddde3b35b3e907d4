r"""SwAV (arXiv 2006.09882), ResNet-50, ImageNet-1k: the published recipe for a batch of 256.

  protojax train --config=swav_resnet50 --workdir=runs/swav_resnet50 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

The length, 200 epochs, is a choice, not a constant of the method. The published recipe for a batch
of 4,096 differs in: optim.lr=.3, optim.warmup_start=.01875 (both per 256), optim.final_lr=.0048,
optim.warmup_epochs=10, method.queue_length=0, optim.freeze_prototypes_steps=313.

Cost and result: not measured yet.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.imagenet("swav", num_epochs=200.0, batch_size=256)
  config.eval_every = 50_000
  config.save_every = 5000
  config.augment.update({
    "global_scale": (0.14, 1.0), "local_scale": (0.05, 0.14), "num_local": 6,
    "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2,
    "blur_prob": (0.5, 0.5, 0.5), "solarize_prob": (0.0, 0.0, 0.0),
    "std": (0.228, 0.224, 0.225), "interpolation": "bilinear",
  })  # fmt: skip
  config.model.update({"name": "resnet50", "joint_norm": True, "zero_init_residual": False})
  config.head.update(
    {
      "layers": 2,
      "hidden": 2048,
      "bottleneck": 128,
      "norm": "batch",
      "activation": "relu",
      "init": "uniform",
    }
  )
  config.method.update(
    {
      "prototypes": "learned",
      "num_prototypes": 3000,
      "queue_length": 3840,
      "queue_start_epoch": 15.0,
    }
  )
  config.optim.update(
    {
      "name": "lars",
      "lr": 0.6,
      "final_lr": 6e-4,
      "warmup_epochs": 0.0,
      "weight_decay": 1e-6,
      "final_weight_decay": 1e-6,
      "decay_all": True,
      "clip": 0.0,
      "freeze_prototypes_steps": 5005,
    }
  )
  return common.finish(config, mode)
