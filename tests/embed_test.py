"""Features of images beside the names of their files."""

import json

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from protojax import config as configs
from protojax import embed, errors, pretrained
from protojax.training import loop

pytestmark = [
  pytest.mark.xdist_group("embed"),  # one worker: its tests share a fixture that is costly
  pytest.mark.usefixtures("compile_fast"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("embed") / "run"
  config = configs.debug(configs.default("dino"))
  config.update({"num_steps": 1, "batch_size": 16})
  config.method.num_prototypes = 32
  loop.run(config, str(folder))
  return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for name in ("cat/1.png", "cat/deep/2.png", "dog/3.png", "dog/4.png"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(root / name)
  (root / "dog" / "5.png").write_bytes(b"not an image")
  return root


def test_npz_and_parquet_hold_the_same_rows_with_their_files(run, images, tmp_path, capsys):
  common = [str(run), "--data=folder", f"--data_dir={images}"]
  embed.main([*common, f"--out={tmp_path / 'new' / 'a.npz'}"])
  embed.main([*common, f"--out={tmp_path / 'a.parquet'}"])
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 2 and said[0].endswith("1 could not be read") and "4 images" in said[0]
  arrays = np.load(tmp_path / "new" / "a.npz")
  table = parquet.read_table(tmp_path / "a.parquet")
  files = [str(images / n) for n in ("cat/1.png", "cat/deep/2.png", "dog/3.png", "dog/4.png")]
  assert arrays["filename"].tolist() == table["filename"].to_pylist() == files
  assert arrays["label"].tolist() == table["label"].to_pylist() == [0, 0, 1, 1]
  np.testing.assert_array_equal(arrays["features"], np.array(table["features"].to_pylist()))
  assert arrays["code"].tolist() == table["code"].to_pylist()
  model = pretrained.load(str(run))
  bank = pretrained.source(model, None, name="folder", data_dir=str(images))
  expected = pretrained.encoded(model, bank, parts=("features", "codes"))
  np.testing.assert_allclose(arrays["features"], expected["features"]["last"], atol=1e-6)
  np.testing.assert_array_equal(arrays["code"], expected["codes"]["prototypes"])
  protocol = json.loads(str(arrays["protocol"]))
  assert protocol == json.loads(table.schema.metadata[b"protocol"])
  assert protocol["step"] == 1 and protocol["weights"] == "teacher" and protocol["images"] == 5


def test_exported_weights_give_features_without_codes(run, tmp_path):
  out = tmp_path / "b.npz"
  embed.main([str(run / "exported"), "--data=digits", "--split=test", "--limit=7", f"--out={out}"])
  arrays = np.load(out)
  assert arrays["features"].shape == (7, 96) and "code" not in arrays
  assert arrays["filename"][0] == "digits/test[0]"


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--out=a.csv"], "the ending says the format: .npz or .parquet"),
    (["--out={}/old.npz"], "is there already: name another or add --overwrite"),
    (["--out={}/c.npz", "--layer=last5"], "layer 'last5' is unknown: this encoder has last,"),
    (["--out={}/c.npz", "--data=folder", "--data_dir={}/none"], "is not a folder"),
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
