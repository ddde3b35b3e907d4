r"""Decoupled prototypes (arXiv 2510.20108) on CIFAR-10, small ViT, DINO's loss.

  protojax train --config=gmm_cifar10 --workdir=runs/gmm_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: 2,000 steps, 13 minutes on two CPU cores that did other work too (338 img/s). CIFAR-10 (JPEG
copy), seed 0, commit cdca7fe: used 64.7 %, unique 100 / 100 / 100 / 100 / 98.5 % at .025 / .05 /
.1 / .25 / .5, k-NN 37.4 %, linear 42.1 %. Mode "paper" (commit 44e5ee4): used 1.7 %,
unique 100 % at every threshold, k-NN 36.6 %, linear 42.6 %.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  """Modes: "" the best trade-off found, "paper" the plain mixture, "debug" a minute's run."""
  config = common.dino_cifar10()
  if mode == "paper":
    # 1,000 units of responsibility, as in the specification of the method: 4,000 balanced steps.
    config.mixture.update(
      {
        "balanced": False,
        "center_features": False,
        "kappa": 20.0,
        "horizon_steps": 4000.0,
      }
    )
  return common.finish(config, mode, "paper")
