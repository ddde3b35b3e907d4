"""Docstrings as the site shows them: examples are code, and brackets are brackets.

An extension of griffe, which reads docstrings for mkdocstrings (mkdocs.yml); nothing else uses it.
"""

import re

import griffe


def _as_markdown(text: str) -> str:
  lines, example = [], False
  for line in text.splitlines():
    if not example and line.lstrip().startswith(">>>"):
      lines.append("```pycon")
      example = True
    elif example and not line.strip():
      lines.append("```")
      example = False
    # "[a][b]" would be a link.
    lines.append(line if example else re.sub(r"\](\s?)\[", r"]\1\\[", line))
  return "\n".join([*lines, *["```"] * example])


class Docstrings(griffe.Extension):
  """Rewrites every docstring that is read."""

  def on_object(self, *, obj, **kwargs):
    if obj.docstring:
      obj.docstring.value = _as_markdown(obj.docstring.value)
