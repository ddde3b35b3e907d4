r"""FALCON (arXiv 2410.04959), CIFAR-10, ResNet-8: the small experiments of the paper.

  protojax train --config=falcon_resnet8_cifar10 \
    --workdir=runs/falcon_resnet8_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

16,384 codes of 128 dimensions, compared by cosines; the backbone has no batch norm, the projector
has. The ResNet-8 is a reconstruction (models/resnet.py); optimizer and augmentation are those of
the published code, which has no ResNet-8; the epochs are ours. For CIFAR-100 the paper doubles the
width: --config.model.width=256 --config.head.bottleneck=256, with --config.data.name=cifar100 and
its --config.augment.mean="(.5071, .4865, .4409)" --config.augment.std="(.2673, .2564, .2762)".

Cost and result: not measured yet. The authors report NMI .35 over test images and 68 % accuracy;
with 16,384 clusters of 10,000 images chance alone has an NMI of .353.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.falcon_resnet_cifar10("resnet8")
  config.num_epochs = 200.0
  config.model.width = 128
  config.head.bottleneck = 128
  return common.finish(config, mode)
