"""protojax report --workdir=RUN [--workdir=RUN2 ...] [--out=FILE]: one HTML page.

Of several runs also a table of where they ended, printed, and a picture beside the page.
"""

import pathlib
import shlex
import sys

from protojax import cli, errors
from protojax.reports import comparison, gallery, of_run, record
from protojax.training import workdir

_DESCRIPTION = """One self-contained page about a run, or about several in the same charts.

Verdict and numbers with their protocol, curves, collapse of the prototypes, the images nearest to
the most and the least used of them, attention maps, augmented views, settings. Finished runs and
running ones; what a run lacks is left out and said. Of several runs a table is printed, too, and a
picture written beside the page."""


def main(argv: list[str]) -> None:
  """Writes the page and prints its path and size, of several runs also how they compare."""
  parser = cli.parser("report", _DESCRIPTION)
  parser.add_argument(
    "--workdir", action="append", required=True, help="folder of a run; give it again for more"
  )
  parser.add_argument(
    "--out",
    help=f"file to write; default: {workdir.REPORT}, of several runs {of_run.OF_SEVERAL}, in the "
    "(first) workdir",
  )
  parser.add_argument(
    "--limit",
    type=int,
    default=gallery.LIMIT,
    help="images among which those nearest to a prototype are sought; 0: all of the bank",
  )
  args = parser.parse_args(argv)
  if args.limit < 0:
    raise errors.UserError(f"--limit={args.limit} must not be negative (0: all images)")
  folders = [pathlib.Path(folder).expanduser() for folder in args.workdir]
  out = of_run.write(
    folders,
    out=pathlib.Path(args.out).expanduser() if args.out else None,
    limit=args.limit,
    origin=shlex.join(["protojax", "report", *argv]),
  )
  written = f"{len(folders)} run{'s' * (len(folders) > 1)}, {out.stat().st_size / 1e6:.2f} MB"
  if len(folders) > 1:
    print("\n".join(comparison.table(record.read(folders))))
    print(f"\n{out.with_suffix('.png')}: the picture")
  print(f"{out}: {written}")


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
