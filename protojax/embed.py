"""Features of every image of a folder or data set, with file names, as .npz or Parquet.

python -m protojax.embed runs/own --data=folder --data_dir=IMAGES --out=features.parquet
"""

import json
import os
import pathlib
import sys

import numpy as np
from absl import logging

from protojax import __version__, cli, errors, files, pretrained, progress, sizes

_DESCRIPTION = """\
Writes features (and codes) of images, one row an image.

  python -m protojax.embed runs/own --out=features.npz                      the run's own images
  python -m protojax.embed runs/own --data=folder --data_dir=IMAGES --out=features.parquet

.npz holds the arrays filename [N], label [N] (-1: none), index [N], features [N, F] float32, of a
run with prototypes code (or code_<set>) [N], the number of the prototype with the largest score,
and protocol, a JSON string that says what made them. Parquet has the same as columns, protocol in
the metadata of its schema."""


def _write_npz(path: pathlib.Path, columns: dict[str, np.ndarray], protocol: str) -> None:
  with open(path, "wb") as file:
    np.savez(file, **columns, protocol=np.array(protocol))


def _write_parquet(path: pathlib.Path, columns: dict[str, np.ndarray], protocol: str) -> None:
  import pyarrow as pa  # slow to import, and only for this format
  from pyarrow import parquet

  def column(values):
    if values.ndim == 1:
      return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])

  table = pa.table({name: column(values) for name, values in columns.items()})
  parquet.write_table(table.replace_schema_metadata({"protocol": protocol}), path)


_WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}


def embed(model: pretrained.Trained, source, *, layer: str = "last", limit: int = 0) -> dict:
  """The columns of the file, {name: array [N, ...]}, in the order of the source.

  Args:
    model: from `pretrained.load`.
    source: from `data.build`.
    layer: of `pretrained.layers(model)`.
    limit: at most so many images, evenly spread; 0 takes all.

  Raises:
    UserError: for an unknown layer.
  """
  parts = ("features", "codes") if model.prototypes else ("features",)
  encoded = pretrained.encoded(model, source, parts=parts, layers=(layer,), limit=limit)
  columns = {
    "filename": np.array([source.describe(i) for i in encoded["index"]]),
    "label": encoded["label"],
    "index": encoded["index"],
    "features": encoded["features"][layer],
  }
  for name, codes in encoded.get("codes", {}).items():
    columns["code" if name == "prototypes" else f"code_{name}"] = codes
  return columns


def write(path: str | os.PathLike, columns: dict[str, np.ndarray], protocol: dict) -> None:
  """Writes `columns` whole or not at all.

  Args:
    path: ends in .npz or .parquet.
    columns: {name: array [N] or [N, F]}.
    protocol: JSON, kept beside the arrays.

  Raises:
    UserError: if the path has another ending or cannot be written.
  """
  path = pathlib.Path(path)
  writer = _writer(path)
  files.write(path, lambda file: writer(file, columns, json.dumps(protocol)))


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
  parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
  parser.add_argument("--layer", default="last", help="last; a ViT: last4, last_avg, last4_avg")
  parser.add_argument("--limit", type=int, default=0, help="images at most, evenly spread; 0: all")
  parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
  args = parser.parse_args(argv)
  logging.set_verbosity(logging.INFO)  # what a folder holds
  out = pathlib.Path(args.out).expanduser()
  _writer(out)
  if out.exists() and not args.overwrite:
    raise errors.UserError(f"--out={out} is there already: name another or add --overwrite")
  if args.limit < 0:
    raise errors.UserError(f"--limit={args.limit} must not be negative (0: all images)")
  model = pretrained.load(args.path, step=args.step)
  split = args.split or (None if args.data in ("folder", "parquet", "tar") else "train")
  source = pretrained.source(model, split, name=args.data, data_dir=args.data_dir)
  columns = embed(model, source, layer=args.layer, limit=args.limit)
  config, views = model.config, model.config.augment
  protocol = {
    "model": str(args.path),
    "step": model.step,
    "weights": model.weights,
    "layer": args.layer,
    "source": source.name,
    "images": len(source),
    "limit": args.limit,
    "transform": f"{sizes.text(views.global_size)} px, centre crop {config.probe.crop:g}",
    "protojax": __version__,
  }
  with progress.during(f"writing {out}"):
    write(out, columns, protocol)
  count, wanted = len(columns["index"]), min(args.limit or len(source), len(source))
  print(
    f"{out}: {count} images of {source.name}, {columns['features'].shape[1]} features of layer "
    f"{args.layer} of the {model.weights}, step {model.step}"
    + (f"; {wanted - count} could not be read" if count < wanted else "")
  )


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
