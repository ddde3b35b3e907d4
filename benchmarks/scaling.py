"""What the ImageNet recipes take of slices of TPUs: python -m benchmarks.scaling

Plans each recipe for each slice (`protojax plan`, compiled ahead of time; nothing runs on a TPU),
writes docs/results/scale.json after each and the table of docs/scale.md at the end. What is in the
file by the same command is not compiled again; --again does. Needs libtpu (pip
install -e ".[plan]"); a full recipe takes minutes.
"""

import argparse
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.accelerator import records
from protojax import files

PAGE = records.ROOT / "docs" / "scale.md"
RESULTS = records.ROOT / "docs" / "results" / "scale.json"
_BEGIN, _END = "<!-- scale: written by benchmarks.scaling -->", "<!-- scale: end -->"
_NOTHING = "Nothing has been compiled for this table yet: `python -m benchmarks.scaling` does.\n"
_BASE = ("--config.model.name=vit_base",)
ROWS = {  # name: (recipe, flags)
  "ViT-S, gmm": ("gmm_vit_s", ()),
  "ViT-S, dino": ("dino_vit_s", ()),
  "ViT-S, ibot": ("ibot_vit_s", ()),
  "ViT-S, falcon": ("falcon_vit_s", ()),
  "ViT-B, gmm": ("gmm_vit_s", _BASE),
  "ViT-B, dino": ("dino_vit_s", _BASE),
  "ViT-B, ibot": ("ibot_vit_s", _BASE),
  "ViT-B, falcon": ("falcon_vit_s", _BASE),
  "ResNet-50, swav": ("swav_resnet50", ()),
}
SLICES = ("v5e:4x4", "v5e:16x16", "v6e:8x8", "v5p:4x4x4")


def published() -> dict:
  """{"row, slice": what `protojax plan --json` wrote}; {} before the first."""
  return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def command(name: str, slice_: str, flags: list[str]) -> list[str]:
  """What follows `protojax` to plan one row on one slice."""
  recipe, own = ROWS[name]
  return ["plan", f"--config={recipe}", f"--topology={slice_}", *own, *flags]


def plan(name: str, slice_: str, flags: list[str]) -> dict:
  """The plan of one row on one slice, in a process of its own, with its versions and command.

  Raises:
    CalledProcessError: with the program's own line, if it refuses.
  """
  said = command(name, slice_, flags)
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "plan.json"
    program = [sys.executable, "-m", "protojax", *said, f"--json={out}"]
    subprocess.run(program, check=True, cwd=records.ROOT, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
  versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
  about = {"commit": records.commit(), "versions": versions}
  return found | about | {"command": " ".join(["protojax", *said])}


def table(found: dict) -> str:
  """The rows of the page, those that were planned."""
  heads = (
    *("recipe", "slice", "images a chip", "peak, GiB", "products, ms", "memory, ms"),
    *("messages, ms", "bound by", "images/s a chip", "of all", "efficiency", "largest batch"),
  )
  lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
  for name in ROWS:
    for slice_ in SLICES:
      if (one := found.get(f"{name}, {slice_}")) is not None:
        lines.append(f"| {name} | {slice_} | " + " | ".join(_cells(one)) + " |")
  return "\n".join(lines) + "\n"


def _cells(one: dict) -> list[str]:
  chips, limit = one["devices"], one["limit"] / 2**30
  images = f"{one['batch_size'] / chips:g}"
  most = f"{one['largest_batch']['batch_size']:,}" if "largest_batch" in one else "–"
  if "memory" not in one:
    return [images, f"{one['needed'] / 2**30:.1f} of {limit:.1f}: too much", *["–"] * 7, most]
  said = one["predicted"]
  return [
    images,
    f"{one['memory']['peak'] / 2**30:.1f} of {limit:.1f}",
    *(f"{1e3 * said[part]:.1f}" for part in ("matrix", "memory", "network")),
    said["bound"],
    f"{said['images_per_second'] / chips:,.0f}",
    f"{said['images_per_second']:,.0f}",
    f"{100 * said['efficiency']:.0f} %",
    most,
  ]


def section(found: dict) -> str:
  """What stands between the two marks of the page."""
  if not found:
    return f"{_BEGIN}\n{_NOTHING}{_END}"
  commits = sorted({one["commit"] for one in found.values()})
  versions = sorted({", ".join(map(" ".join, one["versions"].items())) for one in found.values()})
  about = f"Commit {', '.join(commits)}; {'; '.join(versions)}.\n"
  if (whole := len(ROWS) * len(SLICES)) > len(found):
    about += f"{len(found)} of {whole} have been compiled; the same command goes on.\n"
  return f"{_BEGIN}\n{about}\n{table(found)}{_END}"


def write(page: pathlib.Path, found: dict) -> None:
  """Puts the table into the page."""
  text = page.read_text()
  start, end = text.index(_BEGIN), text.index(_END) + len(_END)
  files.write(page, text[:start] + section(found) + text[end:])


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", nargs="*", default=list(ROWS), help="some of the table")
  parser.add_argument("--slices", nargs="*", default=list(SLICES))
  parser.add_argument("--batch_size", type=int, default=1024, help="of all chips of a slice")
  parser.add_argument("--set", nargs="*", default=[], metavar="model.depth=1", help="to try it")
  parser.add_argument("--again", action="store_true", help="what is there, too")
  parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="file to write to")
  arguments = parser.parse_args(argv)
  flags = [
    f"--config.{change}" for change in (f"batch_size={arguments.batch_size}", *arguments.set)
  ]
  found = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
  for name in arguments.rows:
    for slice_ in arguments.slices:
      key = f"{name}, {slice_}"
      wanted = " ".join(["protojax", *command(name, slice_, flags)])
      if found.get(key, {}).get("command") == wanted and not arguments.again:
        continue
      print(key, flush=True)
      try:
        found[key] = plan(name, slice_, flags)
      except subprocess.CalledProcessError as error:
        print(f"{key}: status {error.returncode}, left out")
        continue
      files.write_json(arguments.out, found)
  if arguments.out == RESULTS:
    write(PAGE, found)
  print(table(found), end="")


if __name__ == "__main__":
  main(sys.argv[1:])
