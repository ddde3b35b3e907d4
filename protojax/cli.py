"""What the programs `protojax <verb>` share: one line for a mistake, no traceback."""

import argparse
import difflib
import errno
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from protojax import errors


class _Parser(argparse.ArgumentParser):
  """argparse prints its usage before an error and ends the process; here an error is one line.

  A flag that does not exist is named with the nearest one, before any that is missing.
  """

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    known = [name for name in self._option_string_actions if name.startswith("--")]
    for argument in sys.argv[1:] if args is None else args:
      name = argument.partition("=")[0]
      if name == "--":
        break
      if name.startswith("--") and name not in known:
        near = difflib.get_close_matches(name, known, 1)
        self.error(f"unknown flag {name}" + (f": did you mean {near[0]}" if near else ""))
    return super().parse_known_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    raise errors.UserError(f"{message}; {self.prog} --help shows what there is")


def parser(verb: str, description: str, *, epilog: str = "") -> argparse.ArgumentParser:
  """A parser for `protojax <verb>` that raises UserError for a mistake.

  Args:
    verb: as in `protojax.__main__.VERBS`.
    description: what --help says first, kept as it is written.
    epilog: what --help says last, likewise.
  """
  return _Parser(
    prog=f"protojax {verb}",
    description=description,
    epilog=epilog,
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


# Arguments of the library for which there is a flag of the same name, as messages have them.
_NAMED = r"(data|embeddings|format|heads|image_size|key|limit|stem|step|which|workdir)="
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
