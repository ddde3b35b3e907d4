r"""Barlow Twins (arXiv 2103.03230) on CIFAR-10, small ViT.

  protojax train --config=barlow_twins_cifar10 \
    --workdir=runs/barlow_twins_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

Views, head and optimizer are those of common.redundancy_cifar10. The loss is not scaled, which
AdamW would not notice.

Cost: 2,000 steps, 9 minutes on two CPU cores at 569 img/s. CIFAR-10 (JPEG copy), seed 0, commit
507166e: loss 345, k-NN 43.2 %, linear 44.8 %.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.redundancy_cifar10("barlow_twins")
  return common.finish(config, mode)
