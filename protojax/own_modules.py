"""A module of the user's own by its dotted name: a method or a data source without a fork."""

import importlib
import types

from protojax import errors


def load(name: str, setting: str) -> types.ModuleType:
  """Imports the module that a setting names.

  Args:
    name: as in `import my_package.my_module`.
    setting: what named it, for messages: "method.name".

  Raises:
    UserError: if there is no such module, or it cannot be imported.
  """
  try:
    return importlib.import_module(name)
  except Exception as error:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{name}.".startswith(f"{missing}."):
      raise errors.UserError(
        f"{setting}={name!r}: Python finds no module {missing!r}: start in the folder that holds "
        f"{name.partition('.')[0]}, or add that folder to PYTHONPATH"
      ) from None
    said = " ".join(str(error).split())
    raise errors.UserError(
      f"{setting}={name!r}: importing it failed with {type(error).__name__}: {said}; "
      f"python -c 'import {name}' shows where"
    ) from error
