"""Converted weights compute what the PyTorch original computes; where PyTorch is installed."""

import argparse
import functools
import warnings

import foreign_layouts as layouts
import jax
import numpy as np
import pytest
import safetensors.numpy

from protojax import convert
from protojax.interop import settings
from protojax.models import encoder as encoders
from protojax.training import export

torch = pytest.importorskip("torch")

import torch_models  # noqa: E402


@functools.cache
def _transformers():
  """Hugging Face's library; importing it must not depend on the warnings of the day."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  return transformers


def _images(size, other=None, batch=2):
  return np.random.default_rng(5).normal(size=(batch, size, other or size, 3)).astype(np.float32)


def _ours(folder, images, head=False):
  """Features (or the head's output) of a converted folder."""
  tensors, info = export.read(folder)
  encoder = settings.encoder_of(info)
  tree = {}
  for name, tensor in tensors.items():
    *parents, leaf = name.split(".")
    functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[leaf] = tensor
  params, stats = tree["params"], tree.get("batch_stats", {})

  @jax.jit
  def forward(images):
    if not head:
      return encoders.features(encoder, params, stats, images)
    return encoders.embed(encoder, params, stats, {"global": images[:, None]}, train=False)[0].z

  out = np.asarray(forward(images))
  return out[:, 0] if head else out


def _theirs(model, images, call=None):
  with torch.no_grad():
    return (call or model.eval())(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def _filled(model, tensors):
  """Strict, so that the key list of the file is that of the original."""
  model.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in tensors.items()})
  return model.eval()


def _brought_in(tmp_path, tensors, **options):
  safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors")
  convert.bring_in(tmp_path / "in.safetensors", tmp_path / "out", **options)
  return tmp_path / "out"


def _assert_close(ours, theirs):
  assert np.abs(theirs).max() > 0.1
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


_DINO = {"width": 64, "depth": 2, "patch": 4, "side": 4}


def test_dino_vit_is_the_original_at_its_own_and_at_other_sizes(tmp_path):
  tensors = layouts.vit(**_DINO)
  model = _filled(torch_models.ViT(heads=2, **_DINO), tensors)
  folder = _brought_in(tmp_path, tensors, heads=2)
  for size in ((16, 16), (12, 12), (24, 20)):
    images = _images(*size)
    _assert_close(_ours(folder, images), _theirs(model, images))


def test_number_of_heads_matters(tmp_path):
  tensors = layouts.vit(**_DINO)
  model = _filled(torch_models.ViT(heads=4, **_DINO), tensors)
  folder = _brought_in(tmp_path, tensors, heads=2)
  images = _images(16)
  assert np.abs(_ours(folder, images) - _theirs(model, images)).max() > 1e-2


@pytest.mark.parametrize("norm", [False, True])
def test_embeddings_of_a_full_dino_checkpoint_are_the_originals(tmp_path, norm):
  backbone, head = layouts.vit(**_DINO), layouts.head(norm=norm)
  folder = _brought_in(
    tmp_path,
    layouts.prefixed("teacher.backbone.", backbone) | layouts.prefixed("teacher.head.", head),
  )
  model = _filled(torch_models.ViT(heads=1, **_DINO), backbone)
  projector = _filled(
    torch_models.Head(64, 32, 16, norm), {k: v for k, v in head.items() if "last_layer" not in k}
  )
  images = _images(16)
  theirs = _theirs(None, images, lambda x: projector(model(x)))
  _assert_close(_ours(folder, images, head=True), theirs)


def test_a_file_of_torch_save_with_all_that_dino_puts_into_one_is_read(tmp_path):
  def tensors(seed):
    parts = layouts.prefixed("backbone.", layouts.vit(seed=seed, **_DINO))
    parts |= layouts.prefixed("head.", layouts.head(seed=seed))
    return {k: torch.from_numpy(v) for k, v in parts.items()}

  content = {
    "student": layouts.prefixed("module.", tensors(1)),
    "teacher": tensors(2),
    "epoch": 3,
    "optimizer": {"state": {0: {"step": 7, "exp_avg": torch.ones(3)}}, "param_groups": []},
    "args": argparse.Namespace(arch="vit_small"),
    "dino_loss": {"center": torch.zeros(1, 8)},
  }
  torch.save(content, tmp_path / "checkpoint.pth")
  for which, seed in (("teacher", 2), ("student", 1)):
    convert.bring_in(tmp_path / "checkpoint.pth", tmp_path / which, which=which)
    read, _ = export.read(tmp_path / which)
    expected = layouts.vit(seed=seed, **_DINO)
    np.testing.assert_array_equal(read["params.backbone.pos_embed"], expected["pos_embed"])


def test_dinov2_with_registers_is_the_original_at_its_size_and_resampled(tmp_path):
  tensors = layouts.vit(registers=3, scaled=True, **_DINO)
  model = _filled(torch_models.ViT(heads=1, registers=3, scaled=True, **_DINO), tensors)
  for size in (16, 12, 24):
    folder = _brought_in(tmp_path, tensors, image_size=size, overwrite=True)
    _assert_close(_ours(folder, _images(size)), _theirs(model, _images(size)))


def test_timms_registers_without_class_position_are_the_originals(tmp_path):
  tensors = layouts.vit(registers=3, scaled=True, **_DINO)
  tensors["reg_token"] = tensors.pop("register_tokens")
  tensors["pos_embed"] = tensors["pos_embed"][:, 1:].copy()
  model = _filled(
    torch_models.ViT(heads=1, registers=3, scaled=True, no_embed_class=True, **_DINO), tensors
  )
  folder = _brought_in(tmp_path, tensors)
  _assert_close(_ours(folder, _images(16)), _theirs(model, _images(16)))


@pytest.mark.parametrize("registers, scaled", [(0, False), (0, True), (3, True)])
def test_what_goes_out_to_timm_loads_strictly_and_computes_the_same(tmp_path, registers, scaled):
  shape = {"registers": registers, "scaled": scaled, **_DINO}
  folder = _brought_in(tmp_path, layouts.vit(**shape))
  convert.take_out(folder, tmp_path / "timm", "timm")
  tensors = safetensors.numpy.load_file(tmp_path / "timm" / "model.safetensors")
  model = torch_models.ViT(heads=1, no_embed_class=registers > 0, **shape)
  images = _images(16)
  _assert_close(_ours(folder, images), _theirs(_filled(model, tensors), images))


_HF = {
  "hidden_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "image_size": 16,
  "patch_size": 4,
  "num_channels": 3,
}


def _hugging_face(kind):
  transformers, torch_seed = _transformers(), torch.manual_seed(0)
  del torch_seed
  if kind == "vit":
    model = transformers.ViTModel(transformers.ViTConfig(intermediate_size=256, **_HF))
  elif kind == "dinov2":
    model = transformers.Dinov2Model(transformers.Dinov2Config(**_HF))
  else:
    config = transformers.Dinov2WithRegistersConfig(num_register_tokens=3, **_HF)
    model = transformers.Dinov2WithRegistersModel(config)
  with torch.no_grad():
    for parameter in model.parameters():  # also those that start at zero or one
      parameter.add_(0.1 * torch.randn(parameter.shape))
  return model.eval()


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers"])
def test_hugging_faces_transformers_are_the_originals(tmp_path, kind):
  model = _hugging_face(kind)
  model.save_pretrained(tmp_path / "hf")
  options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
  for size in (16, 12, 24):
    convert.bring_in(tmp_path / "hf", tmp_path / "out", image_size=size, overwrite=True)
    images = _images(size)
    theirs = _theirs(None, images, lambda x: model(x, **options).last_hidden_state[:, 0])
    _assert_close(_ours(tmp_path / "out", images), theirs)


def test_epsilon_of_hugging_faces_vit_is_kept(tmp_path):
  _hugging_face("vit").save_pretrained(tmp_path / "hf")
  convert.bring_in(tmp_path / "hf", tmp_path / "out")
  assert export.read(tmp_path / "out")[1]["model"]["norm_eps"] == 1e-12
  config = tmp_path / "hf" / "config.json"
  config.write_text(config.read_text().replace("1e-12", "0.5"))
  convert.bring_in(tmp_path / "hf", tmp_path / "other")
  images = _images(16)
  there, here = (_ours(tmp_path / name, images) for name in ("other", "out"))
  assert np.abs(there - here).max() > 1e-2


@pytest.mark.parametrize("registers, scaled", [(0, False), (0, True), (3, True), (3, False)])
def test_automodel_loads_what_goes_out_with_nothing_missing(tmp_path, registers, scaled):
  transformers = _transformers()
  folder = _brought_in(tmp_path, layouts.vit(registers=registers, scaled=scaled, **_DINO))
  convert.take_out(folder, tmp_path / "hf", "hf")
  model, loading = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
  assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  images, ours = _images(16), _ours(folder, _images(16))
  model.eval()
  _assert_close(ours, _theirs(None, images, lambda x: model(x).last_hidden_state[:, 0]))
  _assert_close(ours, _theirs(None, images, lambda x: model(x).pooler_output))


def test_heads_registers_and_epsilon_come_back_from_hugging_face(tmp_path):
  folder = _brought_in(tmp_path, layouts.vit(registers=3, scaled=True, **_DINO), heads=4)
  convert.take_out(folder, tmp_path / "hf", "hf")
  convert.bring_in(tmp_path / "hf", tmp_path / "back")
  (before, info), (after, info_after) = (export.read(p) for p in (folder, tmp_path / "back"))
  assert info["model"] == info_after["model"] and before.keys() == after.keys()
  for name in before:
    np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("bottleneck, padding", [(False, None), (True, None), (False, 2)])
def test_resnets_are_the_originals_both_ways(tmp_path, bottleneck, padding):
  tensors = layouts.resnet(bottleneck=bottleneck, stem=7 if padding is None else 3)
  model = _filled(torch_models.ResNet(bottleneck, padding), tensors)
  folder = _brought_in(
    tmp_path, layouts.prefixed("module.", tensors), stem=None if padding is None else "cifar_pad2"
  )
  images = _images(32 if padding else 64)
  _assert_close(_ours(folder, images), _theirs(model, images))
  convert.take_out(folder, tmp_path / "timm", "timm")
  back = safetensors.numpy.load_file(tmp_path / "timm" / "model.safetensors")
  again = torch_models.ResNet(bottleneck, padding)
  again.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()})
  np.testing.assert_array_equal(_theirs(again.eval(), images), _theirs(model, images))


def test_swavs_head_is_the_original(tmp_path):
  head = torch_models.SwavHead(512, 32, 16)
  with torch.no_grad():
    head.projection_head[1].running_mean.normal_()
  backbone = layouts.resnet(stem=3)
  tensors = backbone | {k: v.numpy() for k, v in head.state_dict().items()}
  tensors["prototypes.weight"] = np.ones((5, 16), np.float32)
  folder = _brought_in(tmp_path, layouts.prefixed("module.", tensors), stem="cifar")
  model, images = _filled(torch_models.ResNet(padding=1), backbone), _images(16)
  theirs = _theirs(None, images, lambda x: head.eval()(model(x)))
  _assert_close(_ours(folder, images, head=True), theirs)
