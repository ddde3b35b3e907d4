"""Weights in from other libraries, and out to them, with an account of every tensor.

protojax convert dino_deitsmall16_pretrain.pth converted
protojax convert runs/own own_timm --format=timm
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

import safetensors
import safetensors.numpy

from protojax import cli, errors, progress
from protojax.interop import compiled, exporters, importers, settings
from protojax.models import resnet
from protojax.prototypes import scoring
from protojax.training import export

_DESCRIPTION = """\
Converts weights, tensor by tensor, and says what became of each.

  protojax convert dino_vitsmall16_pretrain.pth converted      from another library
  protojax convert checkpoint.pth converted --which=student
  protojax convert runs/own own_timm --format=timm             from a run of protojax
  protojax convert runs/own backbone --no_head                 for a run with a head of its own

In: DINO, iBOT, DINOv2 and timm transformers, Hugging Face's ViT and Dinov2, torchvision ResNet-18
and -50 (SwAV's and DINO's too), as .pth, .pt, .safetensors, .npz or a folder. The folder OUT then
holds encoder.safetensors and config.json, and of a full checkpoint of DINO, iBOT, DINOv2 or SwAV
prototypes.safetensors. evaluate, embed and doctor take it as it is (the doctor with prototypes
alone), and a run starts from it, of whatever width and depth:

  protojax train --config=gmm_photos --workdir=runs/own --config.init_from=OUT

Weights that hold NaN or infinity are refused, by their names.

Out, of a run or of exported weights:
  timm  a folder for timm.create_model("local-dir:OUT", pretrained=True); of a ResNet the names in
        it are torchvision's too
  hf    a folder for transformers.AutoModel.from_pretrained
  jax   features.jax, for jax.export.deserialize: float32 [B, S, S, 3] normalised -> [B, F]
  onnx  encoder.onnx, of the same function; needs jax2onnx"""

FORMATS = ("protojax", "timm", "hf", "jax", "onnx")
# All that any format writes: only a folder of these is ever replaced.
_OURS = {
  "encoder.safetensors",
  "prototypes.safetensors",
  "model.safetensors",
  "config.json",
  "preprocessor_config.json",
  "features.jax",
  "encoder.onnx",
  "encoder.onnx.data",
}
_SHOWN = 4  # names of tensors that one line of the account shows


@contextlib.contextmanager
def _atomic_folder(out: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
  """A folder to write into that becomes `out` when nothing failed, and else is gone."""
  out = out.absolute()  # "." has no name
  if out.exists() or out.is_symlink():
    if not overwrite:
      raise errors.UserError(f"{out} is there already: name another OUT or add --overwrite")
    other = "is no folder"
    if out.is_dir():
      foreign = sorted({p.name for p in out.iterdir()} - _OURS)
      other = f"holds {foreign[0]}" if foreign else None
    if other:
      raise errors.UserError(
        f"{out} {other}, which no conversion wrote, so it is not replaced: name another OUT"
      )
  part, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("part", "old"))
  try:
    part.mkdir(parents=True)
    yield part
    if out.exists():
      out.rename(old)
    part.rename(out)
  except (PermissionError, NotADirectoryError, FileExistsError) as error:
    raise errors.UserError(f"cannot write to {out}: {error.strerror}") from None
  finally:
    shutil.rmtree(part, ignore_errors=True)
    if old.exists() and not out.exists():
      old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def exported_of(path: pathlib.Path) -> pathlib.Path | None:
  """Where protojax's own weights lie, of a run or a folder or file; None if these are not ours."""
  if (path / "exported").is_dir() or (path / "env.json").is_file():
    return path / "exported"
  if (path / "encoder.safetensors").is_file():
    return path
  if path.is_file() and path.suffix == ".safetensors":
    try:
      with safetensors.safe_open(path, framework="numpy") as opened:
        return path if "info" in (opened.metadata() or {}) else None
    except safetensors.SafetensorError:
      return None  # whoever reads it next says that it is damaged
  return None


def _list(count: int, what: str, names: list[str]) -> str:
  shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
  return f"{what} {count}" + (f": {shown}" if names else "")


def _write_json(path: pathlib.Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _shape(model: dict) -> str:
  """What a model is; a transformer by its numbers, for its name is one of a few."""
  if not model["name"].startswith("vit"):
    return f"{model['name']}" + (f", stem {model['stem']}" if "stem" in model else "")
  fields = ("width", "depth", "heads", "patch_size", "image_size", "registers", "norm_eps")
  shape = "transformer, " + ", ".join(f"{key} {model[key]}" for key in fields if key in model)
  return shape + (", LayerScale" if model.get("layer_scale") else "")


def bring_in(
  path: pathlib.Path, out: pathlib.Path, *, overwrite=False, allow_partial=False, **options
) -> list[str]:
  """Converts weights of another library to a folder like exported/ of a run.

  Args:
    path: a file, or a folder of Hugging Face or timm.
    out: the new folder.
    overwrite: replace a folder that an earlier conversion wrote.
    allow_partial: convert although a tensor is missing or unexpected.
    **options: of `importers.convert`.

  Returns:
    The account, lines.

  Raises:
    UserError: for weights that do not fit one to one or are not finite, and anything that cannot be
      read or written.
  """
  done = importers.convert(path, **options)
  if done.not_finite:
    raise errors.UserError(
      f"{path}: {done.not_finite}: nothing made with them means anything, so nothing was written; "
      "take an earlier or an undamaged copy (protojax doctor looks at what else is in this one)"
    )
  source = done.info["source"]
  lines = [
    f"read {source['file']}: {source['layout']}"
    + (f", tensors below {source['prefix']!r}" if source["prefix"] else ""),
    f"model {_shape(done.info['model'])}",
    "head "
    + (
      "none, a run that starts from this begins with a fresh one"
      if "head" not in done.info
      else "{layers} layers, hidden {hidden}, output {bottleneck}".format(**done.info["head"])
    ),
    *(
      f"{name} {one.rows.shape[0]:,} of {one.rows.shape[1]} dimensions, from {done.layers[name]}"
      for name, one in done.prototypes.items()
    ),
    *(
      []
      if done.prototypes
      else ["prototypes none: the doctor has nothing to judge, embed neither embeddings nor codes"]
    ),
    f"matched {len(done.tensors)} of {len(done.tensors) + len(done.missing)} tensors",
    _list(len(done.missing), "missing", importers.missing(done)),
    _list(len(done.unexpected), "unexpected", done.unexpected),
    *(_list(len(left), f"set aside ({why})", left) for why, left in done.aside.items()),
    *(f"note: {note}" for note in done.notes),
    *(
      f"note: rows of {name} differ in length: codes go by the largest product, not cosine"
      for name, one in done.prototypes.items()
      if not scoring.even(one)
    ),
  ]
  if (done.missing or done.unexpected) and not allow_partial:
    counts = "; ".join(line for line in lines if line.startswith(("missing ", "unexpected ")))
    raise errors.UserError(
      f"{path} fits only in part: {counts}. Nothing was written; --allow_partial initialises what "
      "is missing and leaves out what is unexpected"
    )
  tensors, info = done.tensors, done.info
  if done.missing:
    tensors, info = tensors | importers.fresh(done), info | {"initialised": done.missing}
  with _atomic_folder(out, overwrite) as folder:
    export.write(folder, tensors, info, done.prototypes)
  return [*lines, _wrote(out)]


def leave_out_head(path: pathlib.Path, out: pathlib.Path, *, overwrite: bool = False) -> list[str]:
  """Writes the backbone of our own weights alone, for a run that is to have a new head.

  Args:
    path: folder or file that `export.read` takes.
    out: the new folder.
    overwrite: replace a folder that an earlier conversion wrote.

  Returns:
    The account, lines.

  Raises:
    UserError: for anything that cannot be read or written.
  """
  tensors, info = export.read(path)
  kept = {name: x for name, x in tensors.items() if name.split(".")[1] != "head"}
  info = {k: v for k, v in info.items() if k not in ("head", "method", "prototypes")}
  info["lacks"] = sorted({*info.get("lacks", ()), "head"})
  with _atomic_folder(out, overwrite) as folder:
    export.write(folder, kept, info)
  return [
    f"model {_shape(info['model'])}",
    f"kept {len(kept)} tensors of the backbone, left out {len(tensors) - len(kept)} of the head; "
    "a run that starts from this begins with a fresh one",
    _wrote(out),
  ]


def take_out(
  path: pathlib.Path, out: pathlib.Path, format: str, *, overwrite: bool = False
) -> list[str]:
  """Converts an exported encoder to another library's files.

  Args:
    path: folder or file that `export.read` takes.
    out: the new folder.
    format: "timm", "hf", "jax" or "onnx".
    overwrite: replace a folder that an earlier conversion wrote.

  Returns:
    The account, lines.

  Raises:
    UserError: for an encoder that the format cannot hold, and anything that cannot be read or
      written.
  """
  tensors, info = export.read(path)
  lines = [
    f"read {path}: the {info['weights']}"
    + ("" if info["step"] is None else f" of step {info['step']}")
    + f", {len(tensors)} tensors",
    f"model {_shape(info['model'])}",
    *(f"note: {said}" for said in [export.initialised(export.lacked(info))] if said),
  ]
  with _atomic_folder(out, overwrite) as folder:
    if format in ("timm", "hf"):
      plain, rest = exporters.plain(tensors, info)
      plain, info, resampled = exporters.at_size_of_views(plain, info)
      if format == "timm":
        theirs, config, notes = exporters.timm(plain, info)
      else:
        theirs, config, processor, notes = exporters.hugging_face(plain, info)
        _write_json(folder / "preprocessor_config.json", processor)
      lines += [
        f"matched {len(plain)} of {len(plain)} tensors of the backbone, {len(theirs)} of {format}",
        *([_list(len(rest), "left out (projection head)", rest)] if rest else []),
        *(f"note: {note}" for note in (*resampled, *notes)),
      ]
      content = safetensors.numpy.save(theirs, metadata={"format": "pt"})
      (folder / "model.safetensors").write_bytes(content)
    else:
      image = settings.image_of(info)
      shape = "[B, {}, {}, {}]".format(*image)
      features = compiled.function(tensors, info)
      if format == "jax":
        (folder / "features.jax").write_bytes(compiled.serialized(features, image))
      else:
        compiled.write_onnx(folder / "encoder.onnx", features, image)
      config = {
        "input": f"images float32 {shape}, in [0, 1], minus mean, over std",
        "output": "features float32 [B, F], the backbone's last layer",
        **info,
      }
      lines.append(
        f"images {shape} float32, normalised -> features, any B; "
        + ("checked with ONNX Runtime" if format == "onnx" else ", ".join(compiled.PLATFORMS))
      )
    _write_json(folder / "config.json", config)
  return [*lines, _wrote(out)]


def _wrote(out: pathlib.Path) -> str:
  files = sorted(out.iterdir())
  return f"wrote {out}: " + ", ".join(
    f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in files
  )


def main(argv: list[str]) -> None:
  parser = cli.parser("convert", _DESCRIPTION)
  parser.add_argument("path", metavar="IN", help="file of weights, folder, or workdir of a run")
  parser.add_argument("out", metavar="OUT", help="folder to write")
  parser.add_argument("--format", choices=FORMATS, help="default: protojax, from others")
  parser.add_argument("--no_head", action="store_true", help="leave the projection head out")
  parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
  theirs = parser.add_argument_group("of weights from other libraries")
  theirs.add_argument("--which", help="teacher (default), student or a prefix, of several networks")
  theirs.add_argument("--heads", type=int, help="attention heads; default: config.json, width / 64")
  theirs.add_argument("--stem", choices=resnet.STEMS, help="of a ResNet whose first layer is 3 x 3")
  theirs.add_argument("--image_size", type=int, help="pixels to resample the position embedding to")
  theirs.add_argument(
    "--crop", type=float, help="of evaluation, .875 for 256 -> 224; default: what lies beside"
  )
  theirs.add_argument("--transpose", action="store_true", help="prototypes are stored [D, K]")
  theirs.add_argument("--allow_partial", action="store_true", help="convert what fits")
  args = parser.parse_args(argv)
  path, out = (pathlib.Path(p).expanduser() for p in (args.path, args.out))
  if out.resolve() in (path.resolve(), *path.resolve().parents):
    raise errors.UserError(f"OUT={args.out} would replace IN={args.path}: name another OUT")
  ours, to_ours = exported_of(path), args.format in (None, "protojax")
  if ours is None and not to_ours:
    raise errors.UserError(
      f"{args.path} is not protojax's: bring it in first (without --format), then convert that to "
      f"{args.format}"
    )
  if ours is None:
    with progress.during(f"converting {args.path}"):
      lines = bring_in(
        path,
        out,
        overwrite=args.overwrite,
        allow_partial=args.allow_partial,
        which=args.which,
        heads=args.heads,
        stem=args.stem,
        image_size=args.image_size,
        crop=args.crop,
        with_head=not args.no_head,
        transpose=args.transpose,
      )
  else:
    if to_ours and not args.no_head:
      raise errors.UserError(
        f"{args.path} is protojax's already: --format={', '.join(FORMATS[1:])} converts it, "
        "--no_head writes its backbone alone"
      )
    for name in ("which", "heads", "stem", "image_size", "crop", "transpose", "allow_partial"):
      if getattr(args, name):
        raise errors.UserError(
          f"--{name} is for weights of other libraries; {args.path} is protojax's"
        )
    if args.no_head and not to_ours:
      raise errors.UserError(f"--no_head: format {args.format} holds the backbone alone anyway")
    with progress.during(f"converting {args.path}"):
      if to_ours:
        lines = leave_out_head(ours, out, overwrite=args.overwrite)
      else:
        lines = take_out(ours, out, args.format, overwrite=args.overwrite)
  print(cli.with_flags("\n".join(lines)))


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
