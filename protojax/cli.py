"""What the programs `protojax <verb>` share: one line for a mistake, no traceback."""

import argparse
import atexit
import contextlib
import difflib
import errno
import logging
import math
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TextIO

from absl import flags
from absl import logging as absl_logging

from protojax import errors, program_log, progress


class _Parser(argparse.ArgumentParser):
  """argparse prints its usage before an error and ends the process; here an error is one line."""

  meant: Callable[[str], str | None] | None = None  # of a flag that there is not: the one for it

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    # Before argparse does: a mistyped flag would be called a missing one.
    flags = [option for action in self._actions for option in action.option_strings]
    for argument in sys.argv[1:] if args is None else args:
      if argument == "--":
        break
      name, equals, value = argument.partition("=")
      if not name.startswith("--") or name in flags:
        continue
      if self.meant and (flag := self.meant(name)):
        raise errors.UserError(f"there is no flag {argument}: did you mean {flag}{equals}{value}?")
      if near := nearest(name, flags):
        self.error(f"there is no flag {argument}: did you mean {near}?")
    if word := self._stray(sys.argv[1:] if args is None else args):
      meant = " or ".join(f"{flag}={word}" for flag in self._named())
      self.error(f"{word} stands alone: did you mean {meant}?")
    return super().parse_known_args(args, namespace)

  def _named(self) -> list[str]:
    """The flags of what a word alone probably is."""
    known = [option for action in self._actions for option in action.option_strings]
    return [flag for flag in ("--config", "--workdir") if flag in known]

  def _stray(self, args: Sequence[str]) -> str | None:
    """The first word that belongs to no flag, where it may be meant for one that is not given."""
    takes = {option: a.nargs for a in self._actions for option in a.option_strings}
    given = {argument.partition("=")[0] for argument in args}
    named = self._named()
    positional = any(not a.option_strings for a in self._actions)
    if positional or not named or given & {"--", "--help", "-h", *named}:
      return None
    left: float = 0  # words that belong to the flag before
    for argument in args:
      if argument.startswith("-"):
        number = takes.get(argument, 0)  # None: one word; "=" has its own
        left = 1 if number is None else number if isinstance(number, int) else math.inf
      elif left:
        left -= 1
      else:
        return argument
    return None

  def error(self, message: str) -> NoReturn:
    raise errors.UserError(f"{message}; {self.prog} --help shows what there is")


def parser(
  verb: str,
  description: str,
  *,
  epilog: str = "",
  meant: Callable[[str], str | None] | None = None,
) -> argparse.ArgumentParser:
  """A parser for `protojax <verb>` that raises UserError for a mistake.

  Args:
    verb: as in `protojax.__main__.VERBS`.
    description: what --help says first, kept as it is written.
    epilog: what --help says last, likewise.
    meant: a flag that there is not -> the one that it was probably meant to be, or None; asked
      before the nearest of this program's own is looked for.
  """
  made = _Parser(
    prog=f"protojax {verb}",
    description=description,
    epilog=epilog,
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  made.meant = meant
  return made


def nearest(word: str, words: Iterable[str]) -> str | None:
  """The one of `words` that `word` was probably meant to be.

  >>> nearest("workdr", ["config", "workdir"])
  'workdir'
  """
  words = [one for one in words if len(one.lstrip("-")) > 1]  # a letter resembles anything
  return next(iter(difflib.get_close_matches(word, words, 1)), None)


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
  """A type of argparse: with int, "10,20" -> (10, 20)."""

  def parse(text: str) -> tuple:
    return tuple(kind(part) for part in text.split(","))

  parse.__name__ = f"list of {kind.__name__}"
  return parse


# Arguments of the library for which there is a flag of the same name, as messages have them.
_NAMED = (
  r"(coordinator_address|crop|data|devices|embeddings|format|heads|image_size|key|limit|num_processes|rows|stem|step|topology|which"
  r"|workdir)="
)
_KEY = r"config\.(?!json\b|py\b)[a-z]"  # config.json and protojax/config.py are files
_ADVISED = r"(?<=another )(?=workdir\b)|(?<=give )(?=data_dir=)"
_FLAG = re.compile(rf"(?<![^\s(])(?={_NAMED}|{_KEY})|{_ADVISED}")
_SWITCH = re.compile(r"(?<![^\s(])(transpose|cosine)=True\b")  # a flag without a value
# Alone, data_dir is a setting of training; beside data it is an argument too.
_BESIDE = re.compile(r"(?<=data=folder)(\s+)(?=data_dir=)")


def with_flags(message: str) -> str:
  """A message of the library as the terminal shows it.

  >>> with_flags("workdir=runs/a is a file: lower config.optim.lr or choose another workdir")
  '--workdir=runs/a is a file: lower --config.optim.lr or choose another --workdir'
  """
  return _FLAG.sub("--", _SWITCH.sub(r"--\1", _BESIDE.sub(r"\1--", message)))


# What these say below these levels tells a user nothing: jax looks for a TPU on every machine,
# matplotlib lists fonts, and warns that doing so takes a moment on a new one.
_LEVELS = {
  "jax": logging.WARNING,
  "matplotlib": logging.WARNING,
  "matplotlib.font_manager": logging.ERROR,
}


def _hush() -> None:
  """Keeps other libraries' notes about themselves off the terminal; a level that is set stays."""
  for name, level in _LEVELS.items():
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
      logger.setLevel(level)


def _plain_log() -> None:
  """The log of protojax on the terminal, from INFO on."""
  flags.FLAGS(["protojax"])  # absl's own, at their defaults: its log waits for them
  absl_logging.use_absl_handler()
  handler = absl_logging.get_absl_handler()
  handler.setFormatter(program_log.Plain())
  handler.python_handler.addFilter(program_log.ours)
  absl_logging.set_verbosity(absl_logging.INFO)


_at_once: int | None = None  # the status of a program that is about to end by Ctrl-C or its disk


def _leave() -> None:
  """Ends such a process here, the last of what atexit does.

  Taking XLA down after a compilation that was interrupted crashes (jax 0.10.2); what orbax could
  not write complains of a closed event loop.
  """
  if _at_once is not None:
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(_at_once)


def _unread(stream: TextIO) -> bool:
  """Whether nobody reads this stream any more."""
  try:
    stream.flush()
    look = select.poll()
    look.register(stream.fileno(), 0)
  except BrokenPipeError:
    return True
  except (OSError, ValueError):  # no file, or closed
    return False
  return any(event & select.POLLERR for _, event in look.poll(0))


def guarded(call: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> Any:
  """Runs `call(argv)`; a user's mistake becomes one line and status 2.

  A run that was asked to stop ends with 143 (SIGTERM), 129 (SIGHUP) or 130 (Ctrl-C), as shells have
  it; a program whose reader is gone, as of `protojax doctor ... | head -1`, without a word and 141.
  """
  global _at_once
  _hush()
  _plain_log()
  atexit.register(_leave)
  try:
    done = call(argv)
    sys.stdout.flush()
    return done
  except errors.UserError as error:
    progress.write(f"protojax: {with_flags(str(error))}")
    if isinstance(error.__cause__, OSError | ValueError):  # the disk's: tensorstore has ValueErrors
      _at_once = 2
    sys.exit(2)
  except errors.Interrupted as stop:
    progress.write(f"protojax: {with_flags(str(stop))}")
    if stop.broken_off:  # JAX would crash where it takes down what is still at work
      _at_once = 128 + stop.number
      atexit.register(_leave)  # before what JAX has registered
    sys.exit(128 + stop.number)
  except errors.Missing as missing:
    progress.write(f"protojax: {with_flags(str(missing))}")
    sys.exit(errors.LOST)
  except OSError as error:
    if error.errno == errno.EPIPE and _unread(sys.stdout):
      progress.discard(sys.stdout)
      sys.exit(128 + signal.SIGPIPE)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    progress.write(
      f"protojax: no space left on device for {error.filename or 'the output'}: free some space "
      "and run the same command again; what was written before is intact"
    )
    sys.exit(2)
  except KeyboardInterrupt as stop:
    progress.write(f"protojax: {with_flags(str(stop)) or 'interrupted'}")
    _at_once = 130
    sys.exit(130)
  finally:
    progress.end()
    if _unread(sys.stdout):  # or Python complains of it at its end
      progress.discard(sys.stdout)
