import jax.numpy as jnp
import numpy as np
import pytest

from protojax import errors
from protojax.interop import prototype_layouts

_RNG = np.random.default_rng(0)


def _matrix(rows=12, columns=4):
  return _RNG.normal(size=(rows, columns)).astype(np.float32)


def _normalised(prefix, rows=12, old=True):
  v, g = (
    (".weight_v", ".weight_g")
    if old
    else (".parametrizations.weight.original1", ".parametrizations.weight.original0")
  )
  return {prefix + g: np.full((rows, 1), 2.0, np.float32), prefix + v: _matrix(rows)}


def _head(prefix=""):
  return {prefix + "head.mlp.0.weight": _matrix(16, 8), prefix + "head.mlp.0.bias": np.zeros(16)}


_TIED = _matrix()
# What each project writes (spec, DINO family, section 3), where its prototypes are and whose names
# they are taken for.
_FILES = {
  "dino": (
    {
      **{f"student.module.{k}": v for k, v in (_head() | _normalised("head.last_layer")).items()},
      **{f"teacher.{k}": v for k, v in (_head() | _normalised("head.last_layer")).items()},
      "dino_loss.center": _matrix(1, 12),
    },
    ["teacher.head.last_layer.weight_v"],
    "DINO",
  ),
  "dino, newer PyTorch": (
    _normalised("teacher.head.last_layer", old=False),
    ["teacher.head.last_layer.parametrizations.weight.original1"],
    "DINO",
  ),
  "ibot": (
    _normalised("teacher.head.last_layer") | _normalised("teacher.head.last_layer2", 20),
    ["teacher.head.last_layer.weight_v", "teacher.head.last_layer2.weight_v"],
    "iBOT",
  ),
  "dinov2": (
    _normalised("teacher.dino_head.last_layer")
    | _normalised("teacher.ibot_head.last_layer", 20)
    | {"teacher.backbone.blocks.0.0.ls1.gamma": _matrix(1, 8)[0]},
    ["teacher.dino_head.last_layer.weight_v", "teacher.ibot_head.last_layer.weight_v"],
    "DINOv2",
  ),
  "dinov3": (
    {f"{one}.dino_head.last_layer.weight": _matrix() for one in ("student", "teacher")},
    ["teacher.dino_head.last_layer.weight"],
    "DINOv3",
  ),
  "msn": (
    {
      "encoder.module.fc.fc1.weight": _matrix(),
      "target_encoder.module.fc.fc1.weight": _matrix(),
      "prototypes": _matrix(),
    },
    ["prototypes"],
    "MSN",
  ),
  "swav": (
    {"state_dict.module.prototypes.weight": _matrix()},
    ["state_dict.module.prototypes.weight"],
    "SwAV",
  ),
  "swav, several heads": (
    {f"module.prototypes.prototypes{i}.weight": _matrix(12 + i) for i in range(2)},
    [f"module.prototypes.prototypes{i}.weight" for i in range(2)],
    "SwAV",
  ),
  "lightning": (
    _normalised("state_dict.model.momentum_head.last_layer")
    | _normalised("state_dict.model.head.last_layer"),
    ["state_dict.model.momentum_head.last_layer.weight_v"],
    "DINO",
  ),
}


@pytest.mark.parametrize("name", _FILES)
def test_prototypes_are_found_where_public_code_keeps_them(name):
  arrays, keys, kind = _FILES[name]
  found = prototype_layouts.find(arrays)
  assert [one.key for one in found] == keys
  assert prototype_layouts.kind(arrays, found).startswith(kind)
  for one in found:
    rows = arrays[one.key]
    if one.gain is None:
      np.testing.assert_array_equal(one.weights(), rows)
    else:
      unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
      np.testing.assert_allclose(one.weights(), 2 * unit, rtol=1e-6)


def test_the_teacher_is_taken_unless_the_student_is_asked_for():
  arrays = _FILES["dino"][0]
  assert prototype_layouts.find(arrays, "teacher")[0].key == "teacher.head.last_layer.weight_v"
  assert (
    prototype_layouts.find(arrays, "student")[0].key == "student.module.head.last_layer.weight_v"
  )
  assert prototype_layouts.owner(prototype_layouts.find(arrays)[0].name) == "teacher"
  lone = _FILES["swav"][0]
  assert prototype_layouts.find(lone, "student") and prototype_layouts.find({}, "teacher") == []
  with pytest.raises(errors.UserError, match="^which=.*: leave it out"):
    prototype_layouts.find(lone, "teacher")
  with pytest.raises(errors.UserError, match="^which=.*: leave it out"):
    prototype_layouts.find(_FILES["dino, newer PyTorch"][0], "student")


def test_tied_heads_are_one_set():
  arrays = {f"teacher.head.{name}.weight_v": _TIED for name in ("last_layer", "last_layer2")}
  (one,) = prototype_layouts.find(arrays | {"x": _matrix()})
  assert one.aliases == ("teacher.head.last_layer2.weight_v",)
  assert prototype_layouts.kind(arrays, [one]) == "iBOT"


def test_only_methods_that_compare_directions_ignore_norms():
  assert (
    prototype_layouts.find(_FILES["msn"][0])[0].cosine
    and prototype_layouts.find(_FILES["swav"][0])[0].cosine
  )
  assert not prototype_layouts.find(_FILES["dino"][0])[0].cosine


def test_a_negative_gain_turns_a_prototype_and_a_row_of_zeros_is_not_finite():
  matrix = np.float32([[3, 4], [0, 0], [0, 2]])
  one = prototype_layouts.Prototypes("a", "a", matrix, np.float32([-1, 1, 0.5]))
  np.testing.assert_allclose(one.weights()[[0, 2]], [[-0.6, -0.8], [0, 0.5]], rtol=1e-6)
  assert np.isnan(one.weights()[1]).all()


def test_other_arrays_are_not_taken_for_prototypes():
  arrays = {
    "head.last_layer.bias": _matrix(1, 12)[0],
    "last_layer_norm.weight": _matrix(),
    "prototypes.weight": np.zeros((4, 4), np.int64),
    "prototypes": _matrix(12, 1),
    "prototypes_ema_decay": _matrix(),
    "queue": _matrix(),
    "last_layer": _matrix(),
  }
  assert prototype_layouts.find(arrays) == []


def test_a_named_matrix_is_taken_either_way_round_and_in_any_precision():
  arrays = {
    "a.weight": _matrix(3, 12),
    "conv": _matrix(12, 4)[:, :, None, None],
    "brain": _matrix().astype(jnp.bfloat16),
    "count": np.arange(3),
  }
  assert prototype_layouts.at(arrays, "a.weight").matrix.shape == (3, 12)
  turned = prototype_layouts.at(arrays, "a.weight", transpose=True)
  np.testing.assert_array_equal(turned.weights(), arrays["a.weight"].T)
  assert prototype_layouts.at(arrays, "conv").matrix.shape == (12, 4)
  assert prototype_layouts.at(arrays, "brain").weights().dtype == np.float32
  with pytest.raises(errors.UserError, match="did you mean a.weight"):
    prototype_layouts.at(arrays, "a.wieght")
  with pytest.raises(errors.UserError, match="no matrix"):
    prototype_layouts.at(arrays, "count")
  assert prototype_layouts.candidates(arrays) == [("brain", (12, 4)), ("a.weight", (3, 12))]


@pytest.mark.parametrize(
  "name, said",
  [
    ("cls_token", "give key=NAME"),
    ("patch_embed.proj.weight", "full ckpt"),
    ("module.layer1.0.conv1.weight", "full ckpt"),
    ("encoder.layer.0.a.query.weight", "full ckpt"),
    ("register_tokens", "never released"),
    ("backbone.blocks.0.1.ls1.gamma", "never released"),
    ("params.backbone.cls_token", "workdir"),
  ],
)
def test_a_backbone_says_what_to_download_instead(name, said):
  assert said in prototype_layouts.advice({name: _matrix()})
