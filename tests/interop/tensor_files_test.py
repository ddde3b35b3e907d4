import json
import pathlib
import pickle
import resource

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch_format as made

from protojax import errors
from protojax.interop import tensor_files

_ARRAYS = {
  "a.weight": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32),
  "a.bias": np.arange(3, dtype=np.int64),
  "brain": np.arange(6).astype(jnp.bfloat16).reshape(2, 3),
  "half": np.float16([1, 2]),
  "empty": np.zeros((0, 4), np.float32),
  "scalar": np.array(2.5),
  "mask": np.array([True, False]),
}


def _equal(got, expected):
  assert list(got) == list(expected)
  for name, array in expected.items():
    assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
    np.testing.assert_array_equal(got[name], array)


def _refused(path) -> str:
  with pytest.raises(errors.UserError) as caught:
    tensor_files.read(path)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_safetensors_are_read_alike_and_sorted_as_they_are_stored(tmp_path):
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(_ARRAYS, path, metadata={"format": "pt"})
  got = tensor_files.read(path)
  _equal({k: got[k] for k in _ARRAYS}, _ARRAYS)
  assert len(got) == len(_ARRAYS)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_safetensors_of_eight_bits_are_read(tmp_path, kind):
  dtype = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}[kind]
  values = np.arange(4).astype(dtype)
  header = json.dumps({"w": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
  path = tmp_path / "x.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
  _equal(tensor_files.read(path), {"w": values})


def test_numpy_and_torch_files_are_read_whatever_they_are_called(tmp_path):
  np.save(tmp_path / "lone.npy", _ARRAYS["a.weight"])
  _equal(tensor_files.read(tmp_path / "lone.npy"), {"lone": _ARRAYS["a.weight"]})
  plain = {k: v for k, v in _ARRAYS.items() if k != "brain"}  # NumPy writes bfloat16 as bytes
  for save in (np.savez, np.savez_compressed):
    save(tmp_path / "x.npz", **plain)
    (tmp_path / "x.npz").rename(tmp_path / "x.dat")
    _equal(tensor_files.read(tmp_path / "x.dat"), plain)
  for legacy in (False, True):
    made.save(tmp_path / "x.ckpt", {"state_dict": _ARRAYS}, legacy=legacy)
    expected = {f"state_dict.{k}": v for k, v in _ARRAYS.items()}
    _equal(tensor_files.read(str(tmp_path / "x.ckpt")), expected)


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_unread_arrays_stay_on_the_disk(tmp_path, suffix):
  large, path = np.zeros(64 << 18, np.float32), tmp_path / f"x.{suffix}"  # 64 MB
  if suffix == "npy":
    np.save(path, large)
  else:
    safetensors.numpy.save_file({"x": large}, path)
  del large

  def resident():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()

  before = resident()
  got = tensor_files.read(path)["x"]
  assert resident() - before < 32 << 20
  assert got[-1] == 0.0 and not got.flags.writeable


def test_what_cannot_be_read_is_one_line(tmp_path):
  assert "there is no" in _refused(tmp_path / "none.npy")
  assert "folder" in _refused(tmp_path)
  path = tmp_path / "x"
  path.write_bytes(b"")
  assert "it is empty" in _refused(path)
  path.write_text("epoch 3: loss 7.1")
  assert ".safetensors" in _refused(path)
  for name in ("x.npy", "x.pth", "x.safetensors"):
    (tmp_path / name).write_text(
      "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    assert "is a pointer of Git LFS, not the file it stands for: run git lfs pull" in (
      _refused(tmp_path / name)
    )
  np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
  assert "object holds Python objects (dtype object), not num" in _refused(tmp_path / "object.npy")
  np.savez(tmp_path / "escape.npz", **{"a\x1b[2J": np.ones(2)})
  assert "cannot be printed" in _refused(tmp_path / "escape.npz")
  np.savez(tmp_path / "object.npz", a=np.array([{}], dtype=object))
  assert "a holds Python objects (dtype object), not numbers" in _refused(tmp_path / "object.npz")


def test_cut_files_are_one_line(tmp_path):
  safetensors.numpy.save_file(_ARRAYS, tmp_path / "a")
  np.savez(tmp_path / "b.npz", **{k: v for k, v in _ARRAYS.items() if k != "brain"})
  np.save(tmp_path / "c.npy", _ARRAYS["a.weight"])
  for name in ("a", "b.npz", "c.npy"):
    content = (tmp_path / name).read_bytes()
    for size in np.linspace(1, len(content) - 1, 20).astype(int):
      (tmp_path / "cut").write_bytes(content[:size])
      message = _refused(tmp_path / "cut")
      assert name != "b.npz" or size < 4 or "damaged" in message


def test_a_pickle_that_ends_early_or_is_another_says_so(tmp_path):
  path = tmp_path / "x.pth"
  made.save(path, {"a": np.ones((3, 4), np.float32)}, legacy=True)
  whole = path.read_bytes()
  other = pickle.dumps({"a": np.ones((3, 4), np.float32)})
  for content, words in (
    (whole[:20], "it ends in the middle"),
    (whole[:10], "it ends in the middle"),
    (other[:-20], "it ends in the middle"),
    (other, "a pickle that torch.save did not write"),
  ):
    path.write_bytes(content)
    said = _refused(path)
    assert words in said and "Error" not in said, said


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
  np.savez_compressed(tmp_path / "x.npz", a=np.zeros(1 << 22))
  monkeypatch.setattr(tensor_files, "_UNPACKED", 1 << 20)
  assert "unpack" in _refused(tmp_path / "x.npz")
