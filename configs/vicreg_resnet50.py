r"""VICReg (arXiv 2105.04906), ResNet-50, ImageNet-1k, 1,000 epochs: the published recipe.

  protojax train --config=vicreg_resnet50 --workdir=runs/vicreg_resnet50 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

The variance terms are averaged over the views, as in the authors' code. They advise optim.lr=.3 for
a batch of 512 and .5 for 256.

Cost: not measured here. The authors report 73.2 % linear for their PyTorch code.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  # Biases of the hidden layers, which the authors have, stand before a norm and would do nothing.
  config = common.redundancy_resnet50("vicreg")
  config.method.var_reduction = "mean"
  return common.finish(config, mode)
