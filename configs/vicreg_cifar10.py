r"""VICReg (arXiv 2105.04906) on CIFAR-10, small ViT.

  protojax train --config=vicreg_cifar10 --workdir=runs/vicreg_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Views, head and optimizer are those of common.redundancy_cifar10; the weights are solo-learn's.

Cost: 2,000 steps, 15 minutes on two CPU cores that did other work too; 522 img/s at the end.
CIFAR-10 (JPEG copy), seed 0, commit 507166e: loss 33.5, k-NN 48.1 %, linear 48.0 %.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.redundancy_cifar10("vicreg")
  config.augment.update({"global_scale": (0.2, 1.0), "solarize_prob": (0.1, 0.1, 0.0)})
  return common.finish(config, mode)
