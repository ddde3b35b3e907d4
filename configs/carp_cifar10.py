r"""CARP (Silva, Ramírez Rivera, NeurIPS 2023) on CIFAR-10, small ViT.

Prototypes are learned or, in mode "gmm", decoupled.

  protojax train --config=carp_cifar10 --workdir=runs/carp_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR
  protojax train --config=carp_cifar10:gmm --workdir=runs/carp_gmm_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: 2,000 steps, 13 minutes on two CPU cores that did other work too (394 img/s). CIFAR-10 (JPEG
copy), seed 0, commit 44e5ee4: used 95.0 %, unique 100 / 100 / 100 / 100 / 96.3 % at .025 / .05 /
.1 / .25 / .5, k-NN 41.0 %, linear 43.8 %. Mode "gmm": used 83.8 %, unique 100 / 100 / 100 / 100 /
93.7 %, k-NN 40.8 %, linear 44.5 %.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.cifar10("carp")
  config.method.partition_size = 128
  # As published: no normalisation at the end (the norm of the features is the inverse temperature)
  # and batch norm inside, without which that norm starts near zero and learns slowly.
  config.head.update({"l2": False, "norm": "batch"})
  return common.finish_joint_or_mixture(config, mode)
