r"""The joint baseline: DINO with learned prototypes on CIFAR-10, small ViT.

  python -m protojax.main --config=configs/dino_cifar10.py --workdir=runs/dino_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost and result: not measured yet.
"""

from configs import common


def get_config(mode: str = ""):
  config = common.dino_cifar10()
  config.method.prototypes = "learned"
  return common.finish(config, mode)
