r"""Self-Classifier (arXiv 2103.10994), ResNet-50, ImageNet-1k, 100 epochs: the published recipe.

  protojax train --config=self_classifier_resnet50 \
    --workdir=runs/self_classifier_resnet50 --config.data.data_dir=$PROTOJAX_DATA_DIR

Four classifiers; two global and six local views. What differs: a batch of 4,096, where the authors
have 62 images on each of 66 devices; no queue of nearest neighbours. Their recipe for 800 epochs
differs in optim.lr=.2, optim.warmup_start=.0125 (both per 256) and optim.final_lr=.0032.

Cost: not measured here. The authors report 72.4 % linear for their PyTorch code (800 epochs: 74.1).
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.imagenet("self_classifier", num_epochs=100.0, batch_size=4096)
  config.eval_every = 6000
  config.save_every = 1000
  config.method.update({"num_prototypes": 1000, "more_classifiers": (2000, 4000, 8000)})
  # DINO's views, but that the second global one is the blurred one.
  config.augment.update({"num_local": 6, "blur_prob": (0.1, 1.0, 0.5)})
  config.model.update({"name": "resnet50", "joint_norm": True, "zero_init_residual": False})
  config.head.update(
    {
      "layers": 2,
      "hidden": 4096,
      "bottleneck": 128,
      "norm": "batch",
      "activation": "leaky_relu",
    }
  )
  # 4.8 for the batch, from .3.
  config.optim.update(
    {
      "name": "lars",
      "lr": 0.3,
      "final_lr": 4.8e-3,
      "warmup_epochs": 10.0,
      "warmup_start": 0.01875,
      "weight_decay": 1e-6,
      "final_weight_decay": 1e-6,
      "decay_all": True,
      "clip": 0.0,
      "freeze_prototypes_epochs": 0.0,
    }
  )
  return common.finish(config, mode)
