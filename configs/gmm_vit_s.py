r"""Decoupled prototypes (arXiv 2510.20108), ViT-S/16, ImageNet-1k, 100 epochs.

  protojax train --config=gmm_vit_s --workdir=runs/gmm_vit_s \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost and result: not measured here (no accelerator at hand when this was written). The paper's
constants are not public; those of the mixture are our reading of it: per-component forgetting with
both views of the teacher, moved before the loss, weights in the posterior, unit means.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.imagenet("dino", num_epochs=100.0, batch_size=512)
  config.method.update(
    {
      "prototypes": "mixture",
      "em_order": "before_loss",
      "teacher_temp_start": 0.04,
      "teacher_temp": 0.04,
      "teacher_temp_warmup_epochs": 0,
    }
  )
  # 1,000 units of responsibility at K = 65,536 and 1,024 teacher rows are 64,000 balanced steps.
  config.mixture.update(
    {
      "balanced": False,
      "center_features": False,
      "kappa": 20.0,
      "horizon_steps": 64_000.0,
    }
  )
  return common.finish(config, mode)
