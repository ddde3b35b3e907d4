r"""Decoupled prototypes on a folder of 200 to 20,000 photos, small ViT, CARP's loss, laptop's CPU.

  protojax train --config=gmm_photos --workdir=runs/photos --config.data.data_dir=IMAGES

Images in folders train/CLASS/ and val/CLASS/ are judged by k-NN and a linear probe; without, the
prototypes alone are. With patience or a GPU add --config.num_steps=20_000, and for four times the
patches --config.model.patch_size=8.

Cost and result: half an hour on one CPU core (140 img/s; commit 6d1f0a5). On 2,000 images of
CIFAR-10 (JPEG copy, 32 px enlarged; 1,000 others to test; seed 0): k-NN 34.6 %, untrained net 25.7
%, raw pixels 28.0 %; linear 37.7 %, raw pixels 33.7 %; used 94 %, unique at .25 100 %. The first
k-NN, after 1,000 steps, was 30.6 % and the verdict "ok". Head and rate are those of
carp_cifar10:gmm.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  """256 prototypes, views of 64 px, and as many steps for a small folder as for a large one.

  Of the losses with a mixture CARP's learned most on CIFAR-10 (README, "Measured").
  """
  config = common.cifar10("carp")
  config.num_steps = 4000
  config.batch_size = 64
  config.monitor.every = 500
  # Crops of a quarter of a photo and more are not enlarged.
  config.data.update({"name": "folder", "image_size": 128})
  config.augment.update({
    "global_size": 64, "local_size": 32,
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
  })  # fmt: skip
  config.model.patch_size = 16
  # As in carp_cifar10: batch norm inside and no normalisation at the end.
  config.head.update({"l2": False, "norm": "batch"})
  config.method.update({"num_prototypes": 256, "partition_size": 64})
  config.optim.update({"lr": 2e-3, "warmup_steps": 400})  # the rate is 5e-4 for a batch of 64
  return common.finish(config, mode)
