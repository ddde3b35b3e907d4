r"""PCL (arXiv 2005.04966) on CIFAR-10, small ViT, clusters of 250, 500 and 1,000.

  protojax train --config=pcl_cifar10 --workdir=runs/pcl_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Two views instead of four: the method has no small crops. Five epochs, of which the first has no
clusters.

Cost: 2,000 steps, 9 minutes on two CPU cores that did other work too; 326 img/s at the end.
CIFAR-10 (JPEG copy), seed 0, commit 884b383: used 100 %, unique 99.7 % at .025, 15.3 % at .25, k-NN
38.0 %, linear 42.3 %.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.cifar10("pcl")
  config.augment.update({"num_local": 0, "global_scale": (0.2, 1.0)})
  config.head.update({"layers": 2, "activation": "relu", "init": "uniform"})
  config.method.update(
    {
      "num_prototypes": 1000,
      "coarse_clusters": (250, 500),
      "queue_size": 4096,
      "warmup_epochs": 1,
    }
  )
  return common.finish(config, mode)
