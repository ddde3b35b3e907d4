"""Three steps of a method against numbers that a CPU has stored in parity.json.

Loss and gradient norm of every step, then the first prototypes, of a mixture with their usage: the
nets of the CIFAR-10 recipes with two blocks, 32 images drawn from a seed. float32 is asked of the
accelerator at full precision (`jax_default_matmul_precision=highest`), so that TF32 does not blur
what is compared; bfloat16 as it comes.
"""

import pathlib

import jax
import numpy as np

from benchmarks.accelerator import records
from protojax import files, recipes, resolving
from protojax.training import programs, sharding

STORED = pathlib.Path(__file__).with_name("parity.json")
RECIPES = {
  "dino": "configs/dino_cifar10.py",
  "ibot": "configs/ibot_cifar10.py",
  "gmm": "configs/gmm_cifar10.py",
  "swav": "configs/swav_cifar10.py",
  "falcon": "configs/falcon_cifar10.py",
}
PRECISIONS = ("float32", "bfloat16")
# Largest relative difference of a loss and of a gradient norm, largest difference of a prototype's
# coordinate (unit rows) and of a usage (1 on average). bfloat16 may differ by several times what it
# differs by from float32 on one CPU (stated beside the numbers): where a gradient is all rounding
# one sign that flips moves a coordinate by the learning rate.
TOLERANCES = {
  "float32": {"loss": 1e-4, "grad_norm": 3e-3, "rows": 1e-5, "usage": 1e-3},
  "bfloat16": {"loss": 1e-3, "grad_norm": 0.1, "rows": 1e-3, "usage": 3e-2},
}
_STEPS, _BATCH, _ROWS, _COLUMNS = 3, 32, 8, 8


def _images() -> np.ndarray:
  """uint8 [_STEPS, B, 32, 32, 3]: squares under noise. RandomState's stream never changes."""
  rng = np.random.RandomState(0)
  coarse = rng.randint(0, 200, (_STEPS, _BATCH, 4, 4, 3)).repeat(8, axis=2).repeat(8, axis=3)
  return (coarse + rng.randint(0, 56, coarse.shape)).astype(np.uint8)


def measure(name: str, precision: str) -> dict:
  """{"loss", "grad_norm": [3], "rows": [8, 8], and of a mixture "usage": [8]}."""
  config = recipes.load(str(records.ROOT / RECIPES[name]))
  config.update({"batch_size": _BATCH, "num_steps": 100, "precision": precision})
  config.model.depth = 2
  # Or nothing would move.
  config.optim.update(
    {
      "warmup_steps": 0,
      "warmup_epochs": 0.0,
      "freeze_prototypes_epochs": 0.0,
    }
  )
  config = resolving.resolve(config, 50_000)
  program = programs.Program(config, devices=jax.devices()[:1])
  out = {"loss": [], "grad_norm": []}
  precise = jax.default_matmul_precision("highest" if precision == "float32" else None)
  with jax.set_mesh(program.mesh), precise:
    state = program.init(config.seed)
    for step, image in enumerate(_images()):
      batch = {
        "image": image,
        "size": np.full((_BATCH, 2), 32, np.int32),
        "index": np.arange(step * _BATCH, (step + 1) * _BATCH, dtype=np.int32),
      }
      state, metrics = program.step(state, sharding.put_batch(batch, program.mesh), None)
      out["loss"].append(float(metrics["train/loss"]))
      out["grad_norm"].append(float(metrics["train/grad_norm"]))
    variables = programs.train_step.variables_of(state)
    matrices = jax.jit(program.method.prototype_matrices)(variables)
    rows = matrices.get("prototypes", next(iter(matrices.values())))
    out["rows"] = np.asarray(rows[:_ROWS, :_COLUMNS], np.float64).round(7).tolist()
    if hasattr(state.prototypes, "usage"):
      usage = np.asarray(state.prototypes.usage[:_ROWS], np.float64)
      out["usage"] = (usage * len(rows)).round(7).tolist()
  return out


def differences(found: dict, stored: dict) -> dict[str, float]:
  """{quantity: largest difference}, that of losses and gradient norms relative."""
  out = {}
  for key, value in stored.items():
    a, b = np.array(found[key]), np.array(value)
    scale = np.abs(b) if key in ("loss", "grad_norm") else 1.0
    out[key] = float(np.max(np.abs(a - b) / scale))
  return out


def run(options: dict, *, folder: pathlib.Path, data_dir: str | None, rehearse: bool) -> dict:
  """Both precisions of one method (in rehearsal float32): what differs and by how much at most.

  Returns:
    {precision: {"differences", "loss"}, "exceeded": [what differs by more than "tolerances"]}.
  """
  del folder, data_dir
  stored, out, exceeded = records.read_json(STORED)["numbers"], {}, []
  for precision in PRECISIONS[: 1 if rehearse else None]:
    found = measure(options["name"], precision)
    differing = differences(found, stored[options["name"]][precision])
    out[precision] = {"differences": differing, "loss": found["loss"]}
    exceeded += [
      f"{precision} {key} {value:.2g} > {TOLERANCES[precision][key]:g}"
      for key, value in differing.items()
      if not value <= TOLERANCES[precision][key]
    ]
  stats = jax.devices()[0].memory_stats() or {}
  return out | {
    "exceeded": exceeded,
    "tolerances": TOLERANCES,
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "peak_in_use_mib": round(stats.get("peak_bytes_in_use", 0) / 2**20) or None,
  }


def store() -> None:
  """Writes parity.json; for a CPU."""
  if jax.default_backend() != "cpu":
    raise SystemExit("parity.json holds what a CPU computes: JAX_PLATFORMS=cpu")
  numbers = {
    name: {precision: measure(name, precision) for precision in PRECISIONS} for name in RECIPES
  }
  files.write_json(
    STORED,
    {
      "commit": records.commit(),
      "versions": records.machine()["versions"],
      "numbers": numbers,
      "bfloat16_against_float32": {
        name: differences(of["bfloat16"], of["float32"]) for name, of in numbers.items()
      },
    },
  )
