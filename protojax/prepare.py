"""Makes a data set that training reads fast: CIFAR, or images of yours at the size training stores.

protojax prepare cifar10 DATA
"""

import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

from protojax import cli, errors
from protojax.data import cifar, prepared, sources

_DESCRIPTION = """\
Makes a data set in the folder OUT, as array_record, for --config.data.data_dir=OUT.

  protojax prepare cifar10 OUT        downloads, checks and stores it without loss
  protojax prepare folder IN OUT --size=384      images below IN (or tar, or parquet)

cifar10 and cifar100 come from their authors' archives; a download that was cut off goes on with the
same command, and --archive=FILE takes one that is there already.

Images of folder, tar and parquet are made SIZE pixels high and wide at most, as training
with --config.data.image_size=SIZE would do at every step, and stored as JPEG of --quality=95 with
its colours in full resolution; below 95 they have half of it, as in most photos, and decoding is
faster (docs/data.md). Their original height and width are kept beside them: crops are drawn as from
the original. Images that cannot be read are left out and named."""


def _of_archive(kind: str, out: str, file: str | None) -> tuple[str, str, dict[str, int]]:
  archive = cifar.ARCHIVES[kind]
  prepared.folder(out, kind, cifar.VERSION)  # asked before anything is downloaded
  root = pathlib.Path(out).expanduser()
  path = cifar.check(archive, file) if file else cifar.download(archive, root)
  splits = {split: _shown(cifar.examples(archive, path, split), split) for split in archive.splits}
  features = cifar.features(archive, path)
  counts = prepared.write(out, kind, cifar.VERSION, features, splits)
  if not file:
    path.unlink()  # all of it is in the data set
  return kind, cifar.VERSION, counts


def _of_images(
  kind: str,
  data_dir: str,
  out: str,
  name: str,
  splits_asked: str | None,
  size: int,
  quality: int,
  num_workers: int | None,
) -> tuple[str, str, dict[str, int]]:
  prepared.folder(out, name, "1.0.0")
  chosen = splits_asked.split(",") if splits_asked else _splits(kind, data_dir)
  found: dict[str, sources.Source] = {}
  value_range = None  # of images of more than 8 bits, that of the first split for all
  for split in chosen:
    one = sources.build(kind, split=split, data_dir=data_dir, value_range=value_range)
    found[split or "train"], value_range = one, one.value_range
  first = next(iter(found.values()))
  for one in found.values():
    if one.class_names != first.class_names:
      raise errors.UserError(
        f"{first.name} and {one.name} have different classes ({first.num_classes} and "
        f"{one.num_classes}): a data set has the same in all its splits; choose some with --splits "
        "and prepare the others under another --name"
      )
  skipped: list[str] = []
  options = {"root": data_dir, "size": size, "num_workers": num_workers, "skipped": skipped}
  options["quality"] = quality
  splits = {
    split: _shown(prepared.smaller(one, **options), split, len(one)) for split, one in found.items()
  }
  counts = prepared.write(out, name, "1.0.0", prepared.features_of(first), splits)
  if value_range is not None:
    print(f"images of more than 8 bits: {sources.range_words(value_range)} become 0 to 255")
  if skipped:
    print(
      f"{len(skipped)} images cannot be read and are left out: {sources.source.listed(skipped)}"
    )
  return name, "1.0.0", counts


def _splits(kind: str, data_dir: str) -> list[str | None]:
  """The splits that there are; [None] where the images are not divided."""
  if kind == "folder":
    root = sources.source.folder_of(data_dir, kind)
    names = [path.name.lower() for path in root.iterdir() if path.is_dir()]
    found = [{"training": "train", "testing": "test"}.get(name, name) for name in names]
  else:
    found = list(sources.shards.found(data_dir, f".{kind}"))
  return [split for split in sources.shards.SPLITS if split in found] or [None]


def _shown(examples: Iterable, split: str, total: int | None = None) -> Iterable:
  import tqdm

  return tqdm.tqdm(examples, desc=split, total=total, unit=" images", disable=None)


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  parser = cli.parser("prepare", _DESCRIPTION)
  parser.usage = (
    f"protojax prepare {{{','.join(cifar.ARCHIVES)}}} OUT [--archive=FILE]\n"
    f"       protojax prepare {{folder,{','.join(sources.SHARDS)}}} IN OUT [--size=384] [...]"
  )
  parser.add_argument("kind", choices=[*cifar.ARCHIVES, "folder", *sources.SHARDS])
  parser.add_argument("paths", nargs="+", metavar="[IN] OUT", help="images; the new data set")
  parser.add_argument("--archive", help="of cifar10 or cifar100, downloaded before")
  parser.add_argument("--size", type=int, default=384, help="pixels, data.image_size (384)")
  parser.add_argument(
    "--quality", type=int, default=prepared.QUALITY, help="of JPEG, 1 to 100 (95)"
  )
  parser.add_argument("--name", help="of the data set, data.name; else as IN is called")
  parser.add_argument("--splits", help="train,test: which to take; else all there are")
  parser.add_argument("--num_workers", type=int, help="processes that decode; 0: threads")
  args = parser.parse_args(argv)
  of_archive = args.kind in cifar.ARCHIVES
  if len(args.paths) != (1 if of_archive else 2):
    places = "OUT" if of_archive else "IN OUT"
    raise errors.UserError(f"{args.kind} takes {places}; protojax prepare --help")
  if args.size < 1:
    raise errors.UserError(f"--size={args.size} must be at least 1 pixel")
  if not 1 <= args.quality <= 100:
    raise errors.UserError(f"--quality={args.quality} must be 1 to 100")
  out = args.paths[-1]
  if of_archive:
    name, version, counts = _of_archive(args.kind, out, args.archive)
  else:
    given = args.name or pathlib.Path(args.paths[0]).expanduser().absolute().name
    name = args.name or re.sub(r"\W+", "_", given.lower())
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in sources.KINDS:
      raise errors.UserError(
        f"{name!r} cannot be the name of a data set: choose one with --name, small letters, digits "
        "and _, none of " + ", ".join(sources.KINDS)
      )
    name, version, counts = _of_images(
      args.kind, args.paths[0], out, name, args.splits, args.size, args.quality, args.num_workers
    )
  place = pathlib.Path(out).expanduser() / name / version
  said = ", ".join(f"{split} {count:,}" for split, count in counts.items())
  size = "" if of_archive else f" --config.data.image_size={args.size}"
  print(f"{place}: {said} images")
  print(f"train with --config.data.name={name} --config.data.data_dir={out}{size}")


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
