r"""FALCON (arXiv 2410.04959), ViT-S/16, ImageNet-1k, 100 epochs.

  protojax train --config=falcon_vit_s --workdir=runs/falcon_vit_s \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

65,536 codes of 384 dimensions. More of them cost time and little memory, since they are compared
in blocks (docs/scale.md): the paper goes up to --config.method.num_prototypes=500_000. It trains on
100 classes (a folder of them: --config.data.name=folder) with settings that are not published;
these are DINO's, which its code is built on, without teacher and centre.

Cost and result: not measured yet. The authors report 73.9 % linear for 50,000 codes and 74.0 % for
500,000, on ImageNet-100.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.imagenet("falcon", num_epochs=100.0, batch_size=512)
  config.method.num_prototypes = 65_536
  config.head.update(
    {
      "layers": 1,
      "bottleneck": 384,
      "norm_output": True,
      "init": "uniform",
      "l2": False,
    }
  )
  return common.finish(config, mode)
