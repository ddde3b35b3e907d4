r"""MSN (arXiv 2204.07141) on CIFAR-10, small ViT: three of sixteen patches are left out.

Prototypes are learned or, in mode "gmm", decoupled.

  protojax train --config=msn_cifar10 --workdir=runs/msn_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR
  protojax train --config=msn_cifar10:gmm --workdir=runs/msn_gmm_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: 2,000 steps, 13 minutes on two CPU cores that did other work too; 245 img/s at the end.
CIFAR-10 (JPEG copy), seed 0, commit 884b383: used 85.4 %, unique 100 % at .25, 99.5 % at .5, k-NN
39.5 %, linear 43.9 %; two patches were left out then. Mode "gmm": not measured yet.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.cifar10("msn")
  config.head.norm = "batch"
  return common.finish_joint_or_mixture(config, mode)
