"""The recipes that come with protojax, by name, and how any recipe is read.

They are the folder configs/ of the clone, which an installed protojax holds inside the package.
A recipe of your own shares their frame, wherever it lies: `from protojax.recipes import common`.
"""

import ast
import difflib
import importlib.util
import inspect
import pathlib
import sys
import traceback
from typing import Any

import ml_collections

from protojax import config as configs
from protojax import errors

_INSTALLED = pathlib.Path(__file__).resolve().parent / "configs"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "configs"
__path__ = [str(FOLDER)]  # where Python finds `protojax.recipes.common`


def names() -> list[str]:
  """The recipes that come with protojax, sorted: "barlow_twins_cifar10", ..."""
  return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


def title(name: str) -> str:
  """What the recipe `name`, one of `names()`, says of itself in its first line, if anything."""
  try:
    module = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
  except SyntaxError:  # one that is being written is no reason to hide the others
    return ""
  return (ast.get_docstring(module) or "").partition("\n")[0]


def load(recipe: str) -> ml_collections.ConfigDict:
  """Reads a recipe: one that comes with protojax, by its name, or a file of your own.

  >>> load("quickstart:debug").num_steps
  20

  Args:
    recipe: "NAME" or "path/to/file.py"; what follows a colon, as in "NAME:debug", is the mode that
      the recipe's `get_config(mode)` is called with.

  Raises:
    UserError: if there is no such recipe, no `get_config` in it, an error, with file and line, or
      no config comes back.
  """
  name, _, mode = recipe.partition(":")
  path = _file(name)
  if path.parent != FOLDER:
    # A file may import what lies beside it, and in folders beside its own.
    beside = [str(folder) for folder in (path.parent, path.parent.parent)]
    sys.path += [folder for folder in beside if folder not in sys.path]
  spec: Any = importlib.util.spec_from_file_location("protojax_recipe", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise errors.UserError(f"{name} defines no get_config(mode)")
    if mode and not inspect.signature(module.get_config).parameters:
      raise errors.UserError(f"mode {mode!r} is unknown: get_config() of {name} takes none")
    config = module.get_config(mode) if mode else module.get_config()
    if wrong := _no_config(config):
      raise errors.UserError(
        f"get_config of {path} returns {wrong}: let it return what it has made of "
        "protojax.config.default() or of a function of protojax.recipes.common"
      )
    return config
  except errors.UserError as error:
    raise errors.UserError(f"--config={recipe}: {error}") from None
  except Exception as error:
    raise errors.UserError(f"--config={recipe}: {_where(error, path)}") from error


def _no_config(found: Any) -> str:
  """What somebody's get_config returned, in words, if that is no config; else ""."""
  if not isinstance(found, ml_collections.ConfigDict):
    return "None, no config" if found is None else f"{type(found).__name__}, no config"
  if lacks := [name for name in configs.default() if name not in found]:
    return f"a config without {', '.join(lacks[:3])}" + ", ..." * (len(lacks) > 3)
  return ""


def _where(error: Exception, path: pathlib.Path) -> str:
  """ "ModuleNotFoundError: No module named 'helper' (own/my.py, line 3)", of somebody's recipe."""
  told = f"{type(error).__name__}: {' '.join(str(error).split())}"
  if isinstance(error, SyntaxError):  # it says where
    return told
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == str(path)]
  return f"{told} ({path}, line {lines[-1]})" if lines else f"{told} ({path})"


def _file(name: str) -> pathlib.Path:
  """The file of a recipe, absolute."""
  known = names()
  if name in known:
    return FOLDER / f"{name}.py"
  path = pathlib.Path(name).expanduser()
  if path.suffix == ".py" and path.is_file():
    return path.resolve()
  near = difflib.get_close_matches(path.stem, known, 1)
  hint = f"did you mean --config={near[0]}, which comes with protojax?" if near else ""
  if not hint:
    hint = "give one of those that come with protojax (protojax train --help) or a file, NAME.py"
  what = "no file" if path.suffix == ".py" else "no recipe"
  raise errors.UserError(f"--config={name}: {what} {name!r}: {hint}")
