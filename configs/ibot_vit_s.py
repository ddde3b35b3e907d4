r"""iBOT (arXiv 2111.07832), ViT-S/16, ImageNet-1k, 800 epochs: the published recipe.

One set of 8,192 prototypes for class and patch tokens, as in the released models, whose norms are
trained. The learning rate's end, its warm-up and clipping are the defaults of DINO's code. In mode
"gmm" they are the means of the library's mixture, which is fed by all of the teacher's tokens, and
targets are balanced by Sinkhorn, without which few of them are used (configs/gmm_vit_s.py).

  protojax train --config=ibot_vit_s --workdir=runs/ibot_vit_s \
    --config.data.data_dir=$PROTOJAX_DATA_DIR
  protojax train --config=ibot_vit_s:gmm --workdir=runs/ibot_gmm_vit_s \
    --config.data.data_dir=$PROTOJAX_DATA_DIR

Cost: not measured here. The authors report 75.2 % k-NN and 77.9 % linear for their PyTorch code.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  config = common.imagenet("ibot", num_epochs=800.0, batch_size=1024)
  config.augment.update(
    {
      "global_scale": (0.25, 1.0),
      "local_scale": (0.05, 0.25),
      "num_local": 10,
    }
  )
  config.method.update(
    {
      "num_prototypes": 8192,
      "train_prototype_norm": True,
      "shared_head": True,
    }
  )
  if mode == "gmm":
    config.method.targets = "sinkhorn"
  return common.finish_joint_or_mixture(config, mode)
