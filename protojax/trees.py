"""Nested dicts and their flat form, {"model.depth": 12, ...}: one spelling of both ways."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

_SHOWN = 4  # names that `not_finite` shows


def flat(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
  """Flattens nested mappings, {"a.b": leaf} of {"a": {"b": leaf}}; those without entries go.

  >>> flat({"model": {"depth": 12, "width": 384}, "seed": 0, "empty": {}})
  {'model.depth': 12, 'model.width': 384, 'seed': 0}

  Args:
    tree: nested mappings with keys of type str, a `ConfigDict` too.
    separator: between the keys.
  """
  plain = tree.to_dict() if hasattr(tree, "to_dict") else tree
  return traverse_util.flatten_dict(plain, sep=separator)


def nested(leaves: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
  """The nested dicts of which `leaves` is the flat form.

  >>> nested({"model.depth": 12, "seed": 0})
  {'model': {'depth': 12}, 'seed': 0}
  """
  return traverse_util.unflatten_dict(leaves, sep=separator)


def not_finite(leaves: Mapping[str, Any]) -> str:
  """Which leaves hold NaN or infinity, in words; "" if none does.

  >>> not_finite({"a": np.ones(2), "b.scale": np.array([1.0, np.nan]), "n": np.array(3)})
  '1 of 3 tensors hold NaN or infinity: b.scale'

  Args:
    leaves: {name: array of any dtype}, a flat form.
  """
  floats = {name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
  bad = [name for name, leaf in floats.items() if not np.isfinite(np.asarray(leaf)).all()]
  shown = ", ".join(bad[:_SHOWN]) + f" and {len(bad) - _SHOWN} more" * (len(bad) > _SHOWN)
  return f"{len(bad)} of {len(leaves)} tensors hold NaN or infinity: {shown}" if bad else ""
