r"""DINO (arXiv 2104.14294), ViT-S/16, ImageNet-1k, 100 epochs: the published "vanilla" recipe.

  protojax train --config=dino_vit_s --workdir=runs/dino_vit_s \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: not measured here. The authors report 69.3 % k-NN and 74.0 % linear for their PyTorch code.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.imagenet("dino", num_epochs=100.0, batch_size=512)
  config.method.update(
    {
      "prototypes": "learned",
      "teacher_temp_start": 0.04,
      "teacher_temp": 0.04,
      "teacher_temp_warmup_epochs": 0,
    }
  )
  return common.finish(config, mode)
