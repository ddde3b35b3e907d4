"""The exported encoder: same numbers, plain names, whole or not at all."""

import errno
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from protojax import errors
from protojax.training import export

INFO = {"weights": "teacher", "step": 3, "model": {"name": "vit_tiny", "mean": (0.5, None)}}


def _tree(seed=0, width=4):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    "params": {
      "backbone": {"blocks_0": {"qkv": {"kernel": draw(width, 3, 2).swapaxes(0, 2)}}},
      "head": {"scale": draw(width)},
    },
    "batch_stats": {"head": {"mean": draw(width)}},
  }


def test_tensors_and_info_come_back_to_the_bit_under_their_paths(tmp_path):
  export.write(tmp_path / "exported", _tree(), INFO)
  tensors, info = export.read(tmp_path / "exported")
  assert set(tensors) == {
    "params.backbone.blocks_0.qkv.kernel",
    "params.head.scale",
    "batch_stats.head.mean",
  }
  np.testing.assert_array_equal(
    tensors["params.backbone.blocks_0.qkv.kernel"],
    _tree()["params"]["backbone"]["blocks_0"]["qkv"]["kernel"],
  )
  plain = json.loads(json.dumps(INFO))
  assert info == plain
  assert json.loads((tmp_path / "exported" / "config.json").read_text()) == plain
  other = safetensors.numpy.load_file(tmp_path / "exported" / "encoder.safetensors")
  np.testing.assert_array_equal(other["params.head.scale"], _tree()["params"]["head"]["scale"])
  assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == [
    "config.json",
    "encoder.safetensors",
  ]


@pytest.mark.parametrize("file", ["", "encoder.safetensors"])
def test_load_fills_a_tree_of_the_same_shape(tmp_path, file):
  export.write(tmp_path, _tree(), INFO)
  template = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _tree(1)["params"])
  loaded = export.load(tmp_path / file, template)
  jax.tree.map(np.testing.assert_array_equal, loaded, _tree()["params"])


def _without_head():
  return {"backbone": _tree()["params"]["backbone"]}


@pytest.mark.parametrize(
  ("template", "words"),
  [
    (
      lambda: _tree(width=5)["params"],
      r"blocks_0.qkv.kernel has shape \(2, 3, 4\) there and "
      r"\(2, 3, 5\) here and 1 more",
    ),
    (
      lambda: _tree()["params"] | {"more": np.ones(2)},
      r"more has shape none there and \(2,\) here",
    ),
    (_without_head, r"head.scale has shape \(4,\) there and none here"),
  ],
  ids=["shape", "missing", "left over"],
)
def test_another_encoder_is_refused_in_one_line(tmp_path, template, words):
  export.write(tmp_path, _tree(), INFO)
  with pytest.raises(errors.UserError, match=words) as caught:
    export.load(tmp_path, template())
  assert "\n" not in str(caught.value) and "encoder.safetensors" in str(caught.value)


def test_missing_damaged_and_foreign_files_are_one_line(tmp_path):
  with pytest.raises(errors.UserError, match="no encoder.safetensors at"):
    export.read(tmp_path / "nowhere")
  export.write(tmp_path, _tree(), INFO)
  file = tmp_path / "encoder.safetensors"
  os.truncate(file, file.stat().st_size // 2)
  with pytest.raises(errors.UserError, match="is not weights as protojax exports them"):
    export.read(tmp_path)
  safetensors.numpy.save_file({"x": np.ones(2)}, file)
  with pytest.raises(errors.UserError, match="is not weights as protojax exports them"):
    export.read(tmp_path)


@pytest.mark.survives(
  "a full disk during the export",
  "weights and settings, half written",
  "one line; the export before it is whole",
)
@pytest.mark.parametrize("broken", ["encoder.safetensors.tmp", "config.json.tmp"])
def test_full_disk_leaves_a_whole_export(tmp_path, monkeypatch, broken):
  export.write(tmp_path, _tree(0), INFO)
  original = pathlib.Path.write_bytes

  def full(self, content):
    if self.name == broken:
      original(self, content[: len(content) // 2])
      raise OSError(errno.ENOSPC, "No space left on device")
    return original(self, content)

  monkeypatch.setattr(pathlib.Path, "write_bytes", full)
  with pytest.raises(errors.UserError, match="no space left .*free some space") as caught:
    export.write(tmp_path, _tree(1), {**INFO, "step": 4})
  assert "\n" not in str(caught.value)
  tensors, info = export.read(tmp_path)
  seed = info["step"] - 3  # weights and their configuration belong together
  expected = _tree(seed)["params"]["head"]["scale"]
  np.testing.assert_array_equal(tensors["params.head.scale"], expected)
  assert seed == (0 if broken.startswith("encoder") else 1)
  assert len(list(tmp_path.iterdir())) == 2


def test_reader_of_the_old_file_sees_it_whole_while_it_is_replaced(tmp_path):
  export.write(tmp_path, _tree(0), INFO)
  old = (tmp_path / "encoder.safetensors").read_bytes()
  with open(tmp_path / "encoder.safetensors", "rb") as reader:
    export.write(tmp_path, _tree(1), INFO)
    assert reader.read() == old
  assert (tmp_path / "encoder.safetensors").read_bytes() != old


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot write to .*file/exported") as caught:
    export.write(tmp_path / "file" / "exported", _tree(), INFO)
  assert "\n" not in str(caught.value)
