r"""Barlow Twins (arXiv 2103.03230), ResNet-50, ImageNet-1k, 1,000 epochs: the published recipe.

  protojax train --config=barlow_twins_resnet50 \
    --workdir=runs/barlow_twins_resnet50 --config.data.data_dir=$PROTOJAX_DATA_DIR

The published learning rate of biases and norms, .0048 where that of weights is .2, is here a loss
times .024: LARS sees the loss's scale in the weight decay only, the others do. What also differs:
the authors sum the cross-correlation over their W processes outside of autograd, so each process
has the gradient of its own part, and the mean over processes is 1/W of the true one. So biases and
norms learn W times as slowly there as here. Next to the gradient, weights decay W times as much
there as the true one asks for, and 42 times here: the loss's scale does not scale the decay.

Cost: not measured here. The authors report 73.5 % linear for their PyTorch code.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.redundancy_resnet50("barlow_twins")
  config.method.scale = 0.024
  return common.finish(config, mode)
