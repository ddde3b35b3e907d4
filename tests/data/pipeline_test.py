"""Batches: the same for any number of workers, processes and restarts."""

import itertools
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets  # noqa: F401  (patches `import` while it loads: not beside threads)
from PIL import Image

from protojax import errors
from protojax.data import pipeline, sources

_REPO = pathlib.Path(__file__).parents[2]
_TRAIN = {"seed": 3, "step": 0, "batch_size": 160, "image_size": 32}


def data_dir():
  folder = os.environ.get("PROTOJAX_DATA_DIR") or _REPO.parent / "shared" / "data"
  if not (pathlib.Path(folder) / "cifar10").is_dir():
    pytest.skip("no prepared CIFAR-10: set PROTOJAX_DATA_DIR")
  return str(folder)


@pytest.fixture(scope="module")
def digits():
  return sources.build("digits", split="train")


def take(stream, number):
  """The first batches; closes the stream."""
  try:
    return list(itertools.islice(stream, number))
  finally:
    stream.close()


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      assert batch[key].dtype == other[key].dtype
      np.testing.assert_array_equal(batch[key], other[key])


def folder_of(path, number, corrupt=()):
  """Images of 6 x 4 pixels, image i of level i; those in `corrupt` hold text."""
  for i in range(number):
    file = path / f"{i:04d}.png"
    Image.new("RGB", (6, 4), (i, i, i)).save(file)
    if i in corrupt:
      file.write_text("no image\nat all")
  return sources.build("folder", split=None, data_dir=path)


def test_a_batch_has_the_shapes_and_types_of_the_contract(digits):
  (batch,) = take(pipeline.batches(digits, **_TRAIN), 1)
  shapes = {k: (v.shape, v.dtype) for k, v in batch.items()}
  assert shapes == {
    "image": ((160, 32, 32, 3), np.uint8),
    "index": ((160,), np.int32),
    "size": ((160, 2), np.int32),
    "label": ((160,), np.int32),
    "skipped": ((160,), np.int32),
  }
  for r in (0, 63, 64, 159):
    record = digits[batch["index"][r]]
    np.testing.assert_array_equal(batch["image"][r], record["image"])
    assert batch["label"][r] == record["label"]
  assert np.all(batch["size"] == 32) and np.all(batch["skipped"] == -1)


def test_batches_are_equal_for_any_number_of_workers_and_resume_at_any_step(digits):
  whole = take(pipeline.batches(digits, **_TRAIN), 10)
  for workers in (0, 1, 2):
    options = _TRAIN | {"step": 7, "num_workers": workers}
    assert_same(take(pipeline.batches(digits, **options), 3), whole[7:])
    assert not multiprocessing.active_children()


def test_an_abandoned_stream_stops_its_threads(digits):
  def threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

  closed, abandoned = (pipeline.batches(digits, **_TRAIN) for _ in range(2))
  masked = pipeline.sequential(digits, batch_size=64, image_size=32)
  for stream in (closed, abandoned, masked):
    next(stream)
  assert threads()
  closed.close()
  del stream, abandoned, masked
  for thread in threads():
    thread.join(timeout=20)
  assert not threads()


def test_batches_of_processes_are_the_contiguous_rows_of_the_global_batch(digits):
  options = _TRAIN | {"batch_size": 280, "step": 4}  # 4 * 280 + 2 * 280 crosses an epoch
  whole = take(pipeline.batches(digits, **options), 2)
  for count in (2, 4):
    parts = [
      take(pipeline.batches(digits, **options, process_index=h, process_count=count), 2)
      for h in range(count)
    ]
    joined = [
      {key: np.concatenate([part[n][key] for part in parts]) for key in whole[n]} for n in range(2)
    ]
    assert_same(joined, whole)


def test_a_process_decodes_only_its_own_rows(digits):
  class Counting:
    channels = 3

    def __init__(self):
      self.rows = []

    def __len__(self):
      return len(digits)

    def read(self, rows):
      self.rows += rows
      return digits.read(rows)

  counting = Counting()
  options = dict(batch_size=100, image_size=32, limit=200)
  batches = take(pipeline.sequential(counting, **options, process_index=1, process_count=2), 9)
  assert sum(len(b["index"]) for b in batches) == len(counting.rows) == 100
  assert sorted(counting.rows) == sorted(np.concatenate([b["index"] for b in batches]).tolist())


def test_every_epoch_covers_each_row_once_in_an_order_of_its_own(tmp_path):
  data = folder_of(tmp_path, 30)
  batches = take(pipeline.batches(data, seed=0, step=0, batch_size=7, image_size=4), 13)
  stream = np.concatenate([b["index"] for b in batches])[:90].reshape(3, 30)
  for epoch in stream:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(30))
  orders = {tuple(epoch) for epoch in stream} | {tuple(range(30))}
  assert len(orders) == 4


@pytest.mark.parametrize(("num_records", "seed"), [(7, 0), (1, 3), (50, -2), (64, 2**40)])
def test_rows_at_once_are_those_of_the_order_one_by_one(num_records, seed):
  order = pipeline.shuffled(num_records, seed)
  start, count = num_records - 1, 2 * num_records + 3  # of four epochs
  rows = pipeline.shuffled_rows(num_records, seed, start, count)
  assert rows.tolist() == [int(order[start + i]) for i in range(count)]


def test_nearby_seeds_share_no_epoch(tmp_path):
  data = folder_of(tmp_path, 30)
  epochs = []
  for seed in (0, 1, 2, -1):
    batches = take(pipeline.batches(data, seed=seed, step=0, batch_size=30, image_size=4), 4)
    epochs += [tuple(b["index"].tolist()) for b in batches]
  assert len(set(epochs)) == 16


def test_sides_that_are_too_long_are_shrunk_by_pillow_bicubic_and_the_others_stay(tmp_path):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (40, 25, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  Image.fromarray(pixels[:16, :16]).save(tmp_path / "b.png")
  Image.fromarray(pixels[:9]).save(tmp_path / "c.png")
  data = sources.build("folder", split=None, data_dir=tmp_path)
  (batch,) = take(pipeline.sequential(data, batch_size=3, image_size=16), 2)
  want = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(batch["image"][0], np.asarray(want))
  np.testing.assert_array_equal(batch["image"][1], pixels[:16, :16])
  want = Image.fromarray(pixels[:9]).resize((16, 9), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(batch["image"][2, :9], np.asarray(want))
  assert not batch["image"][2, 9:].any()
  assert batch["size"].tolist() == [[40, 25], [16, 16], [9, 25]]
  assert batch["label"].tolist() == [-1, -1, -1]


def test_a_corrupt_image_is_replaced_by_the_next_readable_row(tmp_path):
  data = folder_of(tmp_path, 8, corrupt=(2, 3, 7))
  batches = take(pipeline.batches(data, seed=0, step=0, batch_size=8, image_size=4), 2)
  for batch in batches:
    asked = np.where(batch["skipped"] >= 0, batch["skipped"], batch["index"])
    np.testing.assert_array_equal(np.sort(asked), np.arange(8))
    instead = {2: 4, 3: 4, 7: 0}
    want = [instead.get(row, row) for row in asked]
    assert batch["index"].tolist() == want
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], want)
  assert_same(
    take(pipeline.batches(data, seed=0, step=1, batch_size=8, image_size=4), 1), batches[1:]
  )


def test_the_skipped_log_counts_and_names_each_row_once(tmp_path):
  data = folder_of(tmp_path, 8, corrupt=(2, 7))
  log = pipeline.SkippedLog(data.describe)
  first, second = take(pipeline.batches(data, seed=0, step=0, batch_size=8, image_size=4), 2)
  assert sorted(log.update(first["skipped"])) == [data.describe(2), data.describe(7)]
  assert log.count == 2
  assert log.update(second["skipped"]) == [] and log.count == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_corrupt_images_stops_in_one_line(tmp_path, workers):
  data = folder_of(tmp_path, 4, corrupt=range(4))
  stream = pipeline.batches(data, seed=0, step=0, batch_size=2, image_size=4, num_workers=workers)
  with pytest.raises(errors.UserError, match="4 images in a row") as caught:
    take(stream, 1)
  assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_sequential_gives_every_row_in_order_and_pads_the_last_batch(digits):
  batches = take(pipeline.sequential(digits, batch_size=500, image_size=32), 9)
  assert [len(b["mask"]) for b in batches] == [500, 500, 500]
  mask = np.concatenate([b["mask"] for b in batches])
  index = np.concatenate([b["index"] for b in batches])
  label = np.concatenate([b["label"] for b in batches])
  assert mask.dtype == bool and mask.sum() == len(digits)
  np.testing.assert_array_equal(index[mask], np.arange(len(digits)))
  np.testing.assert_array_equal(label[mask], digits.labels)
  assert np.all(index[~mask] == -1) and np.all(label[~mask] == -1)
  assert np.all(np.concatenate([b["size"] for b in batches]) > 0)


def test_sequential_processes_share_every_batch_contiguously(digits):
  options = dict(batch_size=300, image_size=32)
  whole = take(pipeline.sequential(digits, **options), 9)
  parts = [
    take(pipeline.sequential(digits, **options, process_index=h, process_count=3), 9)
    for h in range(3)
  ]
  joined = [
    {key: np.concatenate([part[n][key] for part in parts]) for key in whole[n]}
    for n in range(len(whole))
  ]
  assert_same(joined, whole)


@pytest.mark.parametrize("limit", [1, 7, 100, 1441, 1442, 5000])
def test_a_limit_spreads_evenly(digits, limit):
  batches = take(pipeline.sequential(digits, batch_size=500, image_size=32, limit=limit), 9)
  index = np.concatenate([b["index"][b["mask"]] for b in batches])
  assert len(index) == min(limit, len(digits)) and index[0] == 0
  gaps = np.diff(np.append(index, len(digits)))
  assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_sequential_masks_a_corrupt_image_out(tmp_path):
  data = folder_of(tmp_path, 5, corrupt=(1,))
  (batch,) = take(pipeline.sequential(data, batch_size=6, image_size=4), 2)
  assert batch["mask"].tolist() == [True, False, True, True, True, False]
  assert batch["skipped"].tolist() == [-1, 1, -1, -1, -1, -1]


def test_wrong_settings_are_refused_at_once(digits):
  for wrong in ({"image_size": 0}, {"num_workers": -1}):
    with pytest.raises(errors.UserError, match=next(iter(wrong))):
      pipeline.batches(digits, **_TRAIN | wrong)
    with pytest.raises(errors.UserError, match=next(iter(wrong))):
      pipeline.sequential(digits, **{"batch_size": 2, "image_size": 8} | wrong)
  with pytest.raises(ValueError, match="160"):
    pipeline.batches(digits, **_TRAIN, process_count=3)


def test_a_program_without_absl_gets_workers_and_stops_cleanly_when_it_fails(tmp_path):
  folder = data_dir()
  script = tmp_path / "program.py"
  script.write_text(f"""
from absl import flags
flags.DEFINE_integer("own", 5, "")
from protojax.data import pipeline, sources

if __name__ == "__main__":
  data = sources.build("cifar10", split="test", data_dir={folder!r})
  batches = pipeline.batches(
    data, seed=0, step=5, batch_size=128, image_size=32, num_workers=1
  )
  print(next(batches)["index"].tolist())
  try:
    flags.FLAGS.own
  except flags.UnparsedFlagAccessError:
    print("others stay unparsed")
  flags.FLAGS(["program", "--own=6", "--grain_py_debug_mode=false"])
  print("own", flags.FLAGS.own)
  for _ in pipeline.sequential(data, batch_size=64, image_size=32, limit=64, num_workers=1):
    pass
  raise RuntimeError("left the loop")
""")
  done = subprocess.run(
    [sys.executable, str(script)],
    capture_output=True,
    text=True,
    timeout=240,
    env=os.environ | {"PYTHONPATH": str(_REPO)},
  )
  lines = done.stdout.splitlines()
  data = sources.build("cifar10", split="test", data_dir=folder)
  (want,) = take(pipeline.batches(data, seed=0, step=5, batch_size=128, image_size=32), 1)
  assert lines == [str(want["index"].tolist()), "others stay unparsed", "own 6"], done.stderr
  assert done.returncode == 1 and "left the loop" in done.stderr
  # Neither of the stream that was left open nor of the one that was read to its end.
  assert "leaked" not in done.stderr and "Exception ignored" not in done.stderr
