r"""Decoupled prototypes for a backbone that has none: given weights of a ViT-S/16, 10 epochs.

  protojax convert dinov2_or_mae_or_yours.pth runs/weights
  protojax train --config=adapt_vit_s --workdir=runs/adapted --config.init_from=runs/weights \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Heads and prototypes of DINOv2 and DINOv3 are not published. Here a new head and a mixture are
fitted to the given backbone, which stands still for an epoch and then moves with them, layers near
the image the least. `init_from` brings the encoder's settings along, so that any ViT will do
(docs/instruments.md). Rates and decay are in the range of published fine-tuning (arXiv
2106.08254), not tuned here. It has not been run.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  """Modes: "" decoupled prototypes, "joint" learned ones, "debug" a minute's run."""
  config = common.imagenet("dino", num_epochs=10.0, batch_size=512)
  config.method.update({"targets": "sinkhorn", "teacher_temp_start": 0.05, "teacher_temp": 0.05})
  config.method.teacher_temp_warmup_epochs = 0
  config.optim.update(
    {"lr": 2e-4, "warmup_epochs": 1.0, "freeze_backbone_epochs": 1.0, "layer_decay": 0.75}
  )
  return common.adapted(config, mode)
