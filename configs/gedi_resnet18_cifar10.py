r"""GEDI without the generative term on CIFAR-10, ResNet-18, 1,000 epochs: the released constants.

  python -m protojax.main --config=configs/gedi_resnet18_cifar10.py \
    --workdir=runs/gedi_resnet18_cifar10 --config.data.data_dir=$PROTOJAX_DATA_DIR

What differs: the loss is the mean over clusters, of both views (--config.method.legacy=True takes
the released sum of the first); the last layer, there Linear(2048, 2048), is factored through 512
dimensions; biases and norms neither adapt nor decay, as there they do; the warm-up starts at 0; the
encoder computes in bfloat16.

Cost and result: not measured yet.
"""

from configs import common
from protojax import config as configs


def get_config(mode: str = ""):
  config = configs.default("gedi")
  config.num_epochs = 1000.0
  config.batch_size = 256
  config.precision = "bfloat16"
  config.eval_every = 20_000
  config.save_every = 2000
  config.data.update({"name": "cifar10", "image_size": 32})
  config.probe.batch_size = 256
  config.augment.update({
    "global_size": 32, "global_scale": (0.08, 1.0), "num_local": 0, "blur_prob": (0.0, 0.0, 0.0),
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
  })  # fmt: skip
  config.model.update({"name": "resnet18", "stem": "cifar_pad2", "zero_init_residual": False})
  config.head.update(
    {
      "layers": 2,
      "hidden": 2048,
      "bottleneck": 512,
      "norm": "batch",
      "activation": "relu",
      "init": "uniform",
      "l2": False,
    }
  )
  config.method.update({"prototypes": "learned", "num_prototypes": 2048})
  config.optim.update(
    {
      "name": "lars",
      "lr": 0.3,
      "final_lr": 0.0,
      "warmup_epochs": 10.0,
      "weight_decay": 1e-4,
      "final_weight_decay": 1e-4,
      "clip": 0.0,
      "freeze_prototypes_epochs": 0.0,
    }
  )
  return common.finish(config, mode)
