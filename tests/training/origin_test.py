"""Which settings belong to the weights that a run starts from."""

import re

import foreign_layouts as layouts
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from protojax import convert, errors, main, plan, resolving, typed
from protojax.models import encoder as encoders
from protojax.training import export, origin, programs

_BACKBONE = {"width": 96, "patch": 14, "registers": 4, "scaled": True}
_NEEDED = {
  "model.name": "vit",
  "model.width": 96,
  "model.depth": 2,
  "model.heads": 4,
  "model.patch_size": 14,
  "model.image_size": 28,
  "model.registers": 4,
  "model.layer_scale": 1e-5,
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """What `convert` makes of a backbone with registers, and of a network of DINO with its head."""
  folder = tmp_path_factory.mktemp("origin")
  full = layouts.vit() | layouts.prefixed("head.", layouts.head())
  for name, tensors, heads in (("backbone", layouts.vit(**_BACKBONE), 4), ("full", full, None)):
    safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")
    convert.bring_in(folder / f"{name}.safetensors", folder / name, heads=heads)
  return folder


def _fits(config):
  """The refusal of a resolved config, None without."""
  try:
    origin.require_same(config)
  except errors.UserError as error:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize("name", ["backbone", "full"])
def test_the_settings_that_a_refusal_lists_are_all_that_is_needed(converted, name):
  flags = [f"--config.init_from={converted / name}"]
  refused = _fits(resolving.resolve(typed.config("quickstart", typed.split(flags)[0]), 1000))
  flags += [f"--{flag}" for flag in re.findall(r"config\.(?!init_from)\S+", refused)]
  if name == "backbone":  # whole patches
    flags += ["--config.augment.global_size=28", "--config.augment.local_size=14"]
  config = resolving.resolve(typed.config("quickstart", typed.split(flags)[0]), 1000)
  assert _fits(config) is None


def test_a_command_line_takes_the_encoder_over(converted, caplog):
  """With the mean of its images and views of whole patches; the refusal names the same settings."""
  flags = ["--config=gmm_photos", "--workdir=x", f"--config.init_from={converted / 'backbone'}"]
  with caplog.at_level("INFO"):
    config, _ = main.parse(flags)
  expected = {key: config[key.split(".")[0]][key.split(".")[1]] for key in _NEEDED}
  assert expected == _NEEDED and "brings its encoder along: model.name=vit, " in caplog.text
  assert (config.augment.global_size, config.augment.local_size) == (70, 28)
  assert config.head.hidden == 512  # fresh: a backbone has none
  assert _fits(resolving.resolve(config, 1000)) is None
  planned, _ = plan.parse(flags[::2])
  assert planned.model.width == 96
  given = ["--config.augment.mean=(.5,.5,.5)", "--config.model.heads=2", "--config.head.hidden=9"]
  config, _ = main.parse([*flags, *given])
  assert config.augment.mean == (0.5, 0.5, 0.5) and config.model.heads == 2
  assert "; give config.model.heads=4" in _fits(resolving.resolve(config, 1000))
  config, _ = main.parse([*flags[:2], f"--config.init_from={converted / 'full'}"])
  assert (config.head.hidden, config.head.bottleneck, config.head.norm) == (32, 16, "none")


def test_weights_that_fit_but_are_read_by_other_heads_are_refused(converted):
  config = tiny.config(init_from=str(converted / "full"), head__layers=3)
  info = export.describe(converted / "full")
  for key, value in origin.differences(config, info).items():
    section, name = key.split(".")
    config[section][name] = value
  assert _fits(config) is None
  config.model.heads = 4
  assert _fits(config).endswith("than this run's; give config.model.heads=1")
  config.update({"model": {"heads": 1}, "head": {"hidden": 8}})
  assert (
    "(protojax convert --no_head leaves the head out, so that a run has its own); give config.hea"
    in _fits(config)
  )


def test_our_own_weights_lose_their_head_for_a_run_with_another(converted, tmp_path, capsys):
  whole, backbone = converted / "full", tmp_path / "backbone"
  convert.main([str(whole), str(backbone), "--no_head"])
  assert "a run that starts from this begins with a fresh one" in capsys.readouterr().out
  (kept, info), (every, _) = export.read(backbone), export.read(whole)
  gone = every.keys() - kept.keys()
  assert gone and gone == {name for name in every if ".head." in name}
  for name, tensor in kept.items():
    np.testing.assert_array_equal(tensor, every[name])
  changes = origin.differences(tiny.config(init_from=str(backbone)), info)
  own = {key.replace(".", "__"): value for key, value in changes.items()}
  config = tiny.config(init_from=str(backbone), **own)
  assert _fits(config) is None and config.head.hidden == tiny.config().head.hidden
  loaded = export.load(backbone, programs.Program(config).abstract.encoder)
  assert not jax.tree.leaves(loaded["head"]) and jax.tree.leaves(loaded["backbone"])
  with pytest.raises(errors.UserError, match="--no_head: format timm holds the backbone alone any"):
    convert.main([str(whole), str(tmp_path / "timm"), "--format=timm", "--no_head"])


def test_a_transformer_of_no_known_size_has_no_known_name(converted):
  assert export.describe(converted / "full")["model"]["name"] == "vit"
  with pytest.raises(errors.UserError, match="model.name=vit has no size of its own: set model"):
    encoders.build(tiny.config(model__name="vit", model__width=None))


def test_where_no_weights_are_is_said_with_what_was_looked_for(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  said = _fits(tiny.config(init_from="nosuch"))
  assert said.startswith(
    f"config.init_from=nosuch: there is no {tmp_path / 'nosuch'}: give the work"
  )
  for files, words in (
    ((), "give the workdir of a run"),
    (("env.json",), "saved nothing yet: wait"),
  ):
    for file in files:
      (tmp_path / file).write_text("{}")
    said = _fits(tiny.config(init_from=str(tmp_path)))
    assert f"neither encoder.safetensors nor exported/ is in {tmp_path}: " in said and words in said


def test_what_convert_wrote_for_others_is_called_that(converted, tmp_path):
  """Weights of timm come back by the command in the message; a compiled function has none."""
  convert.take_out(converted / "full", tmp_path / "timm", "timm")
  said = _fits(tiny.config(init_from=str(tmp_path / "timm")))
  assert said.startswith(
    f"config.init_from={tmp_path / 'timm'}: {tmp_path / 'timm'} holds model.saf"
  )
  assert f"protojax convert {tmp_path / 'timm'} OUT, and give OUT" in said
  with pytest.raises(
    errors.UserError, match="timm holds model.safetensors, weights for timm or Hug"
  ):
    export.read(tmp_path / "timm")
  convert.bring_in(tmp_path / "timm", tmp_path / "back")
  assert export.describe(tmp_path / "back")["model"] == export.describe(converted / "full")["model"]
  (tmp_path / "encoder.onnx").write_bytes(b"")
  said = _fits(tiny.config(init_from=str(tmp_path)))
  assert "holds encoder.onnx, a compiled function without weights: give the run it is of" in said
  (tmp_path / "back" / "encoder.safetensors").write_text(
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
  )
  assert "a pointer of Git LFS" in _fits(tiny.config(init_from=str(tmp_path / "back")))


def test_a_workdir_stands_for_what_it_has_exported(tmp_path):
  config = tiny.config(init_from=str(tmp_path))
  assert origin.path_of(config) == tmp_path
  (tmp_path / "exported").mkdir()
  assert origin.path_of(config) == tmp_path / "exported"
