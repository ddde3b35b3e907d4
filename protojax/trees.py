"""Nested dicts and their flat form, {"model.depth": 12, ...}: one spelling of both ways."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


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
