r"""DINO (arXiv 2104.14294), ViT-S/16, ImageNet-1k, 100 epochs: the published "vanilla" recipe.

  python -m protojax.main --config=configs/dino_vit_s.py --workdir=runs/dino_vit_s \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: not measured here. The authors report 69.3 % k-NN and 74.0 % linear for their PyTorch code.
"""

from configs import common
from protojax import config as configs


def get_config(mode: str = ""):
  config = configs.default()
  config.num_epochs = 100.0
  config.batch_size = 512
  config.precision = "bfloat16"
  config.data.update({"name": "imagenet2012", "image_size": 256, "num_workers": 8})
  config.probe.update({"test_split": "validation", "batch_size": 256, "crop": 0.875})
  config.eval_every = 25_000
  config.save_every = 2500
  config.method.update({
    "prototypes": "learned", "teacher_temp_start": 0.04, "teacher_temp": 0.04,
    "teacher_temp_warmup_epochs": 0,
  })  # fmt: skip
  return common.finish(config, mode)
