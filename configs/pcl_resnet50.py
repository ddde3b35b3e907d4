r"""PCL v2 (arXiv 2005.04966), ResNet-50, ImageNet-1k, 200 epochs: the published constants.

  protojax train --config=pcl_resnet50 --workdir=runs/pcl_resnet50 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

The augmentation is that of the authors' code with --aug-plus.

Cost: not measured here. The authors report 67.6 % linear for their PyTorch code.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.imagenet("pcl", num_epochs=200.0, batch_size=256)
  config.eval_every = 50_000
  config.save_every = 5000
  config.augment.update({
    "num_local": 0, "global_scale": (0.2, 1.0), "saturation": 0.4,
    "blur_prob": (0.5, 0.5, 0.5), "solarize_prob": (0.0, 0.0, 0.0), "interpolation": "bilinear",
  })  # fmt: skip
  config.model.update({"name": "resnet50", "zero_init_residual": False})
  config.head.update({"layers": 2, "bottleneck": 128, "activation": "relu", "init": "uniform"})
  config.method.update(
    {
      "num_prototypes": 100_000,
      "coarse_clusters": (25_000, 50_000),
      "kmeans_restarts": 5,
    }
  )
  config.optim.update(
    {
      "name": "sgd",
      "lr": 0.03,
      "final_lr": 0.0,
      "warmup_epochs": 0.0,
      "weight_decay": 1e-4,
      "final_weight_decay": 1e-4,
      "decay_all": True,
      "clip": 0.0,
    }
  )
  config.teacher.momentum = 0.999
  return common.finish(config, mode)
