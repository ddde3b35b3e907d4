"""Features of images beside the names of their files."""

import functools
import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image
from pyarrow import parquet

from protojax import embed, errors, loading, pretrained
from protojax.data import pipeline

pytestmark = pytest.mark.xdist_group("train")  # one worker: they share `finished_run`


@pytest.fixture(scope="module")
def run(finished_run):
  return finished_run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for name in ("cat/1.png", "cat/deep/2.png", "dog/3.png", "dog/4.png"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(root / name)
  (root / "dog" / "5.png").write_bytes(b"not an image")
  return root


def test_npz_and_parquet_hold_the_same_rows_with_their_files(run, images, tmp_path, capsys, caplog):
  pipeline.tell_unreadable.cache_clear()
  common = [str(run), "--data=folder", f"--data_dir={images}"]
  embed.main([*common, f"--out={tmp_path / 'new' / 'a.npz'}"])
  embed.main([*common, f"--out={tmp_path / 'a.parquet'}"])
  assert [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()] == [
    f"{images / 'dog/5.png'} cannot be read and is left out"
  ]  # once
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 2 and said[0].endswith("1 could not be read") and "4 images" in said[0]
  arrays = tiny.arrays(tmp_path / "new" / "a.npz")
  table = parquet.read_table(tmp_path / "a.parquet")
  files = ["cat/1.png", "cat/deep/2.png", "dog/3.png", "dog/4.png"]
  assert arrays["filename"].tolist() == table["filename"].to_pylist() == files
  assert arrays["label"].tolist() == table["label"].to_pylist() == [0, 0, 1, 1]
  np.testing.assert_array_equal(arrays["features"], np.array(table["features"].to_pylist()))
  assert arrays["code"].tolist() == table["code"].to_pylist()
  model = loading.load(str(run))
  bank = pretrained.source(model, None, name="folder", data_dir=str(images))
  expected = pretrained.encoded(model, bank, parts=("features", "codes"))
  np.testing.assert_allclose(arrays["features"], expected["features"]["last"], atol=1e-6)
  np.testing.assert_array_equal(arrays["code"], expected["codes"]["prototypes"])
  protocol = json.loads(str(arrays["protocol"]))
  assert protocol == json.loads(table.schema.metadata[b"protocol"])
  assert protocol["step"] == 6 and protocol["weights"] == "teacher" and protocol["images"] == 5
  assert protocol["what"] == ["features", "codes"] and protocol["shapes"] == {"features": [48]}
  assert protocol["class_names"] == ["cat", "dog"] and protocol["value_range"] is None


def test_the_range_of_deep_images_is_told_and_kept(run, tmp_path, monkeypatch, caplog, capsys):
  caplog.set_level("INFO")
  rng = np.random.default_rng(0)
  (tmp_path / "deep").mkdir()
  for i in range(3):
    rows = rng.integers(0, 4000, (20, 24)).astype(np.uint16)
    Image.fromarray(rows).save(tmp_path / "deep" / f"{i}.png")
  model = loading.load(str(run))._replace(step=None)  # as of weights that do not say
  monkeypatch.setattr(loading, "load", lambda *_, **__: model)
  found = {}
  for name, flags in (("measured", ()), ("given", ("--value_range=0,8000",))):
    out = tmp_path / f"{name}.npz"
    folder = ["--data=folder", f"--data_dir={tmp_path / 'deep'}"]
    embed.main([str(run), *folder, *flags, f"--out={out}"])
    found[name] = tiny.arrays(out)
  assert "None" not in capsys.readouterr().out + repr(model)
  ranges = {k: json.loads(str(x["protocol"]))["value_range"] for k, x in found.items()}
  assert ranges == {"measured": [0, 4095], "given": [0, 8000]}
  assert np.abs(found["measured"]["features"] - found["given"]["features"]).max() > 1e-3
  said = [r.getMessage() for r in caplog.records if "more than 8 bits" in r.getMessage()]
  assert [s.partition("more than 8 bits ")[2] for s in said] == [
    "0 to 4095 become 0 to 255, as measured on these, since the weights do not say how it was in "
    "their training",
    "0 to 8000 become 0 to 255, as given",
  ]
  model.config.data.value_range = (0.0, 1023.0)
  with pytest.raises(errors.UserError, match="the range of the training is taken, 0 to 1023: lea"):
    embed.main([str(run), *folder, *flags, f"--out={tmp_path / 'c.npz'}"])


def test_what_was_missing_when_weights_were_converted_is_kept(run, tmp_path, monkeypatch, capsys):
  model = loading.load(str(run))._replace(initialised=("norm.weight",))
  monkeypatch.setattr(loading, "load", lambda *_, **__: model)
  embed.main([str(run), "--data=digits", "--limit=3", f"--out={tmp_path / 'a.npz'}"])
  assert json.loads(str(tiny.arrays(tmp_path / "a.npz")["protocol"]))["initialised"] == [
    "norm.weight"
  ]
  arrays = "filename [3], label [3], index [3], features [3, 48], code [3]"
  assert capsys.readouterr().out.endswith(f"of the teacher, step 6: {arrays}\n")


def test_exported_weights_give_the_codes_of_their_run(run, tmp_path):
  rows = ["--data=digits", "--split=test", "--limit=7"]
  for path in (run, run / "exported"):
    embed.main([str(path), *rows, f"--out={tmp_path / path.name}.npz"])
  a, b = (tiny.arrays(tmp_path / f"{name}.npz") for name in ("run", "exported"))
  assert b["features"].shape == (7, 48) and b["filename"][0] == "digits/test[0]"
  np.testing.assert_allclose(b["features"], a["features"], atol=1e-5)
  assert np.mean(b["code"] == a["code"]) > 0.7  # but for ties


def test_patches_layers_and_embeddings_go_into_both_formats(run, images, tmp_path, monkeypatch):
  """Parquet is written as it goes, in row groups that hold what fits."""
  monkeypatch.setattr(embed, "_ROW_GROUP", 1)
  few = functools.partial(pretrained.chunks, batch_size=8)
  monkeypatch.setattr(pretrained, "chunks", few)
  common = [str(run), "--data=digits", "--split=test", "--limit=20", "--layers=last,block1"]
  common.append("--what=features,patches,embeddings")
  embed.main([*common, f"--out={tmp_path / 'a.npz'}"])
  embed.main([*common, f"--out={tmp_path / 'a.parquet'}"])
  arrays, file = tiny.arrays(tmp_path / "a.npz"), parquet.ParquetFile(tmp_path / "a.parquet")
  assert file.num_row_groups == 3
  table, shapes = file.read(), json.loads(file.schema_arrow.metadata[b"protocol"])["shapes"]
  assert list(shapes) == ["features_last", "features_block1", "patches_last", "patches_block1"] + [
    "embedding"
  ]
  assert shapes["patches_last"] == [2, 2, 48] and arrays["patches_last"].shape == (20, 2, 2, 48)
  for name, shape in shapes.items():
    values = np.array(table[name].to_pylist(), np.float32).reshape(-1, *shape)
    np.testing.assert_array_equal(values, arrays[name])
  model = loading.load(str(run))
  source = pretrained.source(model, "test", name="digits")
  want = pretrained.encoded(
    model, source, parts=("patches", "embeddings"), layers=("block1",), limit=20
  )
  np.testing.assert_allclose(arrays["patches_block1"], want["patches"]["block1"], atol=1e-5)
  np.testing.assert_allclose(arrays["embedding"], want["embeddings"]["prototypes"], atol=1e-5)


def test_what_would_not_fit_is_refused_before_it_is_written(run, tmp_path, monkeypatch):
  common = [str(run), "--data=digits", "--what=patches"]  # 1,442 images of .8 kB
  monkeypatch.setattr(embed, "_memory", lambda: 2_000_000)
  with pytest.raises(errors.UserError, match="1,442 rows take about 0.0 GB, twice that in memory"):
    embed.main([*common, f"--out={tmp_path / 'new' / 'a.npz'}"])
  room = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
  with pytest.raises(errors.UserError, match="0.0 GB of the disk are free"):
    embed.main([*common, f"--out={tmp_path / 'new' / 'a.parquet'}"])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--out=a.csv"], "the ending says the format: .npz or .parquet"),
    (["--out={}/old.npz"], "is there already: name another or add --overwrite"),
    (["--out={}/c.npz", "--layer=last5"], "layer 'last5' is unknown: this encoder has last,"),
    (["--out={}/c.npz", "--data=folder", "--data_dir={}/none"], "is not a folder"),
    (["--out={}/c.npz", "--what=patches", "--layers=last4"], "layer of patches 'last4' is unknown"),
    (
      ["--out={}/c.npz", "--what=feature"],
      "--what=feature is unknown: choose of features, patches",
    ),
    (["--out={}/c.npz", "--limit=-1"], "--limit=-1 must not be negative"),
    (["--out={}/old.npz/c.npz"], "cannot write to"),
    ([], "--out"),
  ],
)
def test_mistakes_are_one_line_and_write_nothing(run, tmp_path, arguments, words):
  (tmp_path / "old.npz").write_bytes(b"old")
  with pytest.raises(errors.UserError, match=words) as caught:
    embed.main([str(run), *(a.format(tmp_path) for a in arguments)])
  assert "\n" not in str(caught.value)
  assert [p.name for p in tmp_path.iterdir()] == ["old.npz"]
