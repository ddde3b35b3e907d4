"""protojax convert: every tensor accounted for, back to the bit, whole or not at all."""

import errno
import json
import logging
import os
import pathlib
import sys

import foreign_layouts as layouts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from protojax import cli, convert, errors, loading, trees
from protojax.interop import compiled, importers, names, settings
from protojax.models import encoder as encoders
from protojax.training import export, programs, workdir

ROOT = pathlib.Path(__file__).resolve().parent.parent

REGISTERS = {"registers": 3, "scaled": True}


def _save(folder, tensors, name="in.safetensors"):
  safetensors.numpy.save_file(tensors, folder / name)
  return folder / name


def _brought_in(folder, tensors, **options):
  convert.bring_in(_save(folder, tensors), folder / "out", **options)
  return folder / "out"


def _full(**parts):
  """A full checkpoint of DINO, as `tensor_files.read` names its tensors."""
  out = {"dino_loss.center": np.zeros((1, 8), np.float32)}
  for part, seed in (("student.module.", 3), ("teacher.", 4)):
    out |= layouts.prefixed(part + "backbone.", layouts.vit(seed=seed, **parts))
    out |= layouts.prefixed(part + "head.", layouts.head(seed=seed))
  return out


# Key lists and names.


@pytest.mark.parametrize(
  "shape, extra, count",
  [({}, (), 150), ({"registers": 4, "scaled": True}, ("mask_token",), 176)],
  ids=["DINO", "DINOv2 with registers"],
)
def test_published_key_lists_are_matched_completely(tmp_path, shape, extra, count):
  tensors = layouts.vit(depth=12, **shape) | {name: np.ones((1, 64), np.float32) for name in extra}
  assert len(tensors) == count
  done = importers.convert(_save(tmp_path, tensors))
  assert (len(done.tensors), done.missing, done.unexpected) == (count - len(extra), {}, [])
  assert sorted(name for left in done.aside.values() for name in left) == sorted(extra)


def test_a_patch_kernel_and_a_linear_layer_keep_their_meaning(tmp_path):
  tensors = layouts.vit()
  out, _ = export.read(_brought_in(tmp_path, tensors))
  image = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
  theirs = np.einsum("dchw,hwc->d", tensors["patch_embed.proj.weight"], image)
  ours = image.reshape(-1) @ out["params.backbone.patch_embed.kernel"].reshape(-1, 64)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(
    out["params.backbone.blocks_1.attn.qkv.kernel"], tensors["blocks.1.attn.qkv.weight"].T
  )


@pytest.mark.parametrize("which, seed", [(None, 4), ("teacher", 4), ("student", 3)])
def test_a_full_checkpoint_gives_the_network_that_is_asked_for_with_its_head(tmp_path, which, seed):
  folder = _brought_in(tmp_path, _full(), which=which)
  tensors, info = export.read(folder)
  np.testing.assert_array_equal(
    tensors["params.backbone.cls_token"], layouts.vit(seed=seed)["cls_token"]
  )
  np.testing.assert_array_equal(
    tensors["params.head.fc3.kernel"], layouts.head(seed=seed)["mlp.4.weight"].T
  )
  assert info["weights"] == ("encoder" if which == "student" else "teacher")
  assert (info["head"]["hidden"], info["head"]["bottleneck"]) == (32, 16)


def test_a_network_without_a_name_of_ours_is_chosen_by_its_prefix(tmp_path):
  tensors = {}
  for prefix, seed in (("state_dict.backbone.", 1), ("state_dict.momentum_backbone.", 2)):
    tensors |= layouts.prefixed(prefix, layouts.vit(seed=seed))
  folder = _brought_in(tmp_path, tensors, which="state_dict.momentum_backbone")
  np.testing.assert_array_equal(
    export.read(folder)[0]["params.backbone.cls_token"], layouts.vit(seed=2)["cls_token"]
  )


def test_what_is_set_aside_is_said_with_its_reason(tmp_path):
  full = _full() | {"student.module.backbone.masked_embed": np.ones((1, 64), np.float32)}
  lines = convert.bring_in(_save(tmp_path, full), tmp_path / "out", which="student")
  account = "\n".join(lines)
  assert "matched 36 of 36" in account and "missing 0" in account and "unexpected 0" in account
  assert "\nprototypes 8 of 16 dimensions, from student.module.head.last_layer" in account
  lines = convert.bring_in(tmp_path / "in.safetensors", tmp_path / "bare", with_head=False)
  assert "(prototypes, no part of an encoder) 2: teacher.head.last_layer" in "\n".join(lines)
  nothing = "prototypes none: the doctor has nothing to judge, embed neither embeddings nor codes"
  assert nothing in lines and "prototypes none" not in account
  assert nothing in convert.bring_in(_save(tmp_path, layouts.vit()), tmp_path / "backbone")
  assert "training with masks starts a fresh one) 1: student.module.backbone.masked" in account
  assert "set aside (other parts of the file (teacher)) 38: teacher.backbone." in account


@pytest.mark.parametrize(
  "bad, words",
  [
    (
      {"norm.weight": np.nan, "blocks.1.mlp.fc1.bias": -np.inf},
      r"2 of 38 .* infinity: (norm.weight, blocks.1.mlp.fc1.bias|blocks.1.mlp.fc1.bias, norm.wei)",
    ),
    ({"head.mlp.2.weight": np.nan}, "1 of 38 tensors hold NaN or infinity: head.mlp.2.weight: n"),
    ({"head.last_layer.weight_v": np.nan}, "1 of 38 tensors hold .*: head.last_layer.weight_v"),
    ({"": np.nan}, "38 of 38 tensors hold .* and 34 more"),
  ],
)
def test_weights_that_are_not_finite_are_refused_by_their_names(tmp_path, bad, words):
  tensors = layouts.vit() | layouts.prefixed("head.", layouts.head())
  tensors["fc.weight"] = np.full((4, 64), np.nan, np.float32)  # is set aside and hurts nobody
  for end, value in bad.items():
    tensors |= {k: np.full_like(v, value) for k, v in tensors.items() if k.endswith(end)}
  with pytest.raises(errors.UserError, match=words) as caught:
    _brought_in(tmp_path, tensors)
  assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
  if "head" in words:
    _brought_in(tmp_path, tensors, with_head=False)


def test_prototypes_that_lie_the_other_way_round_are_called_that_and_taken_on_request(
  tmp_path, capsys
):
  tensors = layouts.vit() | layouts.prefixed("head.", layouts.head())
  matrix = tensors["head.last_layer.weight_v"]
  tensors["head.last_layer.weight_v"] = np.ascontiguousarray(matrix.T)  # [16, 8] with 8 gains
  file = str(_save(tmp_path, tensors))
  convert.main([file, str(tmp_path / "without")])
  shown = capsys.readouterr().out
  assert "(prototypes stored [D, K], for 8 gains lie beside it, one a prototype: " in shown
  assert "--transpose takes them) 2: head.last_layer.weight_g, head.last_layer.weight_v" in shown
  convert.main([file, str(tmp_path / "with"), "--transpose"])
  assert "prototypes 8 of 16 dimensions, from head.last_layer" in capsys.readouterr().out
  there = export.read_prototypes(tmp_path / "with", export.read(tmp_path / "with")[1])
  unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
  np.testing.assert_allclose(there["prototypes"].rows, unit, rtol=1e-5)
  tensors["head.last_layer.weight_v"] = matrix
  with pytest.raises(errors.UserError, match="transpose=True: .* leave it out"):
    convert.main([str(_save(tmp_path, tensors)), str(tmp_path / "new"), "--transpose"])


def test_the_head_can_be_left_out(tmp_path):
  tensors, info = export.read(_brought_in(tmp_path, _full(), with_head=False))
  assert not any(".head." in name for name in tensors) and "head" not in info
  assert "head" in info["lacks"]


def test_blocks_in_chunks_are_blocks(tmp_path):
  plain = layouts.vit(depth=3)
  chunked = {}
  for name, tensor in plain.items():
    for chunk, blocks in ((0, "01"), (1, "2")):
      for i in blocks:
        name = name.replace(f"blocks.{i}.", f"blocks.{chunk}#{i}.")
    chunked["teacher.backbone." + name.replace("#", ".")] = tensor
  assert "teacher.backbone.blocks.1.2.norm1.bias" in chunked
  ours, _ = export.read(_brought_in(tmp_path, chunked))
  (tmp_path / "plain").mkdir()
  expected, _ = export.read(_brought_in(tmp_path / "plain", plain))
  assert ours.keys() == expected.keys()
  for name in ours:
    np.testing.assert_array_equal(ours[name], expected[name])


def test_half_precision_becomes_float32_without_loss(tmp_path):
  half = {k: v.astype(jnp.bfloat16) for k, v in layouts.vit().items()}
  tensors, _ = export.read(_brought_in(tmp_path, half))
  assert {v.dtype for v in tensors.values()} == {np.dtype(np.float32)}
  np.testing.assert_array_equal(
    tensors["params.backbone.pos_embed"], half["pos_embed"].astype(np.float32)
  )


@pytest.mark.parametrize("path", ["in.npz", "in.safetensors"])
def test_numpy_archives_are_read_too(tmp_path, path):
  tensors = layouts.vit()
  np.savez(tmp_path / "in.npz", **tensors)
  _save(tmp_path, tensors)
  done = importers.convert(tmp_path / path)
  np.testing.assert_array_equal(done.tensors["params.backbone.cls_token"], tensors["cls_token"])


# There and back.


@pytest.mark.parametrize("shape", [{}, REGISTERS, {"scaled": True}], ids=str)
@pytest.mark.parametrize("format", ["timm", "hf"])
def test_transformers_come_back_to_the_bit(tmp_path, format, shape):
  folder = _brought_in(tmp_path, layouts.vit(**shape), heads=2)
  convert.take_out(folder, tmp_path / format, format)
  lines = convert.bring_in(tmp_path / format, tmp_path / "back")
  (before, info), (after, info_after) = export.read(folder), export.read(tmp_path / "back")
  assert before.keys() == after.keys() and info["model"] == info_after["model"]
  for name in before:
    if shape == REGISTERS and format == "timm" and name.endswith(("cls_token", "pos_embed")):
      continue  # the class token's position is in the token there
    np.testing.assert_array_equal(before[name], after[name], name)
  np.testing.assert_allclose(
    before["params.backbone.cls_token"][0, 0] + before["params.backbone.pos_embed"][0, 0],
    after["params.backbone.cls_token"][0, 0] + after["params.backbone.pos_embed"][0, 0],
  )
  assert info["image"] == info_after["image"] and not any("heads:" in line for line in lines)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_resnets_come_back_under_torchvisions_names(tmp_path, bottleneck):
  tensors = layouts.resnet(bottleneck=bottleneck, classes=5)
  folder = _brought_in(tmp_path, tensors)
  convert.take_out(folder, tmp_path / "timm", "timm")
  back = safetensors.numpy.load_file(tmp_path / "timm" / "model.safetensors")
  kept = {k for k in tensors if "num_batches" not in k and not k.startswith("fc.")}
  assert back.keys() == kept
  for name in kept:
    np.testing.assert_array_equal(back[name], tensors[name])


def test_hugging_faces_file_has_the_published_names(tmp_path):
  folder = _brought_in(tmp_path, layouts.vit(depth=1, **REGISTERS))
  convert.take_out(folder, tmp_path / "hf", "hf")
  block = "encoder.layer.0."
  modules = [
    f"{block}{name}"
    for name in (
      "norm1",
      "attention.attention.query",
      "attention.attention.key",
      "attention.attention.value",
      "attention.output.dense",
      "norm2",
      "mlp.fc1",
      "mlp.fc2",
    )
  ] + ["layernorm", "embeddings.patch_embeddings.projection"]
  assert safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors").keys() == {
    *(f"{name}.{leaf}" for name in modules for leaf in ("weight", "bias")),
    f"{block}layer_scale1.lambda1",
    f"{block}layer_scale2.lambda1",
    "embeddings.cls_token",
    "embeddings.mask_token",
    "embeddings.position_embeddings",
    "embeddings.register_tokens",
  }
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert (config["model_type"], config["num_register_tokens"]) == ("dinov2_with_registers", 3)


def test_names_of_hugging_face_in_memory_are_understood():
  rng = np.random.default_rng(0)
  parts = {
    f"layers.3.attention.{x}_proj.weight": rng.normal(size=(4, 4)).astype("f") for x in "qkv"
  }
  plain = names.from_hugging_face({**parts, "layers.3.mlp.fc1.bias": np.ones(2), "other": 1})
  assert plain.keys() == {"blocks.3.attn.qkv.weight", "blocks.3.mlp.fc1.bias", "other"}
  np.testing.assert_array_equal(
    plain["blocks.3.attn.qkv.weight"], np.concatenate(list(parts.values()))
  )


def test_a_tensor_that_is_missing_is_called_as_in_its_file(tmp_path):
  """Below a prefix, and by the names of Hugging Face."""
  convert.take_out(_brought_in(tmp_path, layouts.vit()), tmp_path / "hf", "hf")
  there = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
  for tensors, gone in (
    (_full(), "teacher.backbone.blocks.1.mlp.fc1.bias"),
    (layouts.prefixed("vit.", there), "vit.encoder.layer.1.intermediate.dense.bias"),
  ):
    done = importers.convert(_save(tmp_path, _without(tensors, gone)))
    assert done.missing == {"params.backbone.blocks_1.mlp.fc1.bias": gone}


# What protojax does with it.


def test_a_backbone_starts_a_run_that_keeps_its_own_head_and_says_so(tmp_path, caplog):
  folder = _brought_in(tmp_path, layouts.vit(width=32, depth=1), heads=2)
  state = programs.Program(tiny.config("ibot")).init(0)
  loaded = export.load(folder, state.encoder)
  with caplog.at_level(logging.INFO):
    started = jax.device_get(workdir.warm_start(state, loaded))
  assert "start fresh: backbone.mask_token, head.fc1.bias" in caplog.text
  expected = layouts.vit(width=32, depth=1)["blocks.0.mlp.fc1.weight"].T
  state = jax.device_get(state)
  for new, old in (
    (started.encoder, state.encoder),
    (started.teacher["encoder"], state.teacher["encoder"]),
  ):
    np.testing.assert_array_equal(new["backbone"]["blocks_0"]["mlp"]["fc1"]["kernel"], expected)
    jax.tree.map(np.testing.assert_array_equal, new["head"], old["head"])


def test_a_backbone_of_another_shape_starts_nothing(tmp_path):
  folder = _brought_in(tmp_path, layouts.vit(width=32, depth=2), heads=2)
  abstract = programs.Program(tiny.config()).abstract.encoder
  with pytest.raises(errors.UserError, match="blocks_1.* there and none here"):
    export.load(folder, abstract)


def test_a_parameter_that_the_file_does_not_say_it_lacks_is_refused(tmp_path):
  folder = _brought_in(tmp_path, layouts.vit(width=32, depth=1), heads=2)
  tensors, info = export.read(folder)
  export.write(folder, tensors, {**info, "lacks": ["backbone.mask_token"]})
  with pytest.raises(errors.UserError, match="head.fc1.bias has shape none there"):
    export.load(folder, programs.Program(tiny.config()).abstract.encoder)


def test_evaluation_takes_what_was_converted(tmp_path):
  folder = _brought_in(tmp_path, layouts.vit(width=32, depth=1), heads=2)
  model = loading.load(str(folder))
  assert (model.kind, model.step, model.weights) == ("encoder", None, "encoder")
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)

  @jax.jit
  def features(params, images):
    return encoders.features(model.encoder, params, model.batch_stats, images)

  expected = jax.jit(compiled.function(*export.read(folder)))(images)
  np.testing.assert_allclose(features(model.params, images), expected, atol=1e-6)


def test_serialised_function_gives_the_features_for_any_batch(tmp_path):
  pytest.importorskip("flatbuffers")
  folder = _brought_in(tmp_path, _full(**REGISTERS))
  convert.take_out(folder, tmp_path / "jax", "jax")
  function = jax.export.deserialize((tmp_path / "jax" / "features.jax").read_bytes())
  assert set(function.platforms) == {"cpu", "cuda", "tpu"}
  tensors, info = export.read(folder)
  for batch in (1, 3):
    images = np.random.default_rng(batch).normal(size=(batch, 16, 16, 3)).astype(np.float32)
    expected = jax.jit(compiled.function(tensors, info))(images)
    np.testing.assert_allclose(function.call(images), expected, atol=1e-5)


def test_onnx_file_gives_the_features_for_any_batch(tmp_path):
  pytest.importorskip("jax2onnx")
  runtime = pytest.importorskip("onnxruntime")
  folder = _brought_in(tmp_path, layouts.vit(**REGISTERS))
  convert.take_out(folder, tmp_path / "onnx", "onnx")
  session = runtime.InferenceSession(tmp_path / "onnx" / "encoder.onnx")
  tensors, info = export.read(folder)
  for batch in (1, 4):
    images = np.random.default_rng(batch).normal(size=(batch, 16, 16, 3)).astype(np.float32)
    (there,) = session.run(["features"], {"images": images})
    expected = jax.jit(compiled.function(tensors, info))(images)
    np.testing.assert_allclose(there, expected, atol=1e-4)


def test_onnx_without_jax2onnx_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  folder = _brought_in(tmp_path, layouts.vit())
  with pytest.raises(errors.UserError, match="pip install .*jax2onnx") as caught:
    convert.take_out(folder, tmp_path / "onnx", "onnx")
  assert "\n" not in str(caught.value) and not (tmp_path / "onnx").exists()


# What is refused.


def _without(tensors, *endings):
  return {k: v for k, v in tensors.items() if not k.endswith(endings)}


def _swiglu():
  tensors = _without(layouts.vit(), "mlp.fc1.weight", "mlp.fc1.bias")
  return tensors | {"blocks.0.mlp.w12.weight": np.ones((512, 64), np.float32)}


@pytest.mark.parametrize(
  "tensors, words",
  [
    (_swiglu, "SwiGLU"),
    (lambda: _without(layouts.vit(), "qkv.bias"), "have no bias"),
    (lambda: layouts.vit() | {"blocks.0.mlp.fc1.weight": np.ones((128, 64), "f")}, "is 128 wide"),
    (lambda: layouts.vit(width=96), "give heads="),
    (
      lambda: layouts.vit() | {"patch_embed.proj.weight": np.ones((64, 1, 8, 8), "f")},
      r"shape \(64, 1, 8, 8\)",
    ),
    (
      lambda: layouts.vit() | {"norm.bias": np.ones(3, "f")},
      r"norm.bias \(backbone.norm.bias in protojax\) has shape \(3,\)",
    ),
    (
      lambda: _without(layouts.vit(), "blocks.1.norm2.bias"),
      r"missing 1: blocks.1.norm2.bias \(backbone.blocks_1.norm2.bias in protojax\); unexpected 0",
    ),
    (lambda: layouts.vit() | {"fc_norm.weight": np.ones(64, "f")}, "unexpected 1: fc_norm.weight"),
    (
      lambda: _without(layouts.vit(), "cls_token"),
      "there is no cls_token among its 29 tens",
    ),
    (
      lambda: (
        layouts.vit()
        | {"head.mlp.0.weight": np.ones((4, 64), "f"), "head.mlp.3.weight": np.ones((4, 4), "f")}
      ),
      "--no_head",
    ),
    (lambda: layouts.vit() | {"head.mlp.0.bias": np.ones(4, "f")}, "--no_head"),
    (lambda: {"a": np.ones(2, "f")}, "no network of a known layout"),
    (lambda: layouts.resnet(stem=3), "stem=cifar or stem=cifar_pad2"),
    (
      lambda: {k: v for k, v in layouts.resnet().items() if "layer4.1" not in k},
      r"\(2, 2, 2, 1\) blocks",
    ),
    (
      lambda: layouts.prefixed("a.", layouts.vit()) | layouts.prefixed("b.", layouts.vit()),
      r"holds 2 networks: a, b; give one as which=",
    ),
  ],
)
def test_weights_of_another_model_are_refused_in_one_line(tmp_path, tensors, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    _brought_in(tmp_path, tensors())
  assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_was_missing_stays_known(tmp_path, caplog):
  tensors = _without(layouts.vit(), "norm.weight")
  tensors |= layouts.prefixed("head.", _without(layouts.head(), "mlp.2.bias"))
  folder = _brought_in(tmp_path, tensors, allow_partial=True)
  assert json.loads((folder / "config.json").read_text())["initialised"] == {
    "params.backbone.norm.scale": "norm.weight",
    "params.head.fc2.bias": "head.mlp.2.bias",
  }
  said = "2 tensors are freshly initialised, missing in the file that was converted: "
  assert loading.load(folder).initialised == ("norm.weight", "head.mlp.2.bias")
  assert f"{folder}: {said}norm.weight, head.mlp.2.bias" in caplog.text
  caplog.clear()
  params = {k: v for k, v in export.read(folder)[0].items() if k.startswith("params.")}
  export.load(folder, trees.nested(params)["params"])
  assert said in caplog.text  # where a run starts from it
  assert f"note: {said}" in "\n".join(convert.take_out(folder, tmp_path / "timm", "timm"))
  assert "initialised" not in export.read(_brought_in(tmp_path, layouts.vit(), overwrite=True))[1]


def test_part_of_the_weights_only_on_request(tmp_path):
  tensors = _without(layouts.vit(), "norm.weight") | {"fc_norm.weight": np.ones(64, np.float32)}
  folder = _brought_in(tmp_path, tensors, allow_partial=True)
  out, _ = export.read(folder)
  np.testing.assert_array_equal(out["params.backbone.norm.scale"], np.ones(64))
  np.testing.assert_array_equal(out["params.backbone.norm.bias"], tensors["norm.bias"])


def test_settings_that_hugging_face_says_and_ours_cannot_be_are_refused(tmp_path):
  folder = _brought_in(tmp_path, layouts.vit())
  convert.take_out(folder, tmp_path / "hf", "hf")
  file = tmp_path / "hf" / "config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "quick_gelu"}))
  with pytest.raises(errors.UserError, match="hidden_act='quick_gelu'"):
    convert.bring_in(tmp_path / "hf", tmp_path / "back")
  file.write_text("{")
  with pytest.raises(errors.UserError, match="not readable JSON"):
    convert.bring_in(tmp_path / "hf", tmp_path / "back")


def test_what_lies_beside_a_file_and_says_nothing_of_use_changes_nothing(tmp_path):
  (tmp_path / "config.json").write_text('{"pretrained_cfg": [1], "model_args": {"num_heads": "x"}}')
  (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": "no"}')
  _, info = export.read(_brought_in(tmp_path, layouts.vit(width=128)))
  assert info["model"]["heads"] == 2 and info["image"]["std"] == [0.229, 0.224, 0.225]
  (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 1]}')
  _, info = export.read(_brought_in(tmp_path, layouts.vit(), overwrite=True))
  assert info["image"]["mean"] == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
  ("file", "said", "crop"),
  [
    (
      "preprocessor_config.json",
      {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": {"height": 224}},
      0.875,
    ),
    ("preprocessor_config.json", {"do_center_crop": True, "size": 256, "crop_size": 224}, 0.875),
    ("preprocessor_config.json", {"size": {"height": 224}, "crop_size": {"height": 112}}, 1.0),
    ("config.json", {"pretrained_cfg": {"crop_pct": 0.9}}, 0.9),
    ("config.json", {"pretrained_cfg": {"crop_pct": "x"}}, None),
  ],
)
def test_the_crop_of_evaluation_is_the_one_beside_the_file_or_the_one_asked_for(
  tmp_path, file, said, crop
):
  (tmp_path / file).write_text(json.dumps(said))
  path = _save(tmp_path, layouts.vit())
  account = "\n".join(convert.bring_in(path, tmp_path / "out"))
  assert ("crop=0.875 is the usual" in account) == (crop is None)
  config = loading.load(tmp_path / "out").config
  assert config.probe.crop == (crop or 1.0)
  # Photos are stored larger than the views, as the recipes do: their square is cut from that.
  assert config.data.image_size == round(config.augment.global_size * 512 / 224)
  convert.bring_in(path, tmp_path / "out", crop=0.5, overwrite=True)
  assert loading.load(tmp_path / "out").config.probe.crop == 0.5


def test_an_account_says_what_it_took_from_beside_a_file_and_what_from_nowhere(tmp_path, capsys):
  file, config, images = (
    tmp_path / name for name in ("in.safetensors", "config.json", "preprocessor_config.json")
  )
  safetensors.numpy.save_file(layouts.vit(width=128), file)
  neither = "says another"
  for content, beside, expected, absent in (
    (None, None, ["no config.json lies beside it: --heads=NUM", "mean and std of the"], "nor does"),
    ({}, {"image_std": 0.5}, ["nor does config.json beside it", "note: mean of the"], "and std"),
    ({"num_heads": 4}, {"image_mean": 0.5, "image_std": [0.5] * 3}, ["heads 4"], neither),
  ):
    for path, said in ((config, content), (images, beside)):
      if said is not None:
        path.write_text(json.dumps(said))
    convert.main([str(file), str(tmp_path / "out"), "--overwrite"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in expected) and absent not in shown
  assert export.read(tmp_path / "out")[1]["image"]["mean"] == [0.5] * 3


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_positions_for_another_size_leave_as_those_of_the_views(tmp_path, format):
  config = tiny.config(model__image_size=32, augment__global_size=16)
  encoder = encoders.build(config)
  params, _ = jax.jit(lambda key: encoders.init(encoder, key, 16))(jax.random.key(0))
  tree = {"params": jax.device_get(params)}
  image = {"global_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
  model = config.model.to_dict()
  info = {"weights": "encoder", "step": 1, "model": model, "image": image}
  export.write(tmp_path / "ours", tree, info)
  account = "\n".join(convert.take_out(tmp_path / "ours", tmp_path / "out", format))
  assert "position embedding resampled from 32 to 16 px" in account
  convert.bring_in(tmp_path / "out", tmp_path / "back")
  ours, back = (loading.load(tmp_path / name) for name in ("ours", "back"))
  assert back.config.model.image_size == back.config.augment.global_size == 16
  images = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
  np.testing.assert_allclose(back.features(images), ours.features(images), rtol=1e-4, atol=1e-5)


def test_encoders_that_a_format_cannot_hold_are_refused(tmp_path):
  folder = _brought_in(tmp_path, layouts.resnet())
  with pytest.raises(errors.UserError, match="hf is for transformers"):
    convert.take_out(folder, tmp_path / "hf", "hf")
  encoder = encoders.build(tiny.config(model__name="resnet8"))
  params, _ = jax.jit(lambda key: encoders.init(encoder, key, 16))(jax.random.key(0))
  info = {"weights": "encoder", "step": 1, "model": {"name": "resnet8"}}
  export.write(tmp_path / "eight", {"params": jax.device_get(params)}, info)
  with pytest.raises(errors.UserError, match="resnet8 has no counterpart"):
    convert.take_out(tmp_path / "eight", tmp_path / "timm", "timm")
  assert not (tmp_path / "hf").exists() and not (tmp_path / "timm").exists()


def test_a_description_of_another_model_is_refused(tmp_path):
  folder = _brought_in(tmp_path, layouts.vit())
  tensors, info = export.read(folder)
  export.write(folder, tensors, {**info, "model": {**info["model"], "depth": 3}})
  with pytest.raises(errors.UserError, match=r"blocks_2.* is missing: these weights are not"):
    convert.take_out(folder, tmp_path / "timm", "timm")


def test_nothing_is_replaced_unasked_and_nothing_else_is_ever_deleted(tmp_path):
  file = _save(tmp_path, layouts.vit())
  out = tmp_path / "out"
  convert.bring_in(file, out)
  before = (out / "encoder.safetensors").read_bytes()
  with pytest.raises(errors.UserError, match="is there already.*--overwrite"):
    convert.bring_in(file, out)
  _save(tmp_path, layouts.vit(seed=9))
  convert.bring_in(file, out, overwrite=True)
  assert (out / "encoder.safetensors").read_bytes() != before
  (out / "thesis.tex").write_text("x")
  with pytest.raises(errors.UserError, match="thesis.tex, which no conversion wrote"):
    convert.bring_in(file, out, overwrite=True)
  assert (out / "thesis.tex").read_text() == "x"
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out"]


def test_a_failure_while_writing_leaves_the_old_folder_whole(tmp_path, monkeypatch):
  folder = _brought_in(tmp_path, layouts.vit())
  convert.take_out(folder, tmp_path / "timm", "timm")
  before = {p.name: p.read_bytes() for p in (tmp_path / "timm").iterdir()}

  def full(*unused):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(convert, "_write_json", full)
  with pytest.raises(OSError, match="No space"):  # which `cli.guarded` says in one line
    convert.take_out(folder, tmp_path / "timm", "timm", overwrite=True)
  assert {p.name: p.read_bytes() for p in (tmp_path / "timm").iterdir()} == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out", "timm"]


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["missing.pth", "new"], "there is no"),
    (["in.safetensors", "new", "--format=timm"], "bring it in first"),
    (["out", "new"], "is protojax's already: .* --no_head writes its backbone alone"),
    (["out", "new", "--format=timm", "--heads=3"], "--heads is for weights of other libraries"),
    (["in.safetensors", "new", "--image_size=17"], "no multiple of the patch size 8"),
    (["in.safetensors", "new", "--crop=87.5"], "crop=87.5 must be above 0 and at most 1"),
    (["in.safetensors", "new", "--heads=5"], "does not divide"),
    (["in.safetensors", "new", "--stem=cifar"], "stem=cifar is for ResNets"),
    (["in.safetensors", "new", "--which=student"], "which=student is not one of them"),
    (["out", "out", "--format=timm", "--overwrite"], "would replace IN"),
    (["in.safetensors", "new", "--fromat=timm"], "did you mean --format"),
    (["empty", "new"], "holds neither a run of protojax"),
  ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, arguments, words):
  _brought_in(tmp_path, layouts.vit())
  (tmp_path / "empty").mkdir()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError, match=words) as caught:
    convert.main(arguments)
  assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_a_run_is_converted_from_its_exported_encoder(tmp_path, capsys):
  exported = _brought_in(tmp_path, layouts.vit())
  (tmp_path / "run").mkdir()
  os.rename(exported, tmp_path / "run" / "exported")
  convert.main([str(tmp_path / "run"), str(tmp_path / "timm"), "--format=timm"])
  assert "matched 30 of 30 tensors of the backbone" in capsys.readouterr().out
  config = json.loads((tmp_path / "timm" / "config.json").read_text())
  assert config["architecture"] == "vit_base_patch16_224"  # timm knows no "vit_patch16_224"
  assert config["model_args"]["embed_dim"] == 64


def test_the_program_says_what_it_did_and_a_mistake_is_status_2(tmp_path, capfd):
  arguments = [str(_save(tmp_path, layouts.vit())), str(tmp_path / "out")]
  cli.guarded(convert.main, arguments)
  assert "matched 30 of 30" in capfd.readouterr().out
  with pytest.raises(SystemExit) as ended:
    cli.guarded(convert.main, arguments)
  done = capfd.readouterr()
  assert ended.value.code == 2 and done.out == ""
  assert done.err.startswith("protojax: ") and len(done.err.splitlines()) == 1


def test_heads_are_taken_as_dinos_only_where_nothing_says():
  tensors = layouts.vit(width=128)
  assert settings.of_vit(tensors)["heads"] == 2
  assert settings.of_vit(tensors, heads=8)["heads"] == 8
  with pytest.raises(errors.UserError, match="does not divide"):
    settings.of_vit(tensors, heads=7)
