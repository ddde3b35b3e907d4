"""A run on images that are no photographs: five channels of 16 bits, views of 16 x 24 pixels."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from protojax import config as configs
from protojax import convert, embed, errors, evaluate, loading, pretrained, resolving
from protojax.data import sources
from protojax.reports import gallery
from protojax.training import data_settings, datasets, loop

pytestmark = pytest.mark.xdist_group("data_settings")  # one worker: they share the run


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
  """train/ and val/ of two classes, arrays of 20 x 30 pixels, five channels, 12 bits or less."""
  root, rng = tmp_path_factory.mktemp("cells"), np.random.default_rng(0)
  for split, count in (("train", 12), ("val", 4)):
    for i, name in enumerate(("healthy", "ill")):
      (root / split / name).mkdir(parents=True)
      for j in range(count):
        image = rng.integers(0, [300, 900, 1000, 2000, 4000], (20, 30, 5)) * (1 + i) // 2
        np.save(root / split / name / f"{j}.npy", image.astype(np.uint16))
  return root


def _config(cells, **changes):
  config = configs.debug(configs.default())
  config.update({"num_steps": 2, "batch_size": 16, "log_every": 1, "save_every": 1})
  config.data.update({"name": "folder", "data_dir": str(cells), "image_size": 24, "channels": 5})
  config.augment.update({"global_size": (16, 24), "local_size": (8, 16)})
  config.model.update({"depth": 1, "width": 32, "heads": 2})
  config.head.update({"hidden": 32, "bottleneck": 16})
  config.method.num_prototypes = 32
  config.monitor.images = 16
  config.probe.k = 5
  config.update(changes)
  return config


@pytest.fixture(scope="module")
def run(cells, tmp_path_factory):
  folder = tmp_path_factory.mktemp("cells_run") / "run"
  loop.run(_config(cells), str(folder))
  return folder


@pytest.mark.parametrize(("square", "said"), [(60, True), (59, False), (24, False)])
def test_squares_of_twice_the_images_are_told(cells, caplog, square, said):
  config = _config(cells)
  config.data.image_size = square
  caplog.set_level("INFO")
  data_settings.completed(config, datasets.of_run(config)[0])
  told = "30 pixels a side at most, of those looked at, and lie in squares of 60: config.data"
  assert (told in caplog.text) == said


def test_a_run_knows_what_it_found(run):
  config = json.loads((run / "config.json").read_text())
  highs = [511.0, 1023.0, 1023.0, 2047.0, 4095.0]
  assert config["data"]["value_range"] == [[0.0] * 5, highs]
  assert config["probe"]["test_split"] == "val"
  assert [config["augment"][k] for k in ("saturation", "hue", "gray_prob")] == [0.0] * 3
  assert len(config["augment"]["mean"]) == len(config["augment"]["std"]) == 5
  result = json.loads((run / "eval" / "final" / "result.json").read_text())
  assert result["protocol"]["test"].endswith("val (8 images)")
  assert result["protocol"]["transform"] == "16 x 24 px, centre crop 1"
  image = json.loads((run / "exported" / "config.json").read_text())["image"]
  assert image["global_size"] == [16, 24] and image["channels"] == 5
  assert image["value_range"] == config["data"]["value_range"]


def test_it_goes_on_with_the_numbers_it_found(run, cells, monkeypatch):
  measured = []
  monkeypatch.setattr(data_settings, "channel_statistics", measured.append)
  monkeypatch.setattr(sources, "measured_range", measured.append)
  config = data_settings.recalled(_config(cells), str(run))
  train, _, _ = datasets.of_run(config)
  config = data_settings.completed(resolving.resolve(config, len(train)), train)
  assert measured == []
  assert json.loads(config.to_json_best_effort()) == json.loads((run / "config.json").read_text())


def test_run_and_export_give_the_same_features(run, cells):
  images = np.random.default_rng(1).integers(0, 256, (3, 20, 30, 5), np.uint8)
  model, exported = loading.load(run), loading.load(run / "exported")
  np.testing.assert_allclose(model.features(images), exported.features(images), atol=1e-5)
  of_run, of_export = (
    pretrained.source(m, "val", name="folder", data_dir=str(cells)) for m in (model, exported)
  )
  np.testing.assert_array_equal(of_export[0]["image"], of_run[0]["image"])
  with pytest.raises(errors.UserError, match=r"takes uint8 \[N, H, W, 5\]"):
    model.features(images[..., :3])
  stored = np.random.default_rng(1).integers(0, 256, (2, 24, 24, 5), np.uint8)
  assert pretrained.attention(model, stored).shape == (2, 2, 2, 3)


def test_evaluate_and_embed_look_at_the_folders_there_are(run, cells, tmp_path):
  where = ["--data=folder", f"--data_dir={cells}"]
  evaluate.main([f"--workdir={run}", "--protocol=knn", "--k=3", *where])
  result = json.loads((run / "eval" / "knn" / "result.json").read_text())
  assert (result["protocol"]["test"]["split"], result["protocol"]["test"]["images"]) == ("val", 8)
  embed.main([str(run), *where, f"--out={tmp_path / 'all.npz'}"])
  arrays = tiny.arrays(tmp_path / "all.npz")
  assert arrays["features"].shape == (32, 32)
  assert arrays["label"].tolist() == ["ill" in name for name in arrays["filename"]]


def test_other_formats_keep_shape_and_channels(run, tmp_path):
  convert.take_out(run / "exported", tmp_path / "jax", "jax")
  served = jax.export.deserialize(bytearray((tmp_path / "jax" / "features.jax").read_bytes()))
  assert served.in_avals[0].shape[1:] == (16, 24, 5)
  convert.take_out(run / "exported", tmp_path / "timm", "timm")
  config = json.loads((tmp_path / "timm" / "config.json").read_text())
  assert config["model_args"]["img_size"] == [16, 24] and config["model_args"]["in_chans"] == 5
  with pytest.raises(errors.UserError, match="square images of three channels"):
    convert.take_out(run / "exported", tmp_path / "hf", "hf")


def test_pictures_show_views_and_attention(run, cells):
  model = loading.load(run)
  bank = pretrained.source(model, "train")
  found = gallery.collect(model, model.config, bank=bank, train=bank, arrays={})
  assert not isinstance(found.views, str) and not isinstance(found.attention, str)
  assert found.views[0][1].text == "global view 1, 16 x 24 px"


def test_statistics_are_those_of_all_pixels_a_few_images_at_a_time(cells, monkeypatch):
  monkeypatch.setattr(data_settings, "_AT_ONCE", 3)
  source = sources.build("folder", split="train", data_dir=cells, channels=5)
  images = np.stack([record["image"] for record in source.read(range(len(source)))]) / 255.0
  read, asked = source.read, []
  monkeypatch.setattr(source, "read", lambda rows: asked.append(len(rows)) or read(rows))
  mean, std = data_settings.channel_statistics(source)
  assert sum(asked) == len(source) and max(asked) <= 3
  np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), atol=6e-5)
  np.testing.assert_allclose(std, images.std(axis=(0, 1, 2)), atol=6e-5)


def test_the_probe_is_off_where_held_out_images_have_no_classes(cells, tmp_path, caplog):
  caplog.set_level("INFO")
  for split in ("train", "val"):
    shutil.copytree(cells / "train", tmp_path / split)
  config = _config(tmp_path)
  assert datasets.of_run(config)[2].class_names == ("healthy", "ill")
  assert "to keep them" not in caplog.text
  shutil.copytree(tmp_path / "val", tmp_path / "test")
  assert datasets.of_run(config)[2].name.endswith("test")
  assert "to keep them for the end set config.probe.test_split=val" in caplog.text
  for held_out in "test", "val":
    shutil.rmtree(tmp_path / held_out)
  assert datasets.of_run(config)[2] is None and "has no folder 'test', nor another" in caplog.text
  there = config.data.data_dir
  assert f"move labelled images into {there}/train/CLASS/ and {there}/val/CLASS/" in caplog.text
  (tmp_path / "val").mkdir()
  shutil.copy(cells / "val" / "ill" / "0.npy", tmp_path / "val")
  assert datasets.of_run(config)[2] is None and "val has no class folders" in caplog.text


@pytest.mark.parametrize(
  ("section", "changes", "words"),
  [
    ("augment", {"mean": (0.5, 0.5)}, r"augment.mean=\(0.5, 0.5\) has 2 numbers and data.chan"),
    ("data", {"channels": 0}, "data.channels=0 must be at least 1"),
    (
      "augment",
      {"global_size": (16, 20)},
      "global_size=.* no multiple of model.patch_size=8: .* 16",
    ),
    ("augment", {"local_size": 12}, "augment.local_size=12 is no multiple"),
    ("augment", {"local_size": (24, 16)}, "local_size=.* is larger than augment.global_size="),
    ("augment", {"global_size": (16, 24, 5)}, "whole number, or .height, width."),
    ("augment", {"global_size": "big"}, "global_size='big' must be"),
    ("model", {"image_size": 20}, "model.image_size=20 is no multiple"),
  ],
)
def test_settings_that_contradict_are_refused_in_one_line(cells, section, changes, words):
  config = _config(cells)
  config.augment.mean = None
  with config.ignore_type():
    config[section].update(changes)
  with pytest.raises(errors.UserError, match=words) as caught:
    resolving.resolve(config, 24)
  assert "\n" not in str(caught.value)


def test_a_square_pair_is_a_square_and_small_stores_are_warned_of(cells, caplog):
  config = _config(cells)
  config.augment.update({"global_size": (32, 32), "local_size": (16, 16)})
  config.data.channels = 3
  out = resolving.resolve(config, 24)
  assert out.augment.global_size == 32 and out.augment.local_size == 16
  assert out.model.image_size == 32 and out.augment.mean == configs.IMAGENET["mean"]
  assert out.augment.hue == config.augment.hue > 0
  assert "data.image_size=24 is less than config.augment.global_size=32" in caplog.text
