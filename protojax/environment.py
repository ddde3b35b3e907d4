"""Versions, machine and command, which numbers are published beside; what is kept between steps."""

import ctypes
import importlib.metadata
import os
import pathlib
import platform
import sys

import jax

from protojax import __version__


def describe() -> dict:
  """Versions, machine and command line, for env.json."""
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  return {
    "protojax": __version__,
    "python": platform.python_version(),
    "platform": platform.platform(),
    "packages": {name: importlib.metadata.version(name) for name in packages},
    "backend": jax.default_backend(),
    "devices": [d.device_kind for d in jax.devices()],
    "processes": jax.process_count(),
    "command": sys.argv,
  }


# Of mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_memory() -> None:
  """Lets the process keep the memory of a step on a CPU for the next one; before JAX's first array.

  XLA asks for all intermediate results of a step in one piece and gives it back behind it. glibc
  takes a piece of that size from Linux each time, page by page, each page filled with zeros: 60,000
  page faults, a fifth of the step of dino_cifar10 (commit eb27c8b, two cores, jax 0.10.0). It keeps
  one when told, for the main thread alone, so that this is the thread that steps run in. Peak
  memory is the same; what an evaluation needed for a while stays with the process. Nothing happens
  without glibc, and on accelerators, whose arrays are elsewhere.
  """
  if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
    return
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if jax.default_backend() == "cpu":
    glibc = ctypes.CDLL(None)
    glibc.mallopt(_MMAP_MAX, 0)
    glibc.mallopt(_TRIM_THRESHOLD, -1)  # nothing is given back


def keep_compiled() -> None:
  """Lets JAX keep what it compiles for an accelerator, so that the next run starts at once.

  In protojax/xla of the user's cache folder, which is made for the user alone: what lies there is
  run without a look. Nothing happens where the user has said where to keep it
  (JAX_COMPILATION_CACHE_DIR; empty: nowhere), where the folder cannot be made, and on CPUs, where
  compiling is short and XLA complains about each program that it reads back. Nor for several
  processes on GPUs: JAX writes on the first alone, in its user's folder, which the others may not
  see. It then finds a program that they compile, and XLA, whose processes measure their shares of
  a program's kernels and exchange them, would wait for its share.
  """
  said = jax.config.jax_compilation_cache_dir is not None
  if said or "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.default_backend() == "cpu":
    return
  if jax.default_backend() == "gpu" and jax.process_count() > 1:
    return
  try:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = cache / "protojax" / "xla"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # no home, or none that can be written
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
