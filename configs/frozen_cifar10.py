r"""The control: DINO's loss against random prototypes that never move, CIFAR-10, small ViT.

  protojax train --config=frozen_cifar10 --workdir=runs/frozen_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: 2,000 steps, 12 minutes on two CPU cores that did other work too (363 img/s). CIFAR-10 (JPEG
copy), seed 0, commit 44e5ee4: used 20.4 %, unique 100 % at every threshold, k-NN 36.1 %, linear
42.5 %.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  """Modes: "" as they are, "centred" beside a mixture, "debug" a minute's run.

  A mixture compares features without their running mean. The control of that alone is one whose
  means have so long a horizon that they stay where they are.
  """
  config = common.dino_cifar10()
  config.method.prototypes = "frozen"
  if mode == "centred":
    config.method.prototypes = "mixture"
    config.mixture.horizon_steps = 1e9
  return common.finish(config, mode, "centred")
