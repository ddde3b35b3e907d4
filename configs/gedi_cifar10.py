r"""GEDI on CIFAR-10, small ViT; its equations are in protojax/methods/gedi.py.

Mode "" is the form without the generative term; "gen" is the full one.

  protojax train --config=gedi_cifar10 --workdir=runs/gedi_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR
  protojax train --config=gedi_cifar10:gen --workdir=runs/gedi_gen_cifar10 \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

A step of "gen" also runs 20 steps of sampling, forward and backward each, so that mode takes a
tenth of the steps, 200: too few to compare it with the other recipes.

A batch can fill no more clusters than it has images, hence 128 of them, and a head that ends in
batch norm and unit length. Of the weights tried for 500 steps, uniformity over invariance 1 : 1
fell to one cluster (with 1,024 of them too, and without batch norm or unit length), 2 : 1 and 3 : 1
did not. The defaults, 10 : 1, with 1,024 clusters and a head that ends linearly, left assignments
nearly uniform after 2,000 steps and the encoder below an untrained one (commit 507166e).

Mode "", 8 minutes on two CPU cores, 556 img/s at the end. CIFAR-10 (JPEG copy), seed 0, commit
f8d8460: used 100 %, perplexity 89, cross entropy 4.63 of ln K = 4.85, k-NN 37.2 %, linear 42.0 %.
Mode "gen", 9 minutes beside other work, commit 884b383: used 63.3 %, but perplexity 4.2, k-NN
29.5 %, linear 34.4 %, little above the untrained encoder's 28.8 and 33.7; with both weights at 50
it fell to one cluster.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.cifar10("gedi")
  config.method.prototypes = "learned"
  config.augment.update({"global_scale": (0.08, 1.0), "num_local": 0})
  config.head.update(
    {
      "layers": 2,
      "norm": "batch",
      "norm_output": True,
      "activation": "relu",
      "init": "uniform",
    }
  )
  config.method.update(
    {
      "num_prototypes": 128,
      "weight_uniformity": 2.0,
      "weight_invariance": 1.0,
    }
  )
  if mode != "gen":
    return common.finish(config, mode, "gen")
  config.num_steps = 200
  # Weak colours, and pixels in [-1, 1], where chains start.
  config.augment.update({
    "global_scale": (0.6, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
    "jitter_prob": 0.1, "gray_prob": 0.1, "solarize_prob": (0.0, 0.0, 0.0),
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
  })  # fmt: skip
  # No batch norm in an energy; unit features bound it.
  config.head.update({"norm": "none", "norm_output": False})
  config.method.update(
    {
      "generative": True,
      "weight_generative": 1.0,
      "weight_uniformity": 100.0,
      "weight_invariance": 50.0,
    }
  )
  config.optim.update(
    {
      "lr": 2e-4,
      "final_lr": 1e-6,
      "weight_decay": 0.0,
      "final_weight_decay": 0.0,
      "warmup_steps": 20,
    }
  )
  return config
