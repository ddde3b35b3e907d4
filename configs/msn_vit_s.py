r"""MSN (arXiv 2204.07141), ViT-S/16, ImageNet-1k, 800 epochs: the constants of the published code.

  protojax train --config=msn_vit_s --workdir=runs/msn_vit_s \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

What differs is in protojax/methods/msn.py.

Cost and result: not measured here.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.imagenet("msn", num_epochs=800.0, batch_size=1024)
  config.augment.update({
    "global_scale": (0.3, 1.0), "local_scale": (0.05, 0.3), "num_local": 10, "brightness": 0.4,
    "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "blur_prob": (0.5, 0.5, 0.5),
    "solarize_prob": (0.0, 0.0, 0.0), "interpolation": "bilinear",
  })  # fmt: skip
  config.model.update({"drop_path": 0.0, "position_offset": 0.0})
  config.head.update({"layers": 3, "hidden": 2048, "bottleneck": 256, "norm": "batch"})
  config.method.update({"prototypes": "learned", "num_prototypes": 1024})
  # .001 for the batch, from .0002.
  config.optim.update(
    {
      "lr": 2.5e-4,
      "final_lr": 1e-6,
      "warmup_epochs": 15.0,
      "warmup_start": 5e-5,
      "schedule_scale": 1.25,
      "weight_decay": 0.04,
      "final_weight_decay": 0.4,
      "decay_prototypes": False,
      "clip": 3.0,
      "clip_mode": "encoder",
      "freeze_prototypes_epochs": 0.0,
    }
  )
  config.teacher.schedule = "linear"
  return common.finish(config, mode)
