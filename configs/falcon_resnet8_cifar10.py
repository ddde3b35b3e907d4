r"""FALCON (arXiv 2410.04959) and what it is compared with in the paper's first table, on CIFAR-10.

  protojax train --config=falcon_resnet8_cifar10 \
    --workdir=runs/falcon_resnet8_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR
  protojax train --config=falcon_resnet8_cifar10:swav \
    --workdir=runs/swav_resnet8_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

Modes: "" FALCON, 16,384 codes of 128 dimensions compared by cosines; "barlow_twins"; "swav";
"self_classifier"; "gedi", without its generative term. All have the same ResNet-8 without batch
norm, a reconstruction (models/resnet.py): the published code has none.

The heads, views and optimizers are those that the code has for CIFAR-10 and a ResNet-18, FALCON's
batches of 64, the others' of 256. What is not published and is chosen here: 200 epochs; one
classifier of 1,000 classes for Self-Classifier, with the head of its own code. For CIFAR-100 the
paper doubles the width: --config.model.width=256 (FALCON: --config.head.bottleneck=256 too), with
--config.data.name=cifar100 and its --config.augment.mean="(.5071, .4865, .4409)"
--config.augment.std="(.2673, .2564, .2762)".

Cost and result: not measured yet. The authors report NMI over test images and accuracy: FALCON .35,
68 %; Barlow Twins .05, 65 %; SwAV .29, 56 %; Self-Classifier .28, 59 %; GEDI .29, 64 %. With 16,384
clusters of 10,000 images chance alone has an NMI of .353.
"""

from protojax.recipes import common


def _barlow_twins():
  config = common.solo_cifar10("barlow_twins", "resnet8")
  config.head.update(
    {
      "hidden": 2048,
      "bottleneck": 2048,
      "norm": "batch",
      "activation": "relu",
    }
  )
  config.method.scale = 0.1
  config.optim.update({"trust": 0.02, "lars_clip": True})
  return config


def _swav():
  config = common.solo_cifar10("swav", "resnet8")
  # Both views get the same strong colours, and none is solarised.
  config.augment.update({
    "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2,
    "blur_prob": (0.5, 0.5, 0.5), "solarize_prob": (0.0, 0.0, 0.0),
  })  # fmt: skip
  config.head.update(
    {
      "layers": 2,
      "hidden": 2048,
      "bottleneck": 128,
      "norm": "batch",
      "activation": "relu",
      "l2": True,
    }
  )
  config.method.update(
    {
      "prototypes": "learned",
      "num_prototypes": 3000,
      "queue_length": 3840,
      "queue_start_epoch": 50.0,
    }
  )
  config.optim.update(
    {
      "lr": 0.6,
      "weight_decay": 1e-6,
      "final_weight_decay": 1e-6,
      "trust": 0.02,
      "lars_clip": True,
      "freeze_prototypes_epochs": 2.0,
    }
  )
  return config


def _self_classifier():
  config = common.solo_cifar10("self_classifier", "resnet8")
  config.head.update(
    {
      "layers": 2,
      "hidden": 4096,
      "bottleneck": 128,
      "norm": "batch",
      "activation": "leaky_relu",
      "init": "normal",
      "l2": True,
    }
  )
  config.method.num_prototypes = 1000
  config.optim.update({"trust": 0.02, "lars_clip": True})
  return config


def _falcon():
  config = common.falcon_resnet_cifar10("resnet8")
  config.head.bottleneck = 128
  return config


def get_config(mode: str = ""):
  compared = {
    "barlow_twins": _barlow_twins,
    "swav": _swav,
    "self_classifier": _self_classifier,
    "gedi": lambda: common.gedi_solo_cifar10("resnet8"),
  }
  config = compared.get(mode, _falcon)()
  config.num_epochs = 200.0
  config.model.width = 128
  return common.finish(config, mode, *compared)
