r"""Decoupled prototypes (arXiv 2510.20108) on CIFAR-10, small ViT, DINO's loss.

  python -m protojax.main --config=configs/gmm_cifar10.py --workdir=runs/gmm_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: 2,000 steps, 12 minutes on two CPU cores at 350 img/s. CIFAR-10 (JPEG copy), seed 0, commit
e761909: used 74.9 %, unique 100 / 100 / 100 / 97.7 / 42.6 % at .025 / .05 / .1 / .25 / .5,
k-NN 37.5 %, linear 42.8 %.
"""

from configs import common


def get_config(mode: str = ""):
  """Modes: "" the best trade-off found, "paper" the plain mixture, "debug" a minute's run."""
  config = common.dino_cifar10()
  if mode == "paper":
    # 1,000 units of responsibility, as in the specification of the method: 4,000 balanced steps.
    config.mixture.update({
      "balanced": False, "center_features": False, "kappa": 20.0, "horizon_steps": 4000.0,
    })  # fmt: skip
    return config
  return common.finish(config, mode)
