r"""Two minutes on a laptop: decoupled prototypes on the handwritten digits inside scikit-learn.

  python -m protojax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from configs import common


def get_config(mode: str = ""):
  config = common.cifar10()
  config.num_steps = 300
  config.batch_size = 64
  config.log_every = 25
  config.save_every = 150
  config.eval_every = 150
  config.monitor.every = 50
  config.data.name = "digits"
  # Digits have one colour and a reading direction: no flip, no colour.
  config.augment.update({
    "flip": 0.0, "saturation": 0.0, "hue": 0.0, "gray_prob": 0.0, "solarize_prob": (0.0, 0.0, 0.0),
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
  })  # fmt: skip
  config.method.num_prototypes = 256
  config.optim.warmup_steps = 30
  return common.finish(config, mode)
