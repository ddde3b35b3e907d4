r"""Barlow Twins (arXiv 2103.03230) on CIFAR-10, small ViT.

  python -m protojax.main --config=configs/barlow_twins_cifar10.py \
    --workdir=runs/barlow_twins_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

Views, weights and depth of the head are those of solo-learn's recipe for CIFAR; the head is half as
wide, and AdamW, which suits a ViT, takes the place of LARS. That recipe is for a ResNet-18 and
1,000 epochs at a batch of 256, with optim.name=lars, lr=.3, weight_decay=1e-4, trust=.02 and
lars_clip=True.

Cost and result: not measured yet.
"""

from configs import common


def get_config(mode: str = ""):
  config = common.cifar10("barlow_twins")
  config.method.scale = 0.1
  config.augment.update({"global_scale": (0.08, 1.0), "num_local": 0})
  config.head.update({
    "hidden": 1024, "bottleneck": 1024, "norm": "batch", "activation": "relu", "bias": False,
    "init": "uniform", "l2": False,
  })  # fmt: skip
  config.optim.clip = 0.0
  return common.finish(config, mode)
