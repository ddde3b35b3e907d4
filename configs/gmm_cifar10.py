r"""Decoupled prototypes (arXiv 2510.20108) on CIFAR-10, small ViT, DINO's loss.

  protojax train --config=gmm_cifar10 --workdir=runs/gmm_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: 2,000 steps, 13 minutes on two CPU cores that did other work too (338 img/s). CIFAR-10 (JPEG
copy), seed 0, commit cdca7fe: used 64.7 %, unique 100 / 100 / 100 / 100 / 98.5 % at .025 / .05 /
.1 / .25 / .5, k-NN 37.4 %, linear 42.1 %. Three seeds: used 63.6 +- 2.1 %, k-NN 38.1 +- .9, linear
42.4 +- .4; random prototypes that never move 17.7 +- 2.4, 35.3 +- 1.0, 41.7 +- .8. Mode "paper", a
reading of the paper's own mixture, three seeds, commit d13606e: used 1.9 +- .1 %, unique 100 % up
to .25 and 99.3 % at .5, k-NN 37.0 +- .4 %, linear 42.4 +- .2 %.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  """Modes: "" the best trade-off found, "paper" a reading of the paper, "debug" a minute's run."""
  config = common.dino_cifar10()
  if mode == "paper":
    common.paper_mixture(config)
  return common.finish(config, mode, "paper")
