"""An image file -> eight bits a channel, whatever it holds: palettes, 16 bits, floats, n channels.

An image is *deep* if its numbers are not eight bits: 16-bit and floating-point PNG and TIFF, `.npy`
arrays of other types. A deep image is brought to 0..255 by one range (low, high), the same for all
images of a source, so that a bright cell stays brighter than a dim one.
"""

import contextlib
import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from protojax import files, npy

File = str | os.PathLike[str] | bytes
# (low, high), numbers or one for each channel: what becomes black and what becomes white.
Range = tuple[Any, Any]
_NPY = b"\x93NUMPY"
_AT_ONCE = 1 << 22  # numbers of an image that are scaled at a time
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def decode(file: File, channels: int = 3, value_range: Range | None = None) -> np.ndarray:
  """A path or encoded bytes -> uint8 [H, W, channels], upright as EXIF says.

  Of three channels grey becomes three equal ones and alpha is dropped; of one, colour becomes luma.
  Of another number they are those of the file: of an array [H, W, n] or [n, H, W], the n frames of
  a TIFF (three grey ones are three channels), or the bands of a picture, such as RGBA. Of all other
  files with several frames the first counts.

  Args:
    file: JPEG, PNG, TIFF, ... as Pillow reads them, or `.npy`.
    channels: n.
    value_range: (low, high) of a deep image; None takes that of its type: 0 to 65,535 of integers,
      0 to 1 of floats.

  Raises:
    ValueError: if it has other channels; else what Pillow and NumPy raise on a damaged file.
  """
  return to_uint8(read(file, channels), channels, value_range)


def read(file: File, channels: int) -> np.ndarray:
  """The numbers of an image file as they are: [H, W, c], c = `channels` or, of a deep image, 1."""
  if _is_array(file):
    with _opened(file) as content:
      return _channels_last(npy.read(content, _size(file)), channels)
  try:
    image: Image.Image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
  except Image.UnidentifiedImageError:
    return _channels_last(_by_tifffile(file), channels)
  with image:
    pages = image.format == "TIFF" and (_deep_mode(image) or image.mode == "L")
    if (channels > 3 or channels == 2 or (channels == 3 and pages)) and _frames(image) == channels:
      return np.stack([_frame(image, i) for i in range(channels)], axis=-1)
    image.load()
    with contextlib.suppress(Exception):  # junk beside the pixels is no reason to lose them
      image = ImageOps.exif_transpose(image)
    if _deep_mode(image):
      return np.asarray(image)[..., None]
    if channels == 3:
      if "transparency" in image.info:
        image = image.convert("RGBA")
      return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if channels == 1:
      return np.asarray(image.convert("L"))[..., None]
    return _channels_last(np.asarray(image), channels)


def depth(file: File) -> str:
  """ "deep", "eight", or "cut": colour of 16 bits a channel, of which Pillow keeps the upper eight.

  Reads little more than the header.
  """
  if _is_array(file):
    with _opened(file) as content:
      return "eight" if npy.header(content)[2] in (np.uint8, np.bool_) else "deep"
  try:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
      if _deep_mode(image):
        return "deep"
      return "cut" if any(";16" in str(tile[3]) for tile in image.tile) else "eight"
  except Image.UnidentifiedImageError:
    return "eight" if _by_tifffile(file).dtype == np.uint8 else "deep"


def to_uint8(image: np.ndarray, channels: int, value_range: Range | None) -> np.ndarray:
  """[H, W, c] of any type -> uint8 [H, W, channels]; what lies outside the range is clipped."""
  if image.dtype == np.bool_:
    image = image.astype(np.uint8) * np.uint8(255)
  if image.dtype != np.uint8:
    of_type = (0.0, 1.0) if image.dtype.kind == "f" else (0.0, 65535.0)
    low, high = (np.asarray(end, np.float64) for end in value_range or of_type)
    factor = 255.0 / np.maximum(high - low, 1e-300)
    made, step = np.empty(image.shape, np.uint8), max(1, _AT_ONCE // max(1, image[:1].size))
    for row in range(0, len(image), step):
      scaled = (image[row : row + step] - low) * factor
      made[row : row + step] = np.round(np.nan_to_num(scaled).clip(0.0, 255.0))
    image = made
  if image.shape[2] == 1 and channels == 3:
    return np.repeat(image, 3, axis=-1)
  if image.shape[2] == 3 and channels == 1:
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]
  return image


def common_range(images: list[np.ndarray]) -> Range:
  """The range of deep images [H, W, c]: what they have in common, rounded to where a sensor ends.

  Of integers that are not negative 0 to 2^b - 1, b the least number of bits, at least 8, that holds
  all of them: 4,095 for 12 bits in a file of 16. Of floats in 0..1 that; of all others the smallest
  and the largest number. With more than one channel each has its own.
  """
  known = [(x.astype(np.float64), np.isfinite(x)) for x in images]
  low = np.min([x.min((0, 1), where=finite, initial=np.inf) for x, finite in known], axis=0)
  high = np.max([x.max((0, 1), where=finite, initial=-np.inf) for x, finite in known], axis=0)
  whole = all(x.dtype.kind in "ui" for x in images)
  ranges = [_rounded(float(a), float(b), whole) for a, b in zip(low, high, strict=True)]
  lows, highs = zip(*ranges, strict=True)
  return (lows[0], highs[0]) if len(ranges) == 1 else (lows, highs)


def range_words(value_range: Range) -> str:
  """A range as messages have it.

  >>> range_words((0.0, 4095.0)), range_words(((0.0, 0.5), (1.0, 2.0)))
  ('0 to 4095', '(0, 0.5) to (1, 2)')
  """
  ends = []
  for end in value_range:
    numbers = [f"{number:.10g}" for number in np.ravel(end)]
    ends.append(f"({', '.join(numbers)})" if np.ndim(end) else numbers[0])
  return " to ".join(ends)


def _rounded(low: float, high: float, whole: bool) -> tuple[float, float]:
  if low > high:  # not one finite number
    return 0.0, 1.0
  if whole and low >= 0.0:
    return 0.0, float(2 ** max(8, int(high).bit_length()) - 1)
  if not whole and low >= 0.0 and high <= 1.0:
    return 0.0, 1.0
  return low, high if high > low else low + 1.0


def _size(file: File) -> int:
  return len(file) if isinstance(file, bytes) else os.path.getsize(file)


def _opened(file: File) -> Any:
  return io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")


def _is_array(file: File) -> bool:
  if isinstance(file, bytes):
    return file.startswith(_NPY)
  return os.fspath(file).lower().endswith(".npy")


def _deep_mode(image: Image.Image) -> bool:
  return image.mode[0] in "IF"  # I;16, I, F


def _frames(image: Any) -> int:
  return getattr(image, "n_frames", 1)


def _frame(image: Any, number: int) -> np.ndarray:
  """[H, W] of one frame."""
  image.seek(number)
  return np.asarray(image if _deep_mode(image) or image.mode == "L" else image.convert("L"))


def _channels_last(x: np.ndarray, channels: int) -> np.ndarray:
  """[H, W], [H, W, c] or [c, H, W] -> [H, W, c], c = `channels`, or 1 or 3 where either will do."""
  fitting = (1, 3) if channels in (1, 3) else (channels,)
  if x.ndim == 2:
    x = x[..., None]
  if x.ndim == 3 and x.shape[2] not in fitting and x.shape[0] in fitting:
    x = np.moveaxis(x, 0, 2)
  if x.ndim != 3 or x.shape[2] not in fitting or not x.size or x.dtype.kind not in "buif":
    wanted = f"data.channels={channels} wants [H, W, {channels}]"
    if x.ndim == 3 and x.dtype.kind in "buif":
      wanted += f"; config.data.channels={min(x.shape[0], x.shape[2])} where all have as many"
    raise ValueError(f"it holds {x.dtype} {list(x.shape)}, {wanted}")
  return x


def _by_tifffile(file: File) -> np.ndarray:
  """What Pillow cannot open, where it is a TIFF and tifffile is installed."""
  with _opened(file) as content:
    start = content.read(64)
    if start[:4] not in _TIFF:
      said = files.pointer(start)
      raise ValueError(f"it is {said}" if said else "Pillow cannot identify it")
    try:
      import tifffile
    except ImportError:
      raise ValueError("a TIFF that Pillow cannot read: pip install 'protojax[tiff]'") from None
    content.seek(0)
    return tifffile.imread(content)
