"""protojax: self-supervised vision pretraining with prototypes, in JAX.

`__all__` is what a program of your own uses, as in `protojax.online_em(...)`. Each name is imported
when it is first used, so `import protojax` costs nothing and starts nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from protojax import (
    config,
    data,
    errors,
    losses,
    methods,
    metrics,
    prototypes,
    recipes,
    resolving,
    schedules,
  )
  from protojax.api import diagnose, train
  from protojax.loading import load
  from protojax.prototypes import mixture
  from protojax.prototypes.mixture import online_em

__version__ = "0.1.0"
__all__ = [
  "config",
  "data",
  "diagnose",
  "errors",
  "load",
  "losses",
  "methods",
  "metrics",
  "mixture",
  "online_em",
  "prototypes",
  "recipes",
  "resolving",
  "schedules",
  "train",
]

_FUNCTIONS = {  # and the module that each is in; all other names are modules
  "diagnose": "protojax.api",
  "load": "protojax.loading",
  "online_em": "protojax.prototypes.mixture",
  "train": "protojax.api",
}


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f"module 'protojax' has no attribute {name!r}")
  if name in _FUNCTIONS:
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)
  inside = "prototypes.mixture" if name == "mixture" else name
  return importlib.import_module(f"protojax.{inside}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
