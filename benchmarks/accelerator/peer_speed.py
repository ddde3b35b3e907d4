"""The same step in PyTorch (`benchmarks.peers`), on views that are ready."""

import pathlib
import time

import torch

from benchmarks import peers
from benchmarks.accelerator import speed
from protojax import resolving


def _matrix_peak(size: int, device: str) -> float:
  """As `step.matrix_peak`, in PyTorch."""
  x = torch.randn(size, size, device=device, dtype=torch.bfloat16) * size**-0.5
  y, rounds, best = x, 10, float("inf")
  for _ in range(6):
    _wait(device)
    start = time.perf_counter()
    for _ in range(rounds):
      y = y @ x
    _wait(device)
    best = min(best, time.perf_counter() - start)
  return 2.0 * size**3 * rounds / best


def _wait(device: str) -> None:
  if device == "cuda":
    torch.cuda.synchronize()


def _views(config, device: str) -> dict[str, torch.Tensor]:
  look, batch = config.augment, config.batch_size
  shapes = {"global": (batch, 2, look.global_size, look.global_size, 3)}
  if look.num_local:
    shapes["local"] = (batch, look.num_local, look.local_size, look.local_size, 3)
  return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def run(options: dict, *, folder: pathlib.Path, data_dir: str | None, rehearse: bool) -> dict:
  """Images a second, eager or compiled, in bfloat16, at the largest of the batches that fits."""
  del folder, data_dir
  device = "cuda" if torch.cuda.is_available() else "cpu"
  size = 256 if rehearse else 8192
  before = _matrix_peak(size, device)

  def measure(batch_size):
    if device == "cuda":
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
    config = resolving.resolve(speed.recipe(options, batch_size, rehearse), 50_000)
    torch.manual_seed(0)
    peer = peers.build(config, device=device)
    views = _views(config, device)
    flops = peers.flops(peer, views)
    backend = "aot_eager" if rehearse else "inductor"
    step = peers.make_step(peer, compiled=options["compiled"], backend=backend)
    start = time.perf_counter()
    step(views)
    _wait(device)
    first = time.perf_counter() - start
    rounds = 1 if rehearse else 20
    seconds = speed.median_seconds(lambda: step(views), lambda: _wait(device), rounds)
    return {
      "img_per_s_ready": round(config.batch_size / seconds, 1),
      "batch_size": config.batch_size,
      "milliseconds": {"ready": round(1e3 * seconds, 3)},
      "flops_without_augmentation": flops,
      "first_step_s": round(first, 1),
      "repeats": rounds,
    }

  found = speed.largest(options["batches"], measure)
  peak = max(before, _matrix_peak(size, device))
  in_use = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
  seconds = found["milliseconds"]["ready"] / 1e3
  return found | {
    "compiled": options["compiled"],
    "torch": torch.__version__,
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "backend": device,
    "matrix_peak": peak,
    "peak_mib": in_use and round(in_use, 1),
    "share_of_peak_ready": found["flops_without_augmentation"] / seconds / peak,
  }
