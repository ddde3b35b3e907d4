r"""SwAV (arXiv 2006.09882) on CIFAR-10, small ViT.

Prototypes are learned or, in mode "gmm", decoupled.

  protojax train --config=swav_cifar10 --workdir=runs/swav_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR
  protojax train --config=swav_cifar10:gmm --workdir=runs/swav_gmm_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

With the published queue (30 batches, from the second epoch) and epsilon .05 a run at commit 71baab8
fell to uniform collapse within 300 steps of it; hence neither here.

Cost: 2,000 steps, 14 minutes on two CPU cores that did other work too; 430 img/s at the end.
CIFAR-10 (JPEG copy), seed 0, commit 507166e: used 85.5 %, unique 100 % at every threshold, k-NN
37.5 %, linear 42.2 %. Mode "gmm", commit 884b383, 12 minutes: used 76.9 %, unique 100 % at
every threshold, k-NN 39.4 %, linear 43.5 %.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.cifar10("swav")
  config.method.epsilon = 0.03
  config.head.update({"layers": 2, "norm": "batch", "activation": "relu", "init": "uniform"})
  # Both global views get the same strong colours, and none is solarised.
  config.augment.update({
    "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2,
    "blur_prob": (0.5, 0.5, 0.5), "solarize_prob": (0.0, 0.0, 0.0),
  })  # fmt: skip
  config.optim.freeze_prototypes_epochs = 1.0
  return common.finish_joint_or_mixture(config, mode)
