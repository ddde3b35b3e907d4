r"""Barlow Twins (arXiv 2103.03230), ResNet-50, ImageNet-1k, 1,000 epochs: the published recipe.

  python -m protojax.main --config=configs/barlow_twins_resnet50.py \
    --workdir=runs/barlow_twins_resnet50 --config.data.data_dir=$PROTOJAX_DATA_DIR

The published learning rate of biases and norms, .0048 where that of weights is .2, is here a loss
times .024: LARS does not see the loss's scale, the others do.

Cost: not measured here. The authors report 73.5 % linear for their PyTorch code.
"""

from configs import common
from protojax import config as configs


def get_config(mode: str = ""):
  config = configs.default("barlow_twins")
  config.num_epochs = 1000.0
  config.batch_size = 2048
  config.precision = "bfloat16"
  config.data.update({"name": "imagenet2012", "image_size": 256, "num_workers": 8})
  config.probe.update({"test_split": "validation", "batch_size": 256, "crop": 0.875})
  config.eval_every = 50_000
  config.save_every = 5000
  config.method.scale = 0.024
  config.augment.update({"global_scale": (0.08, 1.0), "num_local": 0})
  config.model.update({"name": "resnet50", "zero_init_residual": True})
  config.head.update({
    "hidden": 8192, "bottleneck": 8192, "norm": "batch", "activation": "relu", "bias": False,
    "init": "uniform", "l2": False,
  })  # fmt: skip
  config.optim.update({
    "name": "lars", "lr": 0.2, "final_lr": 1.6e-3, "warmup_epochs": 10.0, "weight_decay": 1e-6,
    "final_weight_decay": 1e-6, "clip": 0.0,
  })  # fmt: skip
  return common.finish(config, mode)
