r"""Barlow Twins (arXiv 2103.03230) on CIFAR-10, small ViT.

  python -m protojax.main --config=configs/barlow_twins_cifar10.py \
    --workdir=runs/barlow_twins_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

Views, head and optimizer are those of common.redundancy_cifar10. The loss is not scaled, which
AdamW would not notice.

Cost and result: not measured yet.
"""

from configs import common


def get_config(mode: str = ""):
  config = common.redundancy_cifar10("barlow_twins")
  return common.finish(config, mode)
