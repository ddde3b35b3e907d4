r"""Decoupled prototypes for a backbone that has none, on CIFAR-10: the encoder of another run.

  protojax train --config=adapt_cifar10 --workdir=runs/adapted --config.init_from=runs/weights \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

The head is new, the backbone stands still for 300 steps and then moves with it.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  """Modes: "" decoupled prototypes, "joint" learned ones, "debug" a minute's run."""
  config = common.dino_cifar10()
  config.num_steps = 1000
  config.eval_every = 500
  config.optim.update(
    {"lr": 5e-4, "warmup_steps": 100, "freeze_backbone_steps": 300, "layer_decay": 0.75}
  )
  return common.adapted(config, mode)
