"""What is wrong with a checkpoint's prototypes, or with a loss: anybody's, not only protojax's.

protojax doctor dino_deitsmall16_pretrain_full_checkpoint.pth
protojax doctor dino_deitsmall16_pretrain_full_checkpoint.pth --data=folder --data_dir=D
"""

import argparse
import json
import pathlib
import sys

from protojax import __version__, api, cli, errors, files, progress
from protojax.metrics import verdicts

_DESCRIPTION = """\
Examines prototypes, or a loss.

  protojax doctor runs/own                     a run of protojax
  protojax doctor checkpoint.pth               .pth, .pt, .ckpt, .safetensors, .npy, .npz
  protojax doctor log.txt                      a log: metrics.jsonl, DINO's, DINOv2's

A run is judged by its metrics, too; --data=run also looks at its images and says which prototypes
they use. So does --data=NAME for a full checkpoint of DINO, iBOT, DINOv2 or SwAV: its backbone and
head are run here. For other checkpoints give embeddings, [N, D] as .npy: what comes out of the
head just before the prototypes. A file with one matrix that nothing names is described only, until
--rows=prototypes says what it is. PyTorch is not needed, and no code inside a file is run.
Distances are cosine distances, 1 - cos. docs/instruments.md, "The numbers", explains each number.
The status is 0 whatever the verdict is, and with --fail 1 where something is wrong."""


def _parser() -> argparse.ArgumentParser:
  parser = cli.parser("doctor", _DESCRIPTION)
  parser.add_argument("path", help="workdir of a run, a checkpoint, or a log")
  parser.add_argument("others", nargs="*", help=argparse.SUPPRESS)  # refused with a line of its own
  parser.add_argument("--key", help="array or layer of the prototypes, where its name says nothing")
  parser.add_argument("--transpose", action="store_true", help="the prototypes are stored [D, K]")
  parser.add_argument("--rows", help="of a file of one matrix: prototypes, or features of images")
  parser.add_argument(
    "--cosine",
    action=argparse.BooleanOptionalAction,
    default=None,
    help="whether embeddings are compared with directions alone, or by products (--no-cosine): "
    "norms count; default: as the names in a file say, else by products",
  )
  parser.add_argument("--which", choices=("teacher", "student"), help="default: the teacher's")
  parser.add_argument("--embeddings", help=".npy [N, D]: what the prototypes are compared with")
  parser.add_argument("--data", help="images: a run's own (run), or digits, folder, a TFDS name")
  parser.add_argument("--data_dir", help="where the data is")
  parser.add_argument("--split", help="default: train; of an undivided folder all of it")
  parser.add_argument("--limit", type=int, default=0, help="images at most, evenly spread; 0: all")
  parser.add_argument("--heads", type=int, help="attention heads of a ViT; default: width / 64")
  parser.add_argument("--step", type=int, help="checkpoint of a run; default: the newest")
  parser.add_argument(
    "--fail",
    action="store_true",
    help="end with status 1 where the verdict is an alarm; else 0, also where nothing was judged",
  )
  parser.add_argument("--json", help="file to write everything to")
  return parser


def main(argv: list[str]) -> None:
  """The program; see --help."""
  args = _parser().parse_args(argv)
  options = vars(args)
  if others := options.pop("others"):
    raise errors.UserError(
      f"{args.path} and {others[0]}: the doctor examines one a call, so call it for each"
    )
  path, out_path, fail = (options.pop(name) for name in ("path", "json", "fail"))
  if out_path is not None:
    out_path = pathlib.Path(out_path).expanduser()
    if out_path.is_dir() or not out_path.parent.is_dir():
      what = "is a folder" if out_path.is_dir() else f"there is no folder {out_path.parent}"
      raise errors.UserError(f"--json={out_path}: {what}: name a file in a folder that is there")
  with progress.during(f"examining {path}"):
    found = api.diagnose(path, **options)
  print(f"protojax doctor: {path}\n{cli.with_flags(str(found))}")
  alarm = found.verdict is not None and verdicts.is_alarm(found.verdict)
  if out_path is not None:
    about = {"path": path, "protojax": __version__, "distance": "cosine, 1 - cos"}
    about |= {"verdict": found.verdict and found.verdict._asdict(), "alarm": alarm}
    files.write(out_path, json.dumps(about | found.result, indent=2, allow_nan=False) + "\n")
  if fail and alarm:
    sys.exit(1)


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
