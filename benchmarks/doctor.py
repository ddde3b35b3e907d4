"""Times `protojax doctor` on made checkpoints of DINO's size; prints one JSON line each.

  python benchmarks/doctor.py [--num 65536] [--dim 256] [--cases random,one,groups,bunched]

Everything is counted, from the start of the program to its last line: starting JAX, mapping the
file, all pairs of prototypes, the random null, the spectrum. "cpu_s" is the time of all cores
together, "rss_mb" the largest resident memory. Cases: "random" is uniform on the sphere, "one" a
single tight group, "groups" 908 groups within .025, "bunched" 4,000 loose ones, so that all five
thresholds have near pairs everywhere.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import safetensors.numpy

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _prototypes(case: str, num: int, dim: int) -> np.ndarray:
  rng = np.random.default_rng(0)

  def draw(rows):
    return rng.standard_normal((rows, dim), np.float32)

  if case == "random":
    return draw(num)
  if case == "one":
    return draw(1) + 1e-2 * draw(num)
  if case == "groups":
    return _unit(draw(908))[rng.integers(908, size=num)] + 0.1 * _unit(draw(num))
  centres, apart = _unit(draw(4000)), rng.uniform(0, 1.2, (num, 1)).astype(np.float32)
  return centres[rng.integers(4000, size=num)] + apart * _unit(draw(num)) + 0.6 * _unit(draw(1))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--num", type=int, default=65_536)
  parser.add_argument("--dim", type=int, default=256)
  parser.add_argument("--cases", default="random,one,groups,bunched")
  args = parser.parse_args()
  environment = {**os.environ, "PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
  with tempfile.TemporaryDirectory() as folder:
    for case in args.cases.split(","):
      path, out = pathlib.Path(folder, "x.safetensors"), pathlib.Path(folder, "out.json")
      arrays = {"teacher.head.last_layer.weight": _prototypes(case, args.num, args.dim)}
      safetensors.numpy.save_file(arrays, path)
      del arrays
      command = [sys.executable, "-m", "protojax.doctor", str(path), f"--json={out}"]
      start = time.perf_counter()
      process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
      _, status, used = os.wait4(process.pid, 0)
      wall = time.perf_counter() - start
      if status:
        sys.exit(f"{' '.join(command)} failed")
      (one,) = json.loads(out.read_text())["sets"].values()
      print(
        json.dumps(
          {
            "case": case,
            "num": args.num,
            "dim": args.dim,
            "cores": len(os.sched_getaffinity(0)),
            "load_1min": os.getloadavg()[0],
            "wall_s": round(wall, 1),
            "cpu_s": round(used.ru_utime + used.ru_stime, 1),
            "rss_mb": round(used.ru_maxrss / 1024),
            **{k: one["unique"][k] for k in ("unique", "components", "isolated")},
          }
        ),
        flush=True,
      )


if __name__ == "__main__":
  main()
