"""Methods: one file each with `OPTIONS` and `make(config) -> base.Method`, found by name."""

import importlib
import pkgutil
import types

from protojax import errors


def names() -> list[str]:
  """Of all methods that come with protojax, sorted."""
  return sorted({m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg} - {"base"})


def load(name: str) -> types.ModuleType:
  """The module protojax/methods/<name>.py.

  Raises:
    UserError: if there is no such method.
  """
  if name not in names():
    raise errors.UserError(f"method.name={name!r} is unknown: choose one of {', '.join(names())}")
  return importlib.import_module(f"protojax.methods.{name}")
