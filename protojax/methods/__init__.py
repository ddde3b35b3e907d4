"""Methods: modules with `OPTIONS` and `make(config) -> Method`, found by name, ours or yours."""

import importlib
import pkgutil
import types

from protojax import errors, own_modules
from protojax.methods import base

LossOut, Method, Variables = base.LossOut, base.Method, base.Variables


def names() -> list[str]:
  """Names of all methods that come with protojax, sorted."""
  return sorted({m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg} - {"base"})


def load(name: str) -> types.ModuleType:
  """The module of a method, by the name that `config.method.name` gives it.

  A name without a dot is that of a file in protojax/methods. One with a dot is imported as it
  stands, "my_package.my_method", from wherever Python finds it: no fork is needed for a method of
  your own.

  >>> load("swav").OPTIONS["temperature"]
  0.1

  Returns:
    A module with `OPTIONS`, the settings that join `config.method` with their defaults, and
    `make(config) -> Method`.

  Raises:
    UserError: if there is no such method, its module cannot be imported or lacks one of the two.
  """
  if "." in name:
    return _load_own(name)
  if name not in names():
    raise errors.UserError(
      f"method.name={name!r} is unknown: choose one of {', '.join(names())}, or name a module of "
      "your own, my_package.my_method"
    )
  return importlib.import_module(f"protojax.methods.{name}")


def _load_own(name: str) -> types.ModuleType:
  """`load` of a module from outside."""
  module = own_modules.load(name, "method.name")
  if not callable(getattr(module, "make", None)):
    raise errors.UserError(
      f"method.name={name!r}: {module.__file__ or name} defines no make(config) -> Method"
    )
  if not isinstance(getattr(module, "OPTIONS", None), dict):
    raise errors.UserError(
      f"method.name={name!r}: {module.__file__ or name} defines no dict OPTIONS, its settings "
      "and their defaults; {} if it has none"
    )
  return module
