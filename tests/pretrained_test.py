"""A run and its exported weights give the same features, of every layer."""

import functools
import json
import pathlib
import re
import shutil

import foreign_layouts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch_format
from sklearn import neighbors

import protojax
from protojax import config as configs
from protojax import errors, loading, pretrained, trees
from protojax.data import augment, pipeline, sources
from protojax.models import encoder as encoders
from protojax.models import features as backbone_layers
from protojax.training import export, loop, programs, sharding

pytestmark = pytest.mark.xdist_group("pretrained")  # one worker: its tests share a costly fixture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("trained") / "run"
  config = configs.debug(configs.default("dino"))
  config.update({"num_steps": 3, "save_every": 2, "batch_size": 16})
  config.method.update({"num_prototypes": 32, "prototypes": "learned"})
  config.model.update({"depth": 4, "registers": 2})
  config.probe.crop = 0.875
  loop.run(config, str(folder))
  return folder


@pytest.fixture(scope="module")
def model(run):
  """Of the run; what its tests compile is kept with it."""
  return protojax.load(run)


def test_a_run_gives_what_its_training_measured(run, model):
  assert (model.kind, model.step, model.weights) == ("run", 3, "teacher")
  bank = pretrained.source(model, "train")
  got = pretrained.encoded(model, bank, parts=("features", "codes", "embeddings"), limit=100)
  assert got["features"]["last"].shape == (100, 96) and got["codes"]["prototypes"].max() < 32
  np.testing.assert_array_equal(got["label"], bank.labels[got["index"]])
  scores = got["embeddings"]["prototypes"] @ model.prototypes["prototypes"].T
  np.testing.assert_array_equal(scores.argmax(axis=1), got["codes"]["prototypes"])
  result = json.loads((run / "eval" / "final" / "result.json").read_text())["measures"]
  codes = pretrained.encoded(model, bank, parts=("codes",), limit=512)["codes"]["prototypes"]
  assert np.unique(codes).size / 32 == pytest.approx(result["collapse/used"])


def test_a_model_prints_as_one_line(model):
  line = repr(model)
  assert len(line.splitlines()) == 1 and len(line) < 300
  assert model.config.model.name in line and "prototypes {'prototypes': '" in line


def test_arrays_of_images_are_seen_as_the_pipeline_sees_them(model):
  """Whatever their size, library and number: equal to `encoded` of the same images as a source."""
  rng = np.random.default_rng(0)
  for height, width, count in ((32, 32, 3), (20, 27, 5)):
    images = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    source = sources.Source(
      "same", np.arange(count), functools.partial(sources.read_items, images, np.zeros(count))
    )
    want = pretrained.encoded(model, source, parts=("features", "codes"), layers=("last", "last4"))
    features = model.features(images)
    assert features.shape == (count, 96) and features.dtype == np.float32
    np.testing.assert_allclose(features, want["features"]["last"], atol=1e-5)
    np.testing.assert_allclose(
      model.features(images, layer="last4"), want["features"]["last4"], atol=1e-5
    )
    for given in (images, jnp.asarray(images), _OnlyDLPack(images)):
      codes = model.codes(given)["prototypes"]
      np.testing.assert_array_equal(codes, want["codes"]["prototypes"])
    assert codes.dtype == np.int32


def test_an_image_that_is_not_square_keeps_its_aspect(model):
  """As in training, whose evaluation transform takes the size that the image had on the disk."""
  images = np.random.default_rng(0).integers(0, 256, (4, 20, 40, 3), np.uint8)
  source = sources.Source(
    "wide", np.arange(4), functools.partial(sources.read_items, images, np.zeros(4))
  )
  got = pretrained.encoded(model, source)["features"]["last"]
  host = next(pipeline.sequential(source, batch_size=4, image_size=model.config.data.image_size))
  np.testing.assert_array_equal(host["size"], [[20, 40]] * 4)
  batch = {name: jnp.asarray(host[name]) for name in ("image", "size")}
  program = programs.Program(model.config, devices=jax.devices()[:1])

  def features(images):
    return backbone_layers.features(
      model.encoder, model.params, model.batch_stats, images, ("last",)
    )["last"]

  np.testing.assert_allclose(got, features(program.evaluation(batch)), atol=1e-5)
  squashed = program.evaluation({**batch, "size": jnp.full((4, 2), 32)})
  assert np.abs(got - features(squashed)).max() > 1e-2


def test_batches_of_one_size_are_compiled_once(model, monkeypatch):
  images = np.zeros((4, 32, 32, 3), np.uint8)
  before = model.features(images)
  monkeypatch.setattr(augment, "evaluate", None)  # a second trace would call it
  assert np.abs(model.features(images + 99) - before).max() > 1e-3
  assert model.features(images[:3]).shape == (3, 96)


class _OnlyDLPack:
  """An array of a library that is not imported here."""

  def __init__(self, array):
    self._array = array

  def __dlpack__(self, **options):
    return self._array.__dlpack__(**options)

  def __dlpack_device__(self):
    return self._array.__dlpack_device__()


@pytest.mark.parametrize(
  ("images", "words"),
  [
    (np.zeros((2, 8, 8, 3), np.float32), r"images are float32 \[2, 8, 8, 3\]: .* not normalised"),
    (np.zeros((8, 8, 3), np.uint8), r"uint8 \[8, 8, 3\]: a model takes uint8 \[N, H, W, 3\]"),
    (np.zeros((2, 3, 8, 8), np.uint8), "move the channels last"),
    (np.zeros((0, 8, 8, 3), np.uint8), r"uint8 \[0, 8, 8, 3\]"),
    ("cat.png", "a model takes"),
  ],
)
def test_other_images_are_refused_in_one_line(model, images, words):
  for call in (model.features, model.codes):
    with pytest.raises(errors.UserError, match=words) as caught:
      call(images)
    assert "\n" not in str(caught.value)


def test_the_program_in_the_readme_runs(run, tmp_path, monkeypatch):
  page = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
  (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  rng = np.random.default_rng(0)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "gmm").symlink_to(run)
  head = foreign_layouts.head(prototypes=64)
  torch_format.save(tmp_path / "checkpoint.pth", {"teacher": head})
  monkeypatch.chdir(tmp_path)
  names = {
    "jax": jax,
    "teacher_features": rng.normal(size=(32, 256)).astype(np.float32),
    "prototypes": rng.normal(size=(64, 16)),
    "embeddings": rng.normal(size=(100, 16)),
    "images": rng.integers(0, 256, (3, 32, 32, 3), np.uint8),
  }
  exec(block, names)
  assert names["state"].means.shape == (1024, 256)
  assert names["measures"]["collapse/unique_0.025"] == 1.0
  assert names["features"].shape == (3, 96) and names["codes"].shape == (3,)


def test_the_programs_on_the_page_about_own_code_run(run, model, tmp_path, monkeypatch):
  page = (pathlib.Path(__file__).parents[1] / "docs" / "own_code.md").read_text()
  blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "gmm").symlink_to(run)
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
  names = {"images": images, "labels": np.arange(8) % 10}
  features = model.features(images)
  features[5] = 2 * features[3] + 0.3 * features[5]
  files = np.array([f"cats/{i}.jpg" for i in (4, 5, 6, 7, 8, 9, 10, 11)])
  np.savez(tmp_path / "runs" / "features.npz", features=features, filename=files)
  for block in blocks:
    exec(block, names)
  nearest = neighbors.NearestNeighbors(n_neighbors=8, metric="cosine").fit(features)
  np.testing.assert_array_equal(names["similar"], nearest.kneighbors(features[3:4])[1][0, 1:])
  assert names["similar"][0] == 5
  np.testing.assert_allclose(names["found"], model.features(images), atol=1e-4)
  assert names["losses"][-1] < names["losses"][0]  # the classifier and the encoder have learned
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), names["trained"]["encoder"], model.params["backbone"]
  )
  assert max(jax.tree.leaves(moved)) > 0
  assert names["nearest"].shape == (8, 3) and names["state"].means.shape == (64, 64)


def test_patches_and_embeddings_of_images_in_memory(model):
  """The grid is that of the image: a patch changed in one corner moves that corner most."""
  images = np.full((1, 32, 32, 3), 128, np.uint8)
  before = model.patches(images, layer="block1")
  assert before.shape == (1, 4, 4, 96) and model.patches(images).shape == before.shape
  images[:, 24:, 10:15] = 255  # lower left; the transform enlarges the middle by 8 / 7
  moved = np.abs(model.patches(images, layer="block1") - before).sum(axis=-1)[0]
  row, column = np.unravel_index(moved.argmax(), moved.shape)
  assert (row, column) == (3, 1)
  z = model.embeddings(images)["prototypes"]
  scores = z @ model.prototypes["prototypes"].T
  np.testing.assert_array_equal(scores.argmax(axis=1), model.codes(images)["prototypes"])
  assert model.features(images, layer="block4").shape == (1, 96)


def test_an_earlier_checkpoint_can_be_chosen(run, model):
  earlier = loading.load(str(run), step=2)
  assert earlier.step == 2
  last = model.params["backbone"]["cls_token"]
  assert not np.array_equal(earlier.params["backbone"]["cls_token"], last)
  with pytest.raises(errors.UserError, match="no checkpoint 1 in .*: there are 3, 2"):
    loading.load(str(run), step=1)


@pytest.mark.parametrize("file", ["", "encoder.safetensors"])
def test_exported_weights_give_the_features_of_their_run(run, model, file):
  exported = loading.load(str(run / "exported" / file))
  assert (exported.kind, exported.step, exported.weights) == ("encoder", 3, "teacher")
  bank = pretrained.source(model, "train")
  names = pretrained.layers(model)
  assert names == pretrained.layers(exported) == ("last", "last4", "last_avg", "last4_avg")
  a, b = (pretrained.encoded(m, bank, layers=names, limit=40) for m in (model, exported))
  for name in names:
    np.testing.assert_allclose(b["features"][name], a["features"][name], rtol=1e-5, atol=1e-5)
  parts = ("codes", "embeddings")
  a, b = (pretrained.encoded(m, bank, parts=parts, limit=40) for m in (model, exported))
  for one, other in ((a["embeddings"], b["embeddings"]), (model.prototypes, exported.prototypes)):
    np.testing.assert_allclose(other["prototypes"], one["prototypes"], rtol=1e-5, atol=1e-5)
  assert np.mean(a["codes"]["prototypes"] == b["codes"]["prototypes"]) > 0.95  # but for ties
  with pytest.raises(errors.UserError, match="does not say which images.*data="):
    pretrained.source(exported, "train")


def test_prototypes_are_read_from_their_file_if_it_is_of_these_weights(run, model, tmp_path):
  images = np.zeros((1, 8, 8, 3), np.uint8)
  there = json.loads((run / "exported" / "config.json").read_text())["prototypes"]
  expected = {"num": 32, "dim": 64, "tokens": "class", "place": "as_is", "scale": 1.0}
  assert there == {"prototypes": expected}
  plain = safetensors.numpy.load_file(run / "exported" / "prototypes.safetensors")
  rows = model.prototypes["prototypes"]
  np.testing.assert_allclose(plain["prototypes"], rows, atol=1e-6)
  for name in ("older", "other", "damaged"):
    shutil.copytree(run / "exported", tmp_path / name)
  (tmp_path / "older" / "prototypes.safetensors").unlink()
  tensors, info = export.read(run / "exported")
  export.write(tmp_path / "other", trees.nested(tensors), {**info, "step": 4})
  for name in ("older", "other"):
    bare = protojax.load(tmp_path / name)
    assert bare.prototypes == {} and bare.features(images).shape == (1, 96)
    with pytest.raises(errors.UserError, match="has no prototypes: .*prototypes.safetensors"):
      bare.codes(images)
  (tmp_path / "damaged" / "prototypes.safetensors").write_bytes(b"\0" * 40)
  with pytest.raises(errors.UserError, match="prototypes.safetensors is damaged"):
    protojax.load(tmp_path / "damaged")


def test_layers_are_the_blocks_own_tokens():
  """Against the module itself: fewer blocks give the earlier tokens."""
  c = tiny.config(model__depth=4, model__registers=1)
  net = encoders.build(c)
  params, stats = encoders.init(net, jax.random.key(0), 16)
  images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
  names = ("last", "last4", "last4_avg", "block2")
  out = backbone_layers.features(net, params, stats, images, names)
  maps = backbone_layers.patches(net, params, stats, images, ("last", "block1"))
  tokens = []
  for depth in (1, 2, 3, 4):
    shallow = net.backbone.clone(depth=depth)
    blocks = {f"blocks_{i}" for i in range(depth, 4)}
    kept = {k: v for k, v in params["backbone"].items() if k not in blocks}
    tokens.append(shallow.apply({"params": kept}, images, patches=True))
  expected = np.concatenate([cls for cls, _ in tokens], axis=1)
  np.testing.assert_allclose(out["last4"], expected, atol=1e-5)
  np.testing.assert_allclose(out["last"], tokens[-1][0], atol=1e-5)
  np.testing.assert_allclose(out["block2"], tokens[1][0], atol=1e-5)
  for name, (_, expected_patches) in (("block1", tokens[0]), ("last", tokens[-1])):
    assert maps[name].shape == (3, 2, 2, 32)
    np.testing.assert_allclose(maps[name].reshape(3, 4, 32), expected_patches, atol=1e-5)
  mean = tokens[-1][1].mean(axis=1)
  np.testing.assert_allclose(out["last4_avg"], np.concatenate([expected, mean], 1), atol=1e-5)
  with pytest.raises(errors.UserError, match="layer 'last2' is unknown: this encoder has last,"):
    backbone_layers.features(net, params, stats, images, ("last2",))
  with pytest.raises(
    errors.UserError, match="layer of patches 'last4' is unknown: .* last, block1"
  ):
    backbone_layers.patches(net, params, stats, images, ("last4",))


def test_attention_is_the_softmax_that_the_block_computes():
  """Weights recomputed here make the block's attention output from its values."""
  c = tiny.config(model__registers=1)
  net = encoders.build(c)
  params, _ = encoders.init(net, jax.random.key(0), 16)
  params["backbone"]["blocks_0"]["attn"]["qkv"]["kernel"] *= 20.0  # else all weights are alike
  images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
  maps = np.asarray(backbone_layers.attention(net, params, images))
  assert maps.shape == (3, 2, 2, 2) and maps.min() > 0 and (maps.sum((2, 3)) < 1).all()
  _, seen = net.backbone.apply(
    {"params": params["backbone"]}, images, capture_intermediates=True, mutable="intermediates"
  )
  block = seen["intermediates"]["blocks_0"]
  x = np.asarray(block["norm1"]["__call__"][0], np.float64)
  weights = params["backbone"]["blocks_0"]["attn"]["qkv"]
  qkv = (x @ np.float64(weights["kernel"]) + weights["bias"][None, None]).reshape(3, -1, 3, 2, 16)
  logits = np.einsum("nhd,nthd->nht", qkv[:, 0, 0], qkv[:, :, 1]) / 4.0
  expected = np.exp(logits - logits.max(axis=2, keepdims=True))
  expected /= expected.sum(axis=2, keepdims=True)
  np.testing.assert_allclose(maps.reshape(3, 2, 4), expected[:, :, 2:], atol=1e-5)
  assert maps.std() > 1e-3


def test_a_resnet_has_one_layer_and_no_attention():
  c = tiny.config(
    "barlow_twins", "none", model__name="resnet8", augment__num_local=0, head__l2=False
  )
  net = encoders.build(c)
  params, stats = encoders.init(net, jax.random.key(0), 16)
  assert backbone_layers.available(net) == ("last",)
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  with pytest.raises(errors.UserError, match="attention maps need a vision transformer"):
    backbone_layers.attention(net, params, images)
  with pytest.raises(errors.UserError, match="a resnet8 gives features of its last layer only"):
    backbone_layers.patches(net, params, stats, images)


def test_stages_of_a_resnet_are_its_blocks_own_outputs():
  """The mean of the last map is the feature; the first stage is the stem and the first blocks."""
  c = tiny.config(
    "barlow_twins", "none", model__name="resnet18", augment__num_local=0, head__l2=False
  )
  net = encoders.build(c)
  params, stats = jax.jit(lambda k: encoders.init(net, k, 16))(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  assert backbone_layers.single(net) == ("stage1", "stage2", "stage3", "stage4")

  @jax.jit
  def both(images):
    names = ("last", "stage1", "stage4")
    return (
      backbone_layers.patches(net, params, stats, images, names),
      backbone_layers.features(net, params, stats, images, names),
      encoders.features(net, params, stats, images),
    )

  maps, pooled, last = both(images)
  assert maps["stage1"].shape == (2, 4, 4, 64) and maps["stage4"].shape == (2, 1, 1, 512)
  np.testing.assert_allclose(pooled["last"], last, atol=1e-5)
  np.testing.assert_allclose(pooled["stage1"], maps["stage1"].mean(axis=(1, 2)), atol=1e-6)
  np.testing.assert_array_equal(maps["last"], maps["stage4"])


def test_what_is_no_run_is_refused_in_one_line(run, tmp_path):
  def message(path, **options):
    with pytest.raises(errors.UserError) as caught:
      loading.load(str(path), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)

  assert "there is no" in message(tmp_path / "nothing")
  assert "there is no encoder.safetensors" in message(tmp_path)
  assert "is no run" in message(run / "exported", step=2)
  bare = tmp_path / "bare"
  shutil.copytree(run, bare)
  shutil.rmtree(bare / "checkpoints")
  assert "holds no checkpoint yet" in message(bare)
  (bare / "config.json").write_text("{")
  assert "config.json cannot be read" in message(bare)
  tensors, info = export.read(run / "exported")
  tree = {"params": {"backbone": {"norm": {"scale": np.ones(3)}}}}
  export.write(tmp_path / "other", tree, info)
  assert "not of the model described beside them" in message(tmp_path / "other")


def test_features_do_not_depend_on_the_number_of_devices(model):
  alone = model._replace(mesh=sharding.make_mesh(devices=jax.devices()[:1]))
  alone = alone._replace(
    **{
      k: jax.device_put(jax.device_get(getattr(model, k)), sharding.replicated(alone.mesh))
      for k in ("params", "batch_stats")
    }
  )
  bank = pretrained.source(model, "test")
  a, b = (pretrained.encoded(m, bank, limit=30, batch_size=7) for m in (model, alone))
  np.testing.assert_allclose(a["features"]["last"], b["features"]["last"], atol=1e-5)
  np.testing.assert_array_equal(a["index"], b["index"])
