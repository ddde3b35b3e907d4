r"""Decoupled prototypes on a folder of 200 to 20,000 photos, small ViT, minutes on a laptop's CPU.

  protojax train --config=gmm_photos --workdir=runs/photos --config.data.data_dir=IMAGES

Cost: not measured. Result: not measured.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  """Views of 64 px, 256 prototypes, 1,000 steps of 64 images however many there are."""
  config = common.dino_cifar10()
  config.num_steps = 1000
  config.batch_size = 64
  config.eval_every = 500
  config.monitor.every = 250
  # Crops of a quarter of the longer side and more are not enlarged.
  config.data.update({"name": "folder", "image_size": 128})
  config.augment.update({
    "global_size": 64, "global_scale": (0.3, 1.0), "local_size": 32, "local_scale": (0.1, 0.3),
    "blur_prob": (0.5, 0.1, 0.0), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
  })  # fmt: skip
  config.model.patch_size = 16
  config.head.update({"hidden": 256, "bottleneck": 64, "norm": "batch"})
  config.method.num_prototypes = 256
  config.optim.update({"lr": 4e-3, "warmup_steps": 100})  # the rate is 1e-3 for a batch of 64
  return common.finish(config, mode)
