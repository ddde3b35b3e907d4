"""What is said of each fault in the test that tries it: the table in docs/survives.md.

  python docs/survives.py        writes it anew

A test that carries `@pytest.mark.survives(FAULT, TRIED, SEEN)` is a row; tests/docs_test.py holds
the page against them.
"""

import ast
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

PAGE = pathlib.Path(__file__).with_suffix(".md")
_TESTS = PAGE.parents[1] / "tests"
_BEGIN, _END = "<!-- of the tests -->\n", "<!-- end -->\n"


class Row(NamedTuple):
  """A fault and its test."""

  fault: str
  tried: str
  seen: str
  test: str
  long: bool


def rows() -> Iterator[Row]:
  """One for each mark, in the order of files and lines."""
  for path in sorted(_TESTS.rglob("*_test.py")):
    text = path.read_text()
    if "mark.survives" not in text:
      continue
    for node in ast.parse(text).body:
      marks = {ast.unparse(d.func if isinstance(d, ast.Call) else d): d for d in _marks(node)}
      if (mark := marks.get("pytest.mark.survives")) is not None:
        fault, tried, seen = (ast.literal_eval(argument) for argument in mark.args)
        test = f"{path.relative_to(_TESTS).as_posix()}: {node.name}"
        yield Row(fault, tried, seen, test, bool({"long", "pytest.mark.skipif"} & marks.keys()))


def _marks(node: ast.AST) -> list[ast.expr]:
  return node.decorator_list if isinstance(node, ast.FunctionDef) else []


def table() -> str:
  """The rows as Markdown."""
  lines = ["| fault | tried | what is seen | test |", "|---|---|---|---|"]
  for row in rows():
    cells = (row.fault, row.tried, row.seen, f"`{row.test}`" + " (--all)" * row.long)
    lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
  return "\n".join(lines) + "\n"


def page() -> str:
  """docs/survives.md with the table of today."""
  before, _, rest = PAGE.read_text().partition(_BEGIN)
  return before + _BEGIN + "\n" + table() + "\n" + _END + rest.partition(_END)[2]


if __name__ == "__main__":
  PAGE.write_text(page())
