"""Pages of the site that no file in docs/ is: README, CONTRIBUTING, and the reference.

A hook of MkDocs (mkdocs.yml); nothing else uses it.
"""

import pathlib
import re

from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGE = _ROOT / "protojax"


def _rooms() -> dict[str, list[str]]:
  """{room: its modules}, in the order of docs/architecture.md, which is that of the imports."""
  text = (_ROOT / "docs" / "architecture.md").read_text().partition("## Every module")[2]
  rooms: dict[str, list[str]] = {}
  for path in re.findall(r"`([\w/]+\.py)`", text):
    parts = path.removesuffix(".py").split("/")
    name = ".".join(part for part in ("protojax", *parts) if part not in ("__init__", "__main__"))
    rooms.setdefault(parts[0] if parts[0] != "__init__" else "protojax", []).append(name)
  rooms.pop("__main__", None)
  return rooms


def _linked(text: str) -> str:
  """Links of the repository's root as links of the site."""
  text = re.sub(r"\]\(docs/", "](", text)
  return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](README.md", "](index.md")


def on_page_markdown(markdown, **_):
  """In docs/ the README is one folder up; on the site it is the first page."""
  return markdown.replace("](../README.md", "](index.md")


def on_config(config):
  """Adds the reference to the navigation."""
  config.nav.append({"Reference": [{room: f"reference/{room}.md"} for room in _rooms()]})
  return config


def on_files(files, config):
  """Adds the pages."""
  pages = {
    "index.md": _linked((_ROOT / "README.md").read_text()),
    "contributing.md": _linked((_ROOT / "CONTRIBUTING.md").read_text()),
  }
  for room, modules in _rooms().items():
    pages[f"reference/{room}.md"] = f"# {room}\n\n" + "".join(f"::: {m}\n\n" for m in modules)
  for path, content in pages.items():
    files.append(File.generated(config, path, content=content))
  return files
