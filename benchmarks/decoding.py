"""Images a second of CPU time: each source against a plain loop with Pillow.

  python -m benchmarks.decoding [--images 512] [--size 256]

Crops of 500 x 375 pixels of scikit-learn's two photos (JPEG of quality 92, about 60 kB) are written
as a folder, as tar and parquet shards, and prepared at quality 95 and 85. Each is then read once,
shuffled, by threads of this process, rounds in turn. "main_us" is what the thread that trains
spends on an image of the prepared set while a worker process decodes, "process_us" what its whole
process spends. CPU time, not wall time, so that a machine which does other work counts less. Prints
one JSON line.
"""

import argparse
import io
import itertools
import json
import pathlib
import statistics
import tarfile
import tempfile
import time

import numpy as np
import PIL
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from sklearn import datasets

from protojax import prepare
from protojax.data import pipeline, sources

BATCH = 128
_PHOTOS = datasets.load_sample_images().images  # uint8 [427, 640, 3]


def photo(rng: np.random.Generator) -> bytes:
  """A JPEG of 500 x 375 pixels."""
  image = _PHOTOS[rng.integers(len(_PHOTOS))]
  height, width = image.shape[:2]
  top, left = rng.integers(height - 375 + 1), rng.integers(width - 500 + 1)
  file = io.BytesIO()
  crop = image[top : top + 375, left : left + 500]
  Image.fromarray(crop).save(file, "jpeg", quality=92)
  return file.getvalue()


def write(root: pathlib.Path, images: int, size: int) -> dict[str, sources.Source]:
  """The same photos in every form; {name: source}."""
  rng, rows = np.random.default_rng(0), []
  (root / "folder").mkdir()
  (root / "shards").mkdir()
  with tarfile.open(root / "shards" / "train-000.tar", "w") as archive:
    for i in range(images):
      rows.append(photo(rng))
      (root / "folder" / f"{i:05d}.jpg").write_bytes(rows[-1])
      archive.add(root / "folder" / f"{i:05d}.jpg", f"{i:05d}.jpg")
  table = pa.table({"image": [{"bytes": row, "path": None} for row in rows]})
  parquet.write_table(table, root / "shards" / "train-00000.parquet", row_group_size=100)
  places = {"folder": "folder", "tar": "shards", "parquet": "shards"}
  for quality in (95, 85):
    name = f"prepared_{quality}"
    options = [f"--size={size}", f"--name={name}", f"--quality={quality}"]
    prepare.main(["folder", str(root / "folder"), str(root), *options])
    places[name] = ""
  return {
    name: sources.build(name, split="train", data_dir=root / place)
    for name, place in places.items()
  }


def plain(paths: list[pathlib.Path], size: int) -> float:
  """Images a second of CPU time of a loop with Pillow."""
  start = time.process_time()
  for path in paths:
    with Image.open(path) as image:
      squashed = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    np.asarray(squashed)
  return len(paths) / (time.process_time() - start)


def rate(source: sources.Source, size: int) -> float:
  """Images a second of CPU time, every one once, in a shuffled order, decoded by threads."""
  rows, start = np.random.default_rng(1).permutation(len(source)), time.process_time()
  for _ in pipeline.ordered(source, rows, batch_size=BATCH, image_size=size):
    pass
  return len(source) / (time.process_time() - start)


def beside(source: sources.Source, size: int, steps: int) -> tuple[float, float]:
  """Microseconds an image of this thread, and of this process, while another process decodes."""
  stream = pipeline.batches(
    source, seed=0, step=0, batch_size=BATCH, image_size=size, num_workers=1
  )
  list(itertools.islice(stream, 2))
  thread, process = time.thread_time(), time.process_time()
  for _ in itertools.islice(stream, steps):
    pass
  thread, process = time.thread_time() - thread, time.process_time() - process
  stream.close()
  return thread / steps / BATCH * 1e6, process / steps / BATCH * 1e6


def measure(images: int, size: int, rounds: int) -> dict:
  """Medians over `rounds`."""
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    found = write(root, images, size)
    paths = sorted((root / "folder").iterdir())
    rates: dict[str, list[float]] = {name: [] for name in ("plain", *found)}
    spent = []
    for _ in range(rounds):
      rates["plain"].append(plain(paths, size))
      for name, source in found.items():
        rates[name].append(rate(source, size))
      spent.append(beside(found["prepared_95"], size, 8))
    kilobytes = {
      "photo": sum(path.stat().st_size for path in paths) / images / 1000,
    } | {
      name: sum(p.stat().st_size for p in root.glob(f"{name}/*/*record*")) / images / 1000
      for name in found
      if name.startswith("prepared")
    }
  return {
    "benchmark": "decoding",
    "images": images,
    "size": size,
    "per_cpu_s": {name: round(statistics.median(values)) for name, values in rates.items()},
    "main_us": round(statistics.median(s[0] for s in spent), 1),
    "process_us": round(statistics.median(s[1] for s in spent), 1),
    "kilobytes": {name: round(value) for name, value in kilobytes.items()},
    "rounds": rounds,
    "pillow": PIL.__version__,
  }


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=512)
  parser.add_argument("--size", type=int, default=256)
  parser.add_argument("--rounds", type=int, default=3)
  arguments = parser.parse_args()
  print(json.dumps(measure(arguments.images, arguments.size, arguments.rounds)))
