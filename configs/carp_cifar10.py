r"""CARP (Silva, Ramírez Rivera, NeurIPS 2023) on CIFAR-10, small ViT.

Prototypes are learned or, in mode "gmm", decoupled.

  python -m protojax.main --config=configs/carp_cifar10.py --workdir=runs/carp_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR
  python -m protojax.main --config=configs/carp_cifar10.py:gmm --workdir=runs/carp_gmm_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost and result: not measured yet.
"""

from configs import common


def get_config(mode: str = ""):
  config = common.cifar10("carp")
  config.method.partition_size = 128
  config.method.prototypes = "mixture" if mode == "gmm" else "learned"
  # As published: no normalisation at the end (the norm of the features is the inverse temperature)
  # and batch norm inside, without which that norm starts near zero and learns slowly.
  config.head.update({"l2": False, "norm": "batch"})
  return config if mode == "gmm" else common.finish(config, mode)
