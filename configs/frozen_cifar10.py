r"""The control: DINO's loss against random prototypes that never move, CIFAR-10, small ViT.

  python -m protojax.main --config=configs/frozen_cifar10.py --workdir=runs/frozen_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR
"""

from configs import common


def get_config(mode: str = ""):
  config = common.cifar10()
  config.method.prototypes = "frozen"
  return common.finish(config, mode)
