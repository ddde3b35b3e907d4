r"""FALCON / CPLearn (arXiv 2410.04959), CIFAR-10, ResNet-18: the recipe of the published code.

  protojax train --config=falcon_resnet18_cifar10 \
    --workdir=runs/falcon_resnet18_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

16,384 codes of 2,048 dimensions behind a tanh, Adam with L2, batches of 64. Ours differs in three
ways: bfloat16 instead of float16, running statistics that move once a step instead of once a view,
and the online probe, which sees images without augmentation and has an optimizer of its own. Modes:
"" the code, "l2" cosines, as the paper's first version has them, "debug" a minute's run.

Cost and result: not measured yet. The authors name 8 hours on an A100 for their PyTorch code.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.falcon_resnet_cifar10("resnet18")
  config.num_epochs = 1000.0
  config.precision = "bfloat16"
  config.model.stem = "cifar_pad2"
  config.head.bottleneck = 2048
  config.method.assign = "l2" if mode == "l2" else "tanh"
  return common.finish(config, mode, "l2")
