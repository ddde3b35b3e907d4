r"""MSN (arXiv 2204.07141) on CIFAR-10, small ViT: two of sixteen patches are left out.

Prototypes are learned or, in mode "gmm", decoupled.

  python -m protojax.main --config=configs/msn_cifar10.py --workdir=runs/msn_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR
  python -m protojax.main --config=configs/msn_cifar10.py:gmm --workdir=runs/msn_gmm_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost and result: not measured yet.
"""

from configs import common


def get_config(mode: str = ""):
  config = common.cifar10("msn")
  config.head.norm = "batch"
  return common.finish_joint_or_mixture(config, mode)
