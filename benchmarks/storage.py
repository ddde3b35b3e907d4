"""What a view loses to the size at which images are stored, and what that size costs.

  python -m benchmarks.storage [--sizes 256 320 384 448 512] [--draws 64]

The published code crops the original file. The originals here are whole photos, of scikit-learn and
matplotlib, whose longer side is brought to 500 pixels. The same boxes are cut out of the original
and out of what is stored in a square of S x S:

  sharpness  energy of the gradient kept, over all draws: 1 is as sharp as from the original
  error      root mean square of the difference, in grey levels of 255

for views of 224 pixels (.4 to 1 of the area), of 96 (.05 to .4), the smallest of these (.05 to .14)
and the evaluation transform, resize 256 and crop 224. Three ways to store: "cap", what
`decoding.store` does, each side S at most; "squashed", each side S; "fit", the longer side S at
most, the aspect kept. "per_cpu_s" is how many of these photos, as JPEG of quality 92, one core
decodes and stores, "prepared_per_cpu_s" how many that `protojax prepare` has stored. Writes
docs/results/storage.json and prints the table of docs/data.md.
"""

import argparse
import io
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import matplotlib.cbook
import numpy as np
from PIL import Image
from sklearn import datasets

from protojax.data import augment, decoding, resize
from protojax.data.sources import pixels

LONGER = 500
RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "storage.json"
VIEWS = {  # name: (pixels, share of the area)
  "global": (224, (0.4, 1.0)),
  "local": (96, (0.05, 0.4)),
  "small_local": (96, (0.05, 0.14)),
}


def photos() -> list[np.ndarray]:
  """uint8 [H, W, 3], the longer side `LONGER`."""
  found = [Image.fromarray(image) for image in datasets.load_sample_images().images]
  with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
    found.append(Image.open(file).convert("RGB"))
  resized = []
  for image in found:
    factor = LONGER / max(image.size)
    sides = [round(side * factor) for side in image.size]
    resized.append(np.asarray(image.resize(sides, Image.Resampling.LANCZOS)))
  return resized


def fit(image: np.ndarray, size: int) -> np.ndarray:
  """The image with its longer side at `size` pixels; one that is smaller stays as it is."""
  factor = min(1.0, size / max(image.shape[:2]))
  height, width = (round(side * factor) for side in image.shape[:2])
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def cap(image: np.ndarray, size: int) -> np.ndarray:
  """The image as `decoding.store` keeps it: with each side at `size` pixels at most."""
  return decoding.resized(image, *decoding.stored_shape(image.shape[:2], size))


def cut(stored: np.ndarray, boxes: jax.Array, original: np.ndarray, size: int) -> np.ndarray:
  """[V, size, size, 3], 0 to 255: boxes in pixels of the original, cut out of what is stored."""
  ratio = jnp.tile(jnp.array(stored.shape[:2]) / jnp.array(original.shape[:2]), 2)
  views = resize.crop_resize(jnp.asarray(stored)[None], boxes * ratio, size)
  return 255.0 * np.asarray(views[0]).swapaxes(-1, -2)


def energy(views: np.ndarray) -> float:
  """Sum of the squared differences between neighbouring pixels."""
  return float(sum((np.diff(views, axis=axis) ** 2).sum() for axis in (1, 2)))


def boxes_of(image: np.ndarray, scale: tuple[float, float], draws: int) -> jax.Array:
  """[1, V, 4] boxes of a random resized crop of the original."""
  u = augment.draw(jax.random.key(0), 1, draws)
  originals = jnp.array([image.shape[:2]])
  return augment.sample_boxes(u["area"], u["aspect"], u["top"], u["left"], originals, scale)


def centre_of(image: np.ndarray) -> jax.Array:
  """[1, 1, 4]: what "resize the shorter side to 256, crop 224" keeps."""
  side = min(image.shape[:2]) * 0.875
  middle = np.array(image.shape[:2]) / 2
  return jnp.array([[[*(middle - side / 2), *(middle + side / 2)]]], jnp.float32)


def compare(originals: list[np.ndarray], stored: list[np.ndarray], draws: int) -> dict:
  """{view: (sharpness, error)} of what is stored against the originals."""
  kept = {}
  for name in (*VIEWS, "evaluation"):
    size, scale = VIEWS.get(name, (224, None))
    exact, ours, squares = 0.0, 0.0, []
    for original, image in zip(originals, stored, strict=True):
      boxes = centre_of(original) if scale is None else boxes_of(original, scale, draws)
      views = cut(original, boxes, original, size)
      others = cut(image, boxes, original, size)
      # The views of a photo count alike, whatever its contrast.
      exact += 1.0
      ours += energy(others) / energy(views)
      squares.append(np.mean((others - views) ** 2))
    kept[name] = (round(ours / exact, 3), round(float(np.sqrt(np.mean(squares))), 2))
  return kept


def rate(files: list[bytes], size: int, rounds: int = 5, repeat: int = 8) -> int:
  """Images a second of CPU time, decoded and stored."""
  rates = []
  for _ in range(rounds):
    start = time.process_time()
    for file in files * repeat:
      image = pixels.decode(file)
      decoding.store(image, image.shape[:2], size)
    rates.append(len(files) * repeat / (time.process_time() - start))
  return round(statistics.median(rates))


def encoded(images: list[np.ndarray], quality: int) -> list[bytes]:
  """JPEG files."""
  files = []
  for image in images:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=quality)
    files.append(file.getvalue())
  return files


def measure(sizes: list[int], draws: int) -> dict:
  """One row for each size."""
  originals = photos()
  files = encoded(originals, 92)
  rows = []
  for size in sizes:
    squashed = [decoding.resized(image, size, size) for image in originals]
    rows.append(
      {
        "size": size,
        "kilobytes": round(3 * size**2 / 1000),
        "squashed": compare(originals, squashed, draws),
        "fit": compare(originals, [fit(image, size) for image in originals], draws),
        "cap": compare(originals, [cap(image, size) for image in originals], draws),
        "per_cpu_s": rate(files, size),
        "prepared_per_cpu_s": rate(encoded([cap(image, size) for image in originals], 95), size),
      }
    )
  return {
    "benchmark": "storage",
    "photos": [image.shape[:2] for image in originals],
    "draws": draws,
    "rows": rows,
    "versions": {"jax": jax.__version__, "pillow": Image.__version__},
  }


def table(rows: list[dict]) -> str:
  """Markdown."""
  names = (*VIEWS, "evaluation")
  head = ("size", "kB an image", *names, "files", "prepared")
  lines = ["| " + " | ".join(head).replace("_", " ") + " |", "|---" * len(head) + "|"]
  for row in rows:
    kept = [f"{row['cap'][name][0]:.2f}" for name in names]
    rates = (row["per_cpu_s"], row["prepared_per_cpu_s"])
    cells = (row["size"], row["kilobytes"], *kept, *rates)
    lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", type=int, nargs="+", default=[256, 320, 384, 448, 512])
  parser.add_argument("--draws", type=int, default=64)
  arguments = parser.parse_args()
  measured = measure(arguments.sizes, arguments.draws)
  RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
  print(table(measured["rows"]))
