r"""DINO-vMF (arXiv 2405.10939), ViT-S/16, ImageNet-1k, 100 epochs: configs/dino_vit_s.py with it.

Prototypes of any norm, read as a mixture of von Mises-Fisher distributions and centred in
probability space.

  protojax train --config=dino_vmf_vit_s --workdir=runs/dino_vmf_vit_s \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost and result: not measured yet.
"""

from protojax.recipes import common, dino_vit_s


def get_config(mode: str = ""):
  config = dino_vit_s.get_config()
  config.method.update({"vmf": True, "train_prototype_norm": True})
  return common.finish(config, mode)
