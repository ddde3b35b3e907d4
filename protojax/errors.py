"""The one exception that stands for a mistake of the user."""


class UserError(Exception):
  """A mistake that the user can mend; `main` prints its one line and exits with status 2.

  The message says what was wrong, where, and what to do, on a single line.
  """
