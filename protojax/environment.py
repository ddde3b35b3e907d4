"""Versions, machine and command, which numbers are published beside; where programs are kept."""

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


def keep_compiled() -> None:
  """Lets JAX keep what it compiles for an accelerator, so that the next run starts at once.

  In protojax/xla of the user's cache folder, which is made for the user alone: what lies there is
  run without a look. Nothing happens where the user has said where to keep it
  (JAX_COMPILATION_CACHE_DIR; empty: nowhere), where the folder cannot be made, and on CPUs, where
  compiling is short and XLA complains about each program that it reads back.
  """
  said = jax.config.jax_compilation_cache_dir is not None
  if said or "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.default_backend() == "cpu":
    return
  try:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = cache / "protojax" / "xla"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # no home, or none that can be written
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
