r"""GEDI without the generative term on CIFAR-10, ResNet-18, 1,000 epochs: the released constants.

  protojax train --config=gedi_resnet18_cifar10 \
    --workdir=runs/gedi_resnet18_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

What differs: the loss is the mean over clusters, of both views (--config.method.legacy=True takes
the released sum of the first); the last layer, there Linear(2048, 2048), is factored through 512
dimensions into rows of length 1; the encoder computes in bfloat16, there in float16.

Cost and result: not measured yet.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.gedi_solo_cifar10("resnet18")
  config.num_epochs = 1000.0
  config.precision = "bfloat16"
  config.probe.batch_size = 256
  config.model.stem = "cifar_pad2"
  return common.finish(config, mode)
