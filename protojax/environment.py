"""Versions, machine and command: what numbers are published beside."""

import importlib.metadata
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
