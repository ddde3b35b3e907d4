"""Heights and widths: what `augment.global_size` and its like mean, 224 or (160, 320)."""

from typing import Any

from protojax import errors

Size = int | tuple[int, int]


def pair(size: Any) -> tuple[int, int]:
  """(height, width) in pixels of a whole number, which is a square, or of (height, width).

  >>> pair(224), pair((160, 320))
  ((224, 224), (160, 320))
  """
  return (size, size) if isinstance(size, int) else (size[0], size[1])


def text(size: Any) -> str:
  """A size for people: "224" or "160 x 320"."""
  return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"


def nearest(size: Size, patch: int) -> Size:
  """The size of whole patches that is nearest to `size`, one or more to a side.

  >>> nearest(64, 14), nearest((160, 330), 16)
  (70, (160, 336))
  """
  return checked("size", [max(patch, round(side / patch) * patch) for side in pair(size)])


def checked(name: str, size: Any) -> Size:
  """A whole number, or (height, width) where the two differ, of what a user typed.

  Args:
    name: of the setting, for the message.
    size: anything.

  Raises:
    UserError: if it is neither, or not positive.
  """
  sides = list(size) if isinstance(size, list | tuple) else [size, size]
  whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
  if len(sides) != 2 or not whole or min(sides) < 1:
    raise errors.UserError(
      f"{name}={size!r} must be at least 1 pixel: a whole number, or (height, width)"
    )
  return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])
