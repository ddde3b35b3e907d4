"""What the programs `python -m protojax.<verb>` share: one line for a mistake, no traceback."""

import argparse
import errno
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from protojax import errors


class _Parser(argparse.ArgumentParser):
  """argparse prints its usage before an error and ends the process; here an error is one line."""

  def error(self, message: str) -> NoReturn:
    raise errors.UserError(f"{message}; {self.prog} --help shows what there is")


def parser(verb: str, description: str) -> argparse.ArgumentParser:
  """A parser for `python -m protojax.<verb>` that raises UserError for a mistake.

  Args:
    verb: name of the module.
    description: what --help says first, kept as it is written.
  """
  return _Parser(
    prog=f"python -m protojax.{verb}",
    description=description,
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
  """A type of argparse: with int, "10,20" -> (10, 20)."""

  def parse(text: str) -> tuple:
    return tuple(kind(part) for part in text.split(","))

  parse.__name__ = f"list of {kind.__name__}"
  return parse


# Arguments of the library for which there is a flag of the same name, as messages have them.
_NAMED = r"(data|embeddings|format|heads|image_size|key|limit|rows|stem|step|which|workdir)="
_KEY = r"config\.(?!json\b|py\b)[a-z]"  # config.json and protojax/config.py are files
_FLAG = re.compile(rf"(?<![^\s(])(?={_NAMED}|{_KEY})|(?<=another )(?=workdir\b)")


def with_flags(message: str) -> str:
  """A message of the library as the terminal shows it.

  >>> with_flags("workdir=runs/a is a file: lower config.optim.lr or choose another workdir")
  '--workdir=runs/a is a file: lower --config.optim.lr or choose another --workdir'
  """
  return _FLAG.sub("--", message)


def guarded(call: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> Any:
  """Runs `call(argv)`; a user's mistake becomes one line and status 2, an asked stop status 143."""
  try:
    return call(argv)
  except errors.UserError as error:
    print(f"protojax: {with_flags(str(error))}", file=sys.stderr)
    sys.exit(2)
  except errors.Interrupted as stop:
    print(f"protojax: {with_flags(str(stop))}", file=sys.stderr)
    sys.exit(143)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    print(
      f"protojax: no space left on device for {error.filename or 'the output'}: free some space "
      "and run the same command again; what was written before is intact",
      file=sys.stderr,
    )
    sys.exit(2)
  except KeyboardInterrupt:
    print("protojax: interrupted", file=sys.stderr)
    sys.exit(130)
