"""What is wrong with a checkpoint's prototypes, or with a loss: anybody's, not only protojax's.

python -m protojax.doctor dino_deitsmall16_pretrain_full_checkpoint.pth
"""

import argparse
import json
import pathlib
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from protojax import __version__, cli, errors, files, pretrained
from protojax.interop import prototype_layouts, tensor_files
from protojax.metrics import diagnosis, loss_curve, verdicts
from protojax.reports import record

_DESCRIPTION = """\
Examines prototypes, or a loss.

  python -m protojax.doctor runs/own                     a run of protojax
  python -m protojax.doctor checkpoint.pth               .pth, .pt, .ckpt, .safetensors, .npy, .npz
  python -m protojax.doctor log.txt                      a log: metrics.jsonl, DINO's, DINOv2's

A run is judged by its metrics, too; --data=run also looks at its images and says which prototypes
they use. For other checkpoints give embeddings, [N, D] as .npy: what comes out of the head just
before the prototypes. PyTorch is not needed, and nothing inside a file is run. Distances are cosine
distances, 1 - cos."""


_MANY = 100_000  # prototypes; 65,536 of 256 dimensions take less than a minute of two cores
_OF_FILES = ("key", "transpose", "which", "embeddings")  # flags that say something about a file
_OF_RUNS = ("embeddings", "data", "data_dir", "split", "limit", "step")


def _is_text(path: pathlib.Path) -> bool:
  with open(path, "rb") as file:
    head = file.read(4096)
  try:
    head.decode()
  except UnicodeDecodeError as error:
    return error.start > len(head) - 4  # a character cut in two
  return b"\0" not in head and bool(head)


def _percent(count: int, num: int) -> str:
  return f"{count:,} ({count / num:.1%})"


def _row(name: str, cells) -> str:
  return f"  {name:<13}" + "".join(f"{cell:>17}" for cell in cells)


def render(name: str, result: Mapping[str, Any]) -> list[str]:
  """The lines that show `diagnosis.examine`'s result for the set called `name`."""
  num, dim = result["num"], result["dim"]
  lines = [f"{name}: {num:,} prototypes of {dim} dimensions", ""]
  lines.append(_row("unique at", (f"{t:g}" for t in result["thresholds"])))
  for kind, label in (
    ("unique", "greedy cover"),
    ("components", "components"),
    ("isolated", "isolated"),
  ):
    lines.append(_row(label, (_percent(n, num) for n in result["unique"][kind])))
  lines.append(_row("random cover", (_percent(n, num) for n in result["random"]["unique"])))
  lines += [
    "  cover: in index order, strictly nearer; components: single linkage; isolated: none nearer;",
    "  random: greedy cover of unit rows of the same K and D, "
    + (
      "drawn once"
      if result["random_drawn"]
      else "not drawn: fewer than .001 near pairs are expected"
    ),
  ]
  if result["groups"]:
    lines.append(f"  largest groups of the cover at {verdicts.HEADLINE:g}, with their first rows:")
    lines += [
      f"    {g['size']:,}: {', '.join(map(str, g['first']))}"
      + ", ..." * (g["size"] > len(g["first"]))
      for g in result["groups"]
    ]
  lost = result["without_direction"]
  lines.append(f"  rows that are zero: {lost['zero']:,}, not finite: {lost['not_finite']:,}")
  if "spectrum" not in result:
    return lines
  near, spectrum, norm = result["nearest"], result["spectrum"], result["norm"]
  lines += [
    f"  copies to the bit: {result['copies_to_the_bit']:,}",
    "  nearest other prototype, 5 % / median / 95 %: "
    + " / ".join(f"{v:.4f}" for v in near["distance"]),
    "    of random ones, by the distribution of cosines on the sphere: "
    + " / ".join(f"{v:.4f}" for v in near["random"]),
    f"  norm, least / median / most: {norm['least']:.4g} / {norm['median']:.4g} / "
    f"{norm['most']:.4g}"
    + (
      f"; gain g {result['gain']['least']:.4g} to {result['gain']['most']:.4g}"
      if "gain" in result
      else ""
    ),
    f"  spectrum of the directions: RankMe {spectrum['rankme']:.1f} of "
    f"{spectrum['largest_possible']}, {spectrum['directions_for_99_percent']} singular values hold "
    f"99 % of the energy, mean cosine {spectrum['mean_cosine']:z.3f}",
  ]
  if "usage" in result:
    seen = result["usage"]
    lines += [
      f"  usage by {seen['images']:,} embeddings (largest product): {seen['used']:.1%} used, "
      f"{seen['unused']:,} by none, perplexity {seen['perplexity']:.1f}, the most used takes "
      f"{seen['largest_share']:.1%}",
      f"  median distance between neighbours over median distance of an embedding to its nearest: "
      f"{seen['relative_uniqueness']:.2f} (copies: 0)",
      f"  embeddings: RankMe {seen['rankme']:.1f}, std {seen['feature_std']:.3f} of 1, mean cosine "
      f"{seen['mean_cosine']:.3f}",
    ]
  return lines


def _embeddings(path: str) -> np.ndarray:
  arrays = tensor_files.read(path)
  named = [k for k in ("embeddings", "features") if k in arrays] or list(arrays)
  if arrays[named[0]].ndim != 2 or (len(arrays) > 1 and named[0] not in ("embeddings", "features")):
    raise errors.UserError(
      f"--embeddings={path}: no matrix [N, D] of embeddings in it: save one with numpy.save"
    )
  return arrays[named[0]]


def _examine(
  one: prototype_layouts.Prototypes, embeddings, prototypes="learned"
) -> tuple[dict, list[str]]:
  """(result, lines) of one set, the diagnosis included in both."""
  weights = one.weights()
  if embeddings is not None and embeddings.shape[1] != weights.shape[1]:
    raise errors.UserError(
      f"the embeddings have {embeddings.shape[1]} dimensions and {one.name} {weights.shape[1]}: "
      "give what comes out of the head just before the prototypes, not features of the backbone"
    )
  if embeddings is not None and not (len(embeddings) > 1 and np.isfinite(embeddings).all()):
    raise errors.UserError("the embeddings must be at least two rows of finite numbers")
  if len(weights) > _MANY:
    print(f"comparing {len(weights):,} prototypes pair by pair: minutes", file=sys.stderr)
  result = diagnosis.examine(weights, gain=one.gain, cosine=one.cosine, embeddings=embeddings)
  result |= {"key": one.key, "aliases": list(one.aliases)}
  result["diagnosis"] = diagnosis.words(result, cosine=one.cosine, prototypes=prototypes)
  lines = render(one.name, result)
  if one.aliases:
    lines.append(f"  the same numbers are called {', '.join(one.aliases)}: tied heads, one set")
  return result, [*lines, "", *_said(result["diagnosis"])]


def _said(sentences: list[str]) -> list[str]:
  """One sentence after the other, in lines of the width of the table."""
  wrapped = (textwrap.wrap(s, 96, break_on_hyphens=False) for s in sentences)
  return [("    " if i else "  - ") + line for lines in wrapped for i, line in enumerate(lines)]


def _of_file(args) -> tuple[dict, list[str]]:
  arrays = tensor_files.read(args.path)
  found = prototype_layouts.candidates(arrays)
  key = args.key or (found[0][0] if found and len(arrays) == 1 else None)  # nothing to choose from
  if key:
    sets = [prototype_layouts.at(arrays, key, args.transpose)]
  else:
    sets = prototype_layouts.find(arrays, args.which)
  if not sets:
    print(f"{args.path}: {len(arrays)} arrays; those with two axes, [rows, columns]:")
    print("\n".join(f"  {name}  {list(shape)}" for name, shape in found) or "  none")
    raise errors.UserError(
      f"no prototypes found in {args.path}: {prototype_layouts.advice(arrays)}"
    )
  kind = (
    f"prototypes taken from {key}" if key else f"names as in {prototype_layouts.kind(arrays, sets)}"
  )
  whose = sorted({prototype_layouts.owner(s.name) for s in sets} - {""})
  lines = [f"file: {len(arrays)} arrays, {kind}" + "".join(f"; weights of the {w}" for w in whose)]
  embeddings = None if args.embeddings is None else _embeddings(args.embeddings)
  out = {"kind": "file", "layout": kind, "sets": {}}
  for one in sets:
    out["sets"][one.name], shown = _examine(one, embeddings)
    lines += ["", *shown]
  if key and sets[0].matrix.shape[0] < sets[0].matrix.shape[1]:
    lines += _said(["fewer rows than columns: if the file has them as [D, K], add --transpose"])
  return out, lines


def _of_run(args) -> tuple[dict, list[str]]:
  folder = pathlib.Path(args.path).expanduser()
  out, lines = {"kind": "run", "sets": {}}, []
  judged = record.verdict(folder) if (folder / "metrics.jsonl").exists() else None
  if judged is not None:
    verdict, step, since = judged
    out["run"] = {**verdict._asdict(), "step": step, "since": since}
    lines = [
      f"run: {verdict.label} at step {step:,}, by metrics.jsonl"
      + f" (since step {since:,})" * (since < step),
      *_said([verdict.sentence]),
    ]
  if not any((folder / "checkpoints").glob("[0-9]*")):
    if judged is None:
      raise errors.UserError(
        f"{args.path} is a folder without checkpoints or metrics of a run of protojax: give a "
        "workdir or one file (exported weights hold no prototypes)"
      )
    return out, [*lines, *_said(["there is no checkpoint yet whose prototypes could be seen"])]
  model = pretrained.load(args.path, step=args.step)
  seen = {}
  if args.embeddings is not None:
    given = _embeddings(args.embeddings)
    seen = dict.fromkeys(model.prototypes, given)
  elif args.data and model.prototypes:
    name = None if args.data == "run" else args.data
    split = None if name == "folder" else "train"
    source = pretrained.source(model, args.split or split, name=name, data_dir=args.data_dir)
    seen = pretrained.rows(model, source, parts=("embeddings",), limit=args.limit)["embeddings"]
    lines.append(f"  images: {source.name}, {len(next(iter(seen.values()))):,} of {len(source):,}")
  lines.append(f"checkpoint of step {model.step:,}" + ", no prototypes" * (not model.prototypes))
  for name, matrix in model.prototypes.items():
    one = prototype_layouts.Prototypes(name, name, matrix, cosine=True)
    out["sets"][name], shown = _examine(one, seen.get(name), model.config.method.prototypes)
    lines += ["", *shown]
  return out, lines


def _of_log(args) -> tuple[dict, list[str]]:
  path = pathlib.Path(args.path).expanduser()
  if path.name == "metrics.jsonl" and (path.parent / "config.json").exists():
    judged = record.verdict(path.parent)
    if judged is not None:
      return {"kind": "run", "run": judged.verdict._asdict()}, [
        f"run: {judged.verdict.label} at step {judged.step:,}, since step {judged.since:,}",
        *_said([judged.verdict.sentence]),
      ]
  log = loss_curve.read(path)
  said = loss_curve.words(log)
  return {"kind": "log", "log": log.kind, "records": len(log.loss), "diagnosis": said}, [
    f"log: {len(log.loss):,} losses ({log.kind}), {log.unit} {log.at[0]:g} to {log.at[-1]:g}: "
    f"first {log.loss[0]:.3f}, least {np.nanmin(log.loss):.3f}, last {log.loss[-1]:.3f}",
    *loss_curve.reference(log),
    *_said(said),
  ]


def _parser() -> argparse.ArgumentParser:
  parser = cli.parser("doctor", _DESCRIPTION)
  parser.add_argument("path", help="workdir of a run, a checkpoint, or a log")
  parser.add_argument("--key", help="array that holds the prototypes, where its name says nothing")
  parser.add_argument("--transpose", action="store_true", help="the array at --key is [D, K]")
  parser.add_argument("--which", choices=("teacher", "student"), help="default: the teacher's")
  parser.add_argument("--embeddings", help=".npy [N, D]: what the prototypes are compared with")
  parser.add_argument("--data", help="of a run: its images (run), or digits, folder, a TFDS name")
  parser.add_argument("--data_dir", help="where the data is")
  parser.add_argument("--split", help="default: train")
  parser.add_argument("--limit", type=int, default=0, help="images at most, evenly spread; 0: all")
  parser.add_argument("--step", type=int, help="checkpoint of a run; default: the newest")
  parser.add_argument("--json", help="file to write everything to")
  return parser


def main(argv: list[str]) -> None:
  args = _parser().parse_args(argv)
  path = pathlib.Path(args.path).expanduser()
  if not path.exists():
    raise errors.UserError(f"there is no {args.path}: give a workdir, a checkpoint or a log")
  out_path = None if args.json is None else pathlib.Path(args.json).expanduser()
  if out_path is not None and (out_path.is_dir() or not out_path.parent.is_dir()):
    what = "is a folder" if out_path.is_dir() else f"there is no folder {out_path.parent}"
    raise errors.UserError(f"--json={args.json}: {what}: name a file in a folder that is there")
  idle = next((k for k in ("data_dir", "split", "limit") if getattr(args, k) and not args.data), "")
  if idle:
    raise errors.UserError(f"--{idle} says nothing without --data: add --data=run, or leave it out")
  if args.data and args.embeddings:
    raise errors.UserError("--data and --embeddings are two sources of embeddings: give one")
  if args.limit < 0:
    raise errors.UserError(f"--limit={args.limit} must not be negative (0: all images)")
  given = {k: getattr(args, k) for k in (*_OF_FILES, *_OF_RUNS)}
  if path.is_dir():
    examine, what, allowed = _of_run, "a workdir", _OF_RUNS
  elif _is_text(path):
    examine, what, allowed = _of_log, "a log", ()
  else:
    examine, what, allowed = _of_file, "a file of arrays", _OF_FILES
  for name, value in given.items():
    if value and name not in allowed:
      raise errors.UserError(f"--{name} means nothing for {args.path}, {what}: leave it out")
  out, lines = examine(args)
  print("\n".join([f"protojax doctor: {args.path}", *lines]))
  if out_path is not None:
    about = {"path": args.path, "protojax": __version__, "distance": "cosine, 1 - cos"}
    files.write(out_path, json.dumps(about | out, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
