"""Nested dicts and their flat form, {"model.depth": 12, ...}: one spelling of both ways."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def flat(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
  """{"a.b": leaf} of {"a": {"b": leaf}}; a mapping without entries has no leaf and goes.

  Args:
    tree: nested mappings with keys of type str, a `ConfigDict` too.
    separator: between the keys.
  """
  plain = tree.to_dict() if hasattr(tree, "to_dict") else tree
  return traverse_util.flatten_dict(plain, sep=separator)


def nested(leaves: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
  """The nested dicts of which `leaves` is the flat form."""
  return traverse_util.unflatten_dict(leaves, sep=separator)
