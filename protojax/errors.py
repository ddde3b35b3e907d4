"""What ends a program in one line: a mistake of the user (and checks that find it), a stop."""

import signal
from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
  """A mistake that the user can mend; the programs print its one line and exit with status 2.

  The message says what was wrong, where, and what to do, on a single line. It names arguments and
  config keys, "config.optim.lr" and "workdir"; `cli.guarded` writes them as flags on a terminal.
  """


def in_line(text: object, most: int = 300) -> str:
  r"""What another library says, or a file, as part of a message: one line that can be printed.

  >>> in_line("no such\n  thing\x1b[2J")
  'no such thing?[2J'
  """
  line = " ".join(str(text).split())
  return "".join(c if c.isprintable() else "?" for c in line)[:most]


# Behind the number of the last step, where a run ends before its result is written.
TRAINED = (
  ", the last one: all steps are saved; run the same command (without config.overwrite) for what "
  "is left, the result and the report"
)


class Interrupted(Exception):
  """The run was asked to stop, by this signal, and has saved state `step`.

  Args:
    step: updates done.
    number: of the signal.
    trained: whether that was the last step.
    broken_off: whether work of the devices was, whose end nobody waits for.
  """

  def __init__(
    self,
    step: int,
    number: int = signal.SIGTERM,
    *,
    trained: bool = False,
    broken_off: bool = False,
  ):
    super().__init__(
      f"stopped at step {step}{TRAINED}"
      if trained
      else f"stopped at step {step}; run the same command (without config.overwrite) to go on"
    )
    self.step, self.number, self.broken_off = step, number, broken_off


LOST = 75  # status of a program whose other processes are lost: nothing to mend, start it again


class Missing(Exception):
  """Another process did not come or is lost, or a disk is; `cli.guarded` ends with `LOST`."""


def require_positive(options: Mapping[str, Any], *names: str) -> None:
  """Refuses the first of these settings, in the section `config.method`, that is not above 0.

  Raises:
    UserError: one line.
  """
  for name in names:
    if not options[name] > 0:
      raise UserError(f"method.{name}={options[name]} must be above 0")


def require(config: Mapping[str, Any], only: dict[str, Any], why: str) -> None:
  """Refuses a config in which a setting, "section.name", is not the one value `only` allows.

  Raises:
    UserError: one line, that ends in what to set.
  """
  for key, value in only.items():
    section, name = key.split(".")
    if config[section][name] != value:
      raise UserError(f"{key}={config[section][name]!r}: {why}; set config.{key}={value}")
