r"""Self-Classifier (arXiv 2103.10994) on CIFAR-10, small ViT.

The classifier is learned or, in mode "gmm", a decoupled mixture.

  protojax train --config=self_classifier_cifar10 \
    --workdir=runs/self_classifier_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR
  protojax train --config=self_classifier_cifar10:gmm \
    --workdir=runs/self_classifier_gmm_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

Two global and two local views and the form of the head as published for ImageNet (no recipe for
CIFAR was); AdamW, which suits a ViT, takes the place of LARS. A batch of 128 leaves a least loss of
ln(1024 / 128) = 2.08.

Cost: 2,000 steps, 10 minutes on two CPU cores at 452 img/s. CIFAR-10 (JPEG copy), seed 0, commit
507166e: loss 5.92, used 89.1 %, unique 100 % up to .25 and 54.3 % at .5, k-NN 44.8 %, linear
46.4 %. Mode "gmm": not measured yet.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.cifar10("self_classifier")
  config.head.update({"layers": 2, "norm": "batch", "activation": "leaky_relu"})
  return common.finish_joint_or_mixture(config, mode)
