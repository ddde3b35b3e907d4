r"""A few minutes on a laptop: joint or decoupled prototypes on the handwritten digits of scikit-learn.

  protojax train --config=quickstart --workdir=runs/decoupled
  protojax train --config=quickstart:joint --workdir=runs/joint

`bash launch/quickstart.sh` trains both side by side and compares them.
"""

from protojax.recipes import common


def get_config(mode: str = ""):
  """Modes: "" or "decoupled", "joint", "frozen", and "debug", a minute's run of decoupled ones."""
  config = common.dino_cifar10()
  config.num_steps = 3000
  config.batch_size = 64
  config.log_every = 250
  config.save_every = 1000
  config.eval_every = 500
  config.monitor.every = 250
  config.data.update({"name": "digits", "image_size": 16})
  # Four patches a view. Digits have one colour and a reading direction: no flip, no colour.
  config.augment.update({
    "global_size": 16, "local_size": 8,
    "flip": 0.0, "saturation": 0.0, "hue": 0.0, "gray_prob": 0.0, "solarize_prob": (0.0, 0.0, 0.0),
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
  })  # fmt: skip
  config.model.depth = 2
  config.head.update({"hidden": 256, "bottleneck": 32, "norm": "batch"})
  config.method.update(
    {"num_prototypes": 512, "teacher_temp_start": 0.03, "teacher_temp": 0.03},
  )
  config.optim.update({"lr": 4e-3, "warmup_steps": 200})
  if mode == "joint":
    # Targets as DINO has them: Sinkhorn's ended in uniform collapse here.
    config.method.update(
      {
        "prototypes": "learned",
        "targets": "center",
        "teacher_temp_start": 0.04,
        "teacher_temp": 0.04,
      }
    )
  elif mode == "frozen":
    config.method.prototypes = "frozen"
  return common.finish(config, mode, "decoupled", "joint", "frozen")
