"""Features of every image of a folder or data set, with file names, as .npz or Parquet.

protojax embed runs/own --data=folder --data_dir=IMAGES --out=features.parquet
"""

import itertools
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from protojax import (
  __version__,
  cli,
  environment,
  errors,
  files,
  loading,
  pretrained,
  progress,
  sizes,
)
from protojax.data import sources

_DESCRIPTION = """\
Writes what a trained encoder makes of images, one row an image.

  protojax embed runs/own --out=features.npz                      the run's own images
  protojax embed runs/own --data=folder --data_dir=IMAGES --out=features.parquet
  protojax embed runs/own --what=patches,codes --layers=last,block9 --out=patches.parquet

--what, one or more of
  features    [F] of the backbone, what k-NN and linear probes see
  patches     [h, w, F], the patch tokens of a ViT, the map of a ResNet
  embeddings  [D] of the head, what is compared with the prototypes; called embedding in the file
  codes       the number of the prototype with the largest score; called code in the file
--layers, of features and patches: last; one by one block1, block2, ... of a ViT (through the final
norm) and stage1 to stage4 of a ResNet; of features of a ViT also last4, last_avg, last4_avg.

.npz holds the arrays filename [N], below the folder of the data; label [N] (-1: none), index [N];
features and patches [N, ...] float32, with several layers features_<layer>; embedding (or
embedding_<set>) [N, D]; code (or code_<set>) [N]; and protocol, a JSON string that says what made
them, with class_names, in the order of the labels, and value_range, of images of more than 8 bits.
It is written in one piece, so it must fit into memory. Parquet has the same as columns, protocol in
the metadata of its schema, and is written as it goes; patches lie flat in it, protocol says their
shape."""

WHAT = ("features", "patches", "embeddings", "codes")
_ROW_GROUP = 64 << 20  # bytes of a Parquet file that are written at a time
_OF_SETS = {"codes": "code", "embeddings": "embedding"}

Columns = dict[str, np.ndarray]


def _bytes(columns: Columns) -> int:
  return sum(values.nbytes for values in columns.values())


def _joined(parts: Sequence[Columns]) -> Columns:
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write_npz(path: pathlib.Path, chunks: Iterable[Columns], protocol: dict) -> None:
  with open(path, "wb") as file:
    np.savez(file, **_joined(list(chunks)), protocol=np.array(json.dumps(protocol)))


def _write_parquet(path: pathlib.Path, chunks: Iterable[Columns], protocol: dict) -> None:
  import pyarrow as pa  # slow to import, and only for this format
  from pyarrow import parquet

  def column(values):
    if values.ndim == 1:
      return pa.array(values)
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, math.prod(values.shape[1:]))

  def grouped():
    group = []
    for chunk in chunks:
      group.append(chunk)
      if sum(map(_bytes, group)) >= _ROW_GROUP:
        yield _joined(group)
        group = []
    if group:
      yield _joined(group)

  writer = None
  try:
    for columns in grouped():
      table = pa.table({name: column(values) for name, values in columns.items()})
      if writer is None:
        metadata = {"protocol": json.dumps(protocol)}
        writer = parquet.ParquetWriter(path, table.schema.with_metadata(metadata))
      writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
  finally:
    if writer is not None:
      writer.close()


_WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}


def chunks(
  model: pretrained.Trained,
  source,
  *,
  what: Sequence[str] = ("features",),
  layers: Sequence[str] = ("last",),
  limit: int = 0,
  root: str | os.PathLike | None = None,
) -> Iterator[Columns]:
  """The columns of the file, {name: array [n, ...]}, in the order of the source, batch by batch.

  Args:
    model: from `loading.load`.
    source: from `data.build`.
    what: of `WHAT`.
    layers: of features and patches, see `pretrained.chunks`.
    limit: at most so many images, evenly spread; 0 takes all.
    root: folder of the source, below which files are named; None leaves their names as they are.

  Raises:
    UserError: for an unknown layer, or codes of something without prototypes.
  """
  above = f"{pathlib.Path(root).expanduser()}/" if root else ""
  for found in pretrained.chunks(model, source, parts=what, layers=layers, limit=limit):
    columns = {
      "filename": np.array([source.describe(i).removeprefix(above) for i in found["index"]]),
      "label": found["label"],
      "index": found["index"],
    }
    for part in what:
      for name in found[part] if part in _OF_SETS else layers:
        values = found[part][name]
        if part in _OF_SETS:
          column = _OF_SETS[part] if name == "prototypes" else f"{_OF_SETS[part]}_{name}"
        else:
          column = part if len(layers) == 1 else f"{part}_{name}"
        columns[column] = values
    yield columns


def _memory() -> int | None:
  """Bytes that a program may take, where the system says so."""
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
  except OSError:
    return None
  return next((int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:")), None)


def _require_room(path: pathlib.Path, first: Columns, count: int) -> None:
  """Refuses what would not fit, by the size of the first rows of `count`."""
  size = _bytes(first) // len(first["index"]) * count
  there = next(folder for folder in path.absolute().parents if folder.is_dir())
  free = shutil.disk_usage(there).free
  shown = f"--out={path}: {count:,} rows take about {size / 1e9:,.1f} GB"
  memory = _memory() if path.suffix == ".npz" else None
  if memory is not None and 2 * size > memory:
    raise errors.UserError(
      f"{shown}, twice that in memory, where {memory / 1e9:,.1f} GB are free, since .npz is "
      "written in one piece: write .parquet, which is written as it goes, or fewer images (--limit)"
    )
  if size > free:
    raise errors.UserError(
      f"{shown} and {free / 1e9:,.1f} GB of the disk are free: take fewer --layers or images "
      "(--limit), or another disk"
    )


def write(path: str | os.PathLike, parts: Iterable[Columns], protocol: dict, count: int) -> dict:
  """Writes the rows of all `parts`, whole or not at all; of Parquet a few are in memory at a time.

  Args:
    path: ends in .npz or .parquet.
    parts: {name: array [n, ...]} each, from `chunks`.
    protocol: JSON, kept beside the arrays; "shapes" of the columns is added.
    count: rows that are expected, to see beforehand whether they fit.

  Returns:
    {"rows": how many were written, "arrays": {name: [rows, ...], its shape}}.

  Raises:
    UserError: if the path has another ending, cannot be written, or would not fit.
  """
  path = pathlib.Path(path)
  writer, rest = _writer(path), iter(parts)
  first = next(rest)
  _require_room(path, first, count)
  shapes = {name: list(values.shape[1:]) for name, values in first.items() if values.ndim > 1}
  done: dict[str, Any] = {"rows": 0}

  def counted():
    for chunk in itertools.chain([first], rest):
      done["rows"] += len(chunk["index"])
      yield chunk

  files.write(path, lambda file: writer(file, counted(), protocol | {"shapes": shapes}))
  done["arrays"] = {name: [done["rows"], *values.shape[1:]] for name, values in first.items()}
  return done


def _writer(path: pathlib.Path):
  if path.suffix not in _WRITERS:
    raise errors.UserError(f"--out={path}: the ending says the format: .npz or .parquet")
  return _WRITERS[path.suffix]


def main(argv: list[str]) -> None:
  parser = cli.parser("embed", _DESCRIPTION)
  parser.add_argument("path", help="workdir of a run, or exported weights")
  parser.add_argument("--out", required=True, help="file to write, .npz or .parquet")
  parser.add_argument(
    "--data", help="digits, folder, parquet, tar or a TFDS data set; default: the run's own"
  )
  parser.add_argument("--data_dir", help="where the data is")
  parser.add_argument("--split", help="default: train; of a folder, all of it")
  parser.add_argument(
    "--value_range",
    metavar="LOW,HIGH",
    type=cli.listed(float),
    help="what is black and white in images of more than 8 bits; default: as in training, else "
    "measured on the images",
  )
  parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
  parser.add_argument(
    "--what", type=cli.listed(str), help=f"of {','.join(WHAT)}; default: features, codes if any"
  )
  parser.add_argument(
    "--layers", "--layer", type=cli.listed(str), default=("last",), help="default: last; see above"
  )
  parser.add_argument("--limit", type=int, default=0, help="images at most, evenly spread; 0: all")
  parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
  args = parser.parse_args(argv)
  out = pathlib.Path(args.out).expanduser()
  _writer(out)
  if out.exists() and not args.overwrite:
    raise errors.UserError(f"--out={out} is there already: name another or add --overwrite")
  if args.limit < 0:
    raise errors.UserError(f"--limit={args.limit} must not be negative (0: all images)")
  if unknown := [what for what in args.what or () if what not in WHAT]:
    raise errors.UserError(f"--what={unknown[0]} is unknown: choose of {', '.join(WHAT)}")
  environment.keep_memory()
  environment.keep_compiled()
  model = loading.load(args.path, step=args.step)
  split = args.split or (None if args.data in ("folder", "parquet", "tar") else "train")
  given, trained = args.value_range, model.config.data.value_range
  if given is not None and trained is not None:
    raise errors.UserError(
      f"--value_range={given[0]:g},{given[-1]:g}: the range of the training is taken, "
      f"{sources.range_words(trained)}: leave it out"
    )
  source = pretrained.source(
    model, split, name=args.data, data_dir=args.data_dir, value_range=given
  )
  what = args.what or ("features", *(("codes",) if model.prototypes else ()))
  what, layers = (tuple(dict.fromkeys(names)) for names in (what, args.layers))
  wanted = min(args.limit or len(source), len(source))
  config, views = model.config, model.config.augment
  protocol = {
    "model": str(args.path),
    "step": model.step,
    "weights": model.weights,
    **({"initialised": model.initialised} if model.initialised else {}),
    "what": what,
    "layers": layers,
    "source": source.name,
    "images": len(source),
    "class_names": source.class_names,
    "value_range": source.value_range,
    "limit": args.limit,
    "transform": f"{sizes.text(views.global_size)} px, centre crop {config.probe.crop:g}",
    "protojax": __version__,
  }
  root = args.data_dir or config.probe.data_dir or config.data.data_dir
  rows = chunks(model, source, what=what, layers=layers, limit=args.limit, root=root)
  with progress.during(f"writing {out}"):
    done = write(out, rows, protocol, wanted)
  arrays = ", ".join(f"{name} {shape}" for name, shape in done["arrays"].items())
  print(
    f"{out}: {done['rows']} images of {source.name}, layer {', '.join(layers)} of the "
    f"{model.weights}"
    + (f", step {model.step}" if model.step is not None else "")
    + f": {arrays}"
    + (f"; {wanted - done['rows']} could not be read" if done["rows"] < wanted else "")
  )


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
