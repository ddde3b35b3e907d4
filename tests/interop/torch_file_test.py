import pathlib
import pickle
import resource
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch_format as made

from protojax import errors
from protojax.interop import torch_file

_RNG = np.random.default_rng(0)
_BASE = _RNG.normal(size=(7, 5)).astype(np.float32)
_DICT = made.Call(made.Global("collections", "OrderedDict"), ())
_NAMESPACE = made.Build(
  made.Raw(made.encode(made.Global("argparse", "Namespace")) + b")\x81"), {"lr": 0.1, "arch": "s"}
)


def _checkpoint():
  return {
    "teacher": {"w": _BASE, "tied": _BASE, "turned": _BASE.T, "part": _BASE[1:, ::2]},
    "epoch": 3,
    "args": _NAMESPACE,
    "list": [np.arange(3), (np.float32([1.5]), None)],
    "half": np.float16([1, 2.5]),
    "brain": np.arange(6).astype(jnp.bfloat16).reshape(2, 3),
    "mask": np.array([True, False]),
    "bytes": np.arange(4, dtype=np.uint8),
    "empty": np.zeros((0, 3), np.float64),
    "scalar": np.array(2.5),
  }


def _flat(value, path=()):
  if isinstance(value, np.ndarray):
    yield ".".join(path), value
  elif isinstance(value, dict | list) or type(value) is tuple:
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
      yield from _flat(child, (*path, str(key)))


def _refused(path) -> str:
  with pytest.raises(errors.UserError) as caught:
    torch_file.read(path)
  message = str(caught.value)
  assert "\n" not in message and str(path) in message
  return message


@pytest.fixture
def path(tmp_path):
  return tmp_path / "x.pth"


@pytest.mark.parametrize("legacy", [False, True])
def test_arrays_come_back_with_their_names_dtypes_strides_and_values(path, legacy):
  made.save(path, _checkpoint(), legacy=legacy)
  got, expected = torch_file.read(path), dict(_flat(_checkpoint()))
  assert list(got) == list(expected)
  for name, array in expected.items():
    assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
    np.testing.assert_array_equal(got[name], array)
    assert array.size == 0 or not got[name].flags.writeable
  assert np.shares_memory(got["teacher.w"], got["teacher.part"])
  assert np.array_equal(got["teacher.turned"].strides, _BASE.T.strides)


def test_a_file_that_is_one_tensor_is_called_like_the_file(path):
  made.save(path, _BASE)
  assert list(torch_file.read(path)) == ["x"]


def test_arrays_are_mapped_and_not_read(path):
  large = np.zeros(64 << 18, np.float32)  # 64 MB
  made.save(path, {"large": large, "small": _BASE})
  del large
  before = _resident()
  got = torch_file.read(path)
  assert _resident() - before < 32 << 20
  np.testing.assert_array_equal(got["small"], _BASE)


def _resident() -> int:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize()


def test_arrays_and_numbers_of_numpy_are_read(path):
  array = np.arange(6, dtype=np.int32).reshape(2, 3)

  def state(raw, fortran):
    kind = made.Build(
      made.Call(made.Global("numpy", "dtype"), ("i4", False, True)),
      (3, "<", None, None, None, -1, -1, 0),
    )
    empty = made.Call(
      made.Global("numpy.core.multiarray", "_reconstruct"),
      (made.Global("numpy", "ndarray"), (0,), b"b"),
    )
    return made.Build(empty, (1, (2, 3), kind, fortran, raw))

  latin = made.Call(made.Global("_codecs", "encode"), (array.tobytes().decode("latin1"), "latin1"))
  number = made.Call(
    made.Global("numpy.core.multiarray", "scalar"), (made.Global("numpy", "dtype"), b"1")
  )
  made.save(
    path,
    {
      "c": state(array.tobytes(), False),
      "f": state(array.tobytes("F"), True),
      "old": state(latin, False),
      "best": number,
    },
  )
  got = torch_file.read(path)
  assert list(got) == ["c", "f", "old"]
  for one in got.values():
    np.testing.assert_array_equal(one, array)


@pytest.mark.parametrize(
  "module, name",
  [
    ("posix", "system"),
    ("os", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("__builtin__", "getattr"),
    ("builtins", "open"),
    ("torch", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.hub", "load"),
    ("numpy", "load"),
    ("numpy", "fromfile"),
    ("pathlib2", "x"),
    ("enumx", "x"),
    ("typingx", "y"),
    ("importlib", "import_module"),
    ("functools", "reduce"),
    ("collections", "OrderedDict.pop"),
    ("torch.nn.modules.linear", "Linear"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
  ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_name_that_weights_do_not_need_is_refused_by_name(path, module, name, legacy):
  made.save(path, {"w": _BASE, "bad": made.Global(module, name)}, legacy=legacy)
  assert f"{module}.{name}" in _refused(path)


@pytest.mark.survives(
  "a pickle that runs code",
  "exec, within a file of torch and alone",
  "one line with the name it asked for",
)
def test_a_malicious_pickle_does_not_run(path, tmp_path):
  class Attack:
    def __reduce__(self):
      return exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",)

  attack = pickle.dumps(Attack(), 2)
  made.save(path, {}, extra={"archive/data.pkl": attack})
  assert "exec" in _refused(path)
  path.write_bytes(attack)  # not even a file of torch
  assert "exec" in _refused(path)
  assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
  "name",
  [
    "omegaconf.dictconfig.DictConfig",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pathlib.PosixPath",
    "builtins.set",
    "lightning.fabric.utilities.AttributeDict",
  ],
)
def test_settings_beside_the_weights_are_inert_whatever_is_done_to_them(path, name):
  one = made.Global(*name.rsplit(".", 1))
  called = made.Build(made.Call(one, (1, "rm")), {"__class__": one, "x": 2})
  filled = made.Raw(made.encode(one) + b")\x81(X\x01\x00\x00\x00aK\x01u(K\x01K\x02e")
  twice = made.Raw(made.encode(one) + b")R)R")  # calls what the call gave
  made.save(path, {"w": _BASE, "a": called, "b": filled, "c": twice, "d": made.Build(one, {})})
  assert list(torch_file.read(path)) == ["w"]


def test_what_a_file_may_call_cannot_be_changed_by_it(path):
  """State set on the functions themselves would outlive the file."""
  function = made.Global("torch._utils", "_rebuild_tensor_v2")
  for state in ({"what": "dict"}, (None, {"what": "dict"})):
    made.save(path, {"w": _BASE, "bad": made.Build(function, state)})
    _refused(path)
  made.save(path, {"w": _BASE})
  np.testing.assert_array_equal(torch_file.read(path)["w"], _BASE)


@pytest.mark.parametrize(
  "offset, shape, strides",
  [
    (31, (5,), (1,)),
    (0, (7, 6), (5, 1)),
    (0, (8,), (5,)),
    (-1, (5,), (1,)),
    (0, (5,), (-1,)),
    (0, (1 << 62, 4), (0, 0)),
    (0, (1 << 40,), (0,)),
    (0, (3, 3), (1,)),
    (1 << 62, (1,), (1,)),
    (0, (True,), (1,)),
    (0, ("5",), (1,)),
    (0, (2, 2), (1 << 61, 1 << 61)),
  ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_outside_of_a_storage_is_read(path, offset, shape, strides, legacy):
  bad = made.tensor(made.Storage("float32", "0", 35), offset, shape, strides)
  made.save(path, {"w": _BASE, "bad": bad}, legacy=legacy)
  _refused(path)


@pytest.mark.parametrize(
  "storage", [("float32", "0", 36), ("float64", "0", 35), ("float32", "9", 35)]
)
def test_a_storage_that_claims_more_than_is_there_is_refused(path, storage):
  made.save(path, {"w": _BASE, "bad": made.tensor(made.Storage(*storage), 0, (2,), (1,))})
  _refused(path)


def test_a_compressed_archive_is_refused(path):
  made.save(path, {"w": np.zeros(1 << 20)}, compression=zipfile.ZIP_DEFLATED)
  assert "compressed or encrypted" in _refused(path)


def test_sizes_that_lie_are_refused(path):
  made.save(path, {"w": _BASE})
  content = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as archive:
    info = archive.getinfo("archive/data/0")
  entry = content.rindex(b"archive/data/0") - 46  # in the directory at the end
  struct.pack_into("<II", content, entry + 20, 1 << 30, 1 << 30)
  path.write_bytes(content)
  assert "outside" in _refused(path)
  struct.pack_into("<II", content, entry + 20, info.file_size, info.file_size)
  struct.pack_into("<I", content, entry + 42, len(content) - 3)  # where the member starts
  path.write_bytes(content)
  _refused(path)


def test_bombs_are_refused_before_they_grow(path):
  # Thirty lists, each ten times the one before it: few bytes, 1e30 entries.
  bomb = b"]" + b"q\x00"
  for i in range(30):
    bomb += b"](" + b"h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1])
  made.save(path, {"w": _BASE}, extra={"archive/data.pkl": b"\x80\x02" + bomb + b"."})
  assert "without end" in _refused(path)
  # A list that holds itself; a memo index for which the unpickler in C takes 32 GB.
  made.save(path, {"w": _BASE}, extra={"archive/data.pkl": b"\x80\x02]q\x00h\x00a."})
  assert "without end" in _refused(path)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  made.save(path, {"w": _BASE, "memo": made.Raw(b"Nr\xff\xff\xff\x7f")})
  assert list(torch_file.read(path)) == ["w"]
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_two_arrays_of_one_name_are_refused(path):
  made.save(path, {"a": {"b": _BASE}, "a.b": _BASE})
  assert "a.b" in _refused(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_anywhere_is_one_line(path, legacy):
  made.save(path, _checkpoint(), legacy=legacy)
  content = path.read_bytes()
  for size in np.linspace(1, len(content) - 1, 25).astype(int):
    path.write_bytes(content[:size])
    _refused(path)


def test_a_byte_changed_anywhere_is_read_or_one_line(path):
  made.save(path, _checkpoint())
  content = path.read_bytes()
  for at in _RNG.integers(len(content), size=200):
    path.write_bytes(content[:at] + bytes([_RNG.integers(256)]) + content[at + 1 :])
    try:
      torch_file.read(path)
    except errors.UserError as error:
      assert "\n" not in str(error)


def test_programs_and_foreign_archives_are_named(path):
  made.save(path, {"w": _BASE}, extra={"archive/constants.pkl": b""})
  assert "TorchScript" in _refused(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.txt", "x")
  assert "data.pkl" in _refused(path)
  made.save(path, {"w": _BASE}, extra={"archive/byteorder": b"big"})
  assert "big-endian" in _refused(path)


# Where PyTorch is installed: files by torch.save itself.


def _settings():
  import argparse
  import collections

  return {
    "args": argparse.Namespace(x=1, out=pathlib.Path("/x")),
    "epoch": 3,
    "best": np.float64(0.5),
    "seen": {1, 2},
    "c": 1j,
    "b": b"abc",
    "counter": collections.Counter([1]),
    "many": range(3),
  }


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_are_read_value_by_value(path, legacy):
  torch = pytest.importorskip("torch")
  base = torch.randn(7, 5)
  layer = torch.nn.Linear(4, 3, bias=False)
  torch.nn.utils.parametrizations.weight_norm(layer)
  optimizer = torch.optim.AdamW(layer.parameters())
  layer(torch.ones(1, 4)).sum().backward()
  optimizer.step()
  tagged, owned = torch.randn(3), torch.nn.Parameter(torch.randn(3))
  tagged.note = owned.note = "attributes of tensors are saved, too"
  kinds = [
    "bfloat16",
    "float16",
    "float64",
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
    "bool",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
  ]
  tree = {
    "a": base,
    "t": base.t(),
    "part": base[1:, ::2],
    "wide": torch.ones(1).expand(4),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "layer": layer.state_dict(),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "tagged": tagged,
    "tagged_parameter": owned,
    "optimizer": optimizer.state_dict(),
    "numpy": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "size": torch.Size([1, 2]),
    **_settings(),
    **{kind: torch.arange(5.0).to(getattr(torch, kind)) for kind in kinds},
  }
  torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
  got = torch_file.read(path)

  def flat(value, names=()):
    if isinstance(value, torch.Tensor | np.ndarray):
      yield ".".join(names), value
    elif isinstance(value, dict | list | tuple):
      for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flat(child, (*names, str(key)))

  expected = dict(flat(tree))
  assert list(got) == list(expected)
  assert "optimizer.state.0.exp_avg" in got and "layer.parametrizations.weight.original1" in got
  for name, value in expected.items():
    if isinstance(value, torch.Tensor):
      assert got[name].dtype.name == str(value.dtype).removeprefix("torch.")
      wide = value.detach() if value.dtype.itemsize > 2 else value.detach().float()
      value = wide.numpy()
    np.testing.assert_array_equal(got[name].astype(value.dtype), value)


def test_a_whole_model_of_torch_is_refused_by_name(path):
  torch = pytest.importorskip("torch")
  torch.save(torch.nn.Linear(2, 2), path)
  assert "torch.nn.modules.linear.Linear" in _refused(path)
