r"""Barlow Twins (arXiv 2103.03230) on CIFAR-10, small ViT.

  python -m protojax.main --config=configs/barlow_twins_cifar10.py \
    --workdir=runs/barlow_twins_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

Views, head and optimizer are those of common.redundancy_cifar10; the weights are solo-learn's.

Cost and result: not measured yet.
"""

from configs import common


def get_config(mode: str = ""):
  config = common.redundancy_cifar10("barlow_twins")
  config.method.scale = 0.1
  return common.finish(config, mode)
