r"""The control: DINO's loss against random prototypes that never move, CIFAR-10, small ViT.

  protojax train --config=frozen_cifar10 --workdir=runs/frozen_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: 2,000 steps, 12 minutes on two CPU cores that did other work too (363 img/s). CIFAR-10 (JPEG
copy), seed 0, commit 44e5ee4: used 20.4 %, unique 100 % at every threshold, k-NN 36.1 %, linear
42.5 %.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.dino_cifar10()
  config.method.prototypes = "frozen"
  return common.finish(config, mode)
