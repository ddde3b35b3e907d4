"""Pictures of a run: the nearest images, the views of the first step, and the page with them."""

import base64
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from sklearn import neighbors

from protojax import api, errors, loading, pretrained, report, resolving
from protojax.data import augment, decoding, sources
from protojax.reports import gallery, of_run
from protojax.reports import record as records
from protojax.training import loop, workdir

pytestmark = pytest.mark.xdist_group("train")  # one worker: they share `finished_run`

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(finished_run):
  return finished_run


@pytest.fixture(scope="module")
def model(run):
  return loading.load(str(run))


@pytest.fixture
def kept(monkeypatch):
  """(array, text) of every picture, before it is encoded."""
  pictures, encode = [], gallery._picture

  def keep(image, text):
    pictures.append((image, text))
    return encode(image, text)

  monkeypatch.setattr(gallery, "_picture", keep)
  return pictures


def test_training_ends_with_the_page_and_names_it(run):
  page = (run / "report.html").read_text()
  last = (run / "train.log").read_text().splitlines()[-1]
  assert last.endswith(f"report    {run / 'report.html'}")
  assert page.count("data:image/webp") > 100 and len(page) < 2e6
  assert "Left out" not in page
  assert "report.html" in workdir._OURS and not list(run.glob("*.tmp"))


def test_a_finished_run_without_its_page_gets_it(run, tmp_path):
  folder = shutil.copytree(run, tmp_path / "run")
  (folder / "report.html").unlink()
  api.train(tiny.run_config(), str(folder))
  assert (folder / "report.html").stat().st_size > 10_000


def test_cards_hold_the_nearest_images_and_the_counts_of_the_result(run, model, kept):
  arrays = records.read([run])[0].arrays
  bank = sources.build("digits", split="train")
  found = gallery._prototypes(model, bank, arrays, 100)
  order = np.arange(100) * len(bank) // 100  # evenly spread
  embeddings = pretrained.encoded(model, bank, parts=("embeddings",))["embeddings"]["prototypes"][
    order
  ]
  search = neighbors.NearestNeighbors(metric="cosine").fit(embeddings)
  pictures = iter(kept)
  codes = pretrained.encoded(model, bank, parts=("codes",), limit=64)["codes"]["prototypes"]
  labels = bank.labels[np.arange(64) * len(bank) // 64]
  for cards in found.kinds.values():
    for card in cards:
      distance, nearest = search.kneighbors(model.prototypes["prototypes"][[card.number]], 8)
      for far, row in zip(distance[0], nearest[0], strict=True):
        image, text = next(pictures)
        assert float(text.split("cosine ")[1]) == pytest.approx(1 - far, abs=2e-3)
        if far < distance[0][-1] - 1e-4:  # equally near ones may come in any order
          assert (
            text.startswith(bank.class_names[bank.labels[order[row]]])
            or np.isclose(distance[0], far, atol=1e-4).sum() > 1
          )
      own = labels[codes == card.number]
      assert card.count == len(own)
      if len(own):
        assert card.purity == pytest.approx(np.bincount(own).max() / len(own))
        assert int(card.majority) == np.bincount(own).argmax()
  numbers = [card.number for cards in found.kinds.values() for card in cards]
  assert len(set(numbers)) == len(numbers)
  assert "100 evenly spread images of digits/train (1,442 images)" in found.how


def test_kinds_of_prototypes_are_by_use():
  usage = np.array([0, 9, 3, 3, 0, 50, 7, 1, 2, 0])
  chosen = gallery._chosen(usage)
  assert list(chosen)[0] == "Most used" and chosen["Most used"] == [5, 1, 6, 2, 3, 8]
  assert list(chosen)[-1] == "Least used (3 of 10 dead)"
  assert chosen["Least used (3 of 10 dead)"][:3] == [9, 4, 0]
  everything = [k for group in chosen.values() for k in group]
  assert sorted(everything) == sorted(set(everything)) == list(range(10))
  many = gallery._chosen(np.arange(100))
  assert many["Median of the used"] == [53, 52, 51, 50, 49, 48]
  assert gallery._chosen(np.zeros(3, int)) == {"Least used (3 of 3 dead)": [2, 1, 0]}


def test_views_are_the_very_ones_of_the_first_step(run, kept):
  data = sources.build("digits", split="train")
  config = resolving.resolve(tiny.run_config(), len(data))
  gallery._views(config, data)
  program = loop.programs.Program(config)
  key = jax.jit(lambda seed: program.init(seed).key)(config.seed)
  stream = program.batches(
    data, seed=config.seed, step=0, batch_size=16, keys=("image", "size", "index")
  )
  batch, _, _ = next(stream)
  stream.close()
  key, _ = jax.random.split(jax.random.fold_in(key, 0))  # as in train_step
  views = jax.device_get(jax.jit(augment.make(config.augment))(key, batch))
  pictures = iter(kept)
  for i in range(4):
    image, text = next(pictures)
    np.testing.assert_array_equal(image, batch["image"][i])
    assert text == f"digits/train, image {batch['index'][i]}"
    for kind in ("global", "local"):
      for view in views[kind][i]:
        image, text = next(pictures)
        assert text.startswith(kind) and text.endswith(f"{len(view)} px")
        np.testing.assert_allclose(image / 255, (0.5 * view + 0.5).clip(0, 1), atol=0.004)
  assert next(pictures, None) is None


def test_attention_has_the_image_the_mean_and_every_head(model, kept):
  bank = sources.build("digits", split="train")
  rows = gallery._attention(model, bank)
  heads = model.config.model.heads
  assert [len(row) for row in rows] == [2 + heads] * 6
  wanted = np.arange(6) * len(bank) // 6
  images = np.stack([bank[i]["image"] for i in wanted])
  maps = pretrained.attention(model, images)
  assert rows[1][0].text == bank.class_names[bank.labels[wanted[1]]]
  assert rows[1][3].text == f"head 2, up to {maps[1, 1].max():.2f}"
  # The image is the one that is evaluated, of 16 px here; a map is brightest where it is largest.
  assert kept[0][0].shape == (16, 16, 3)
  heat = gallery._heat(np.zeros((8, 8, 3), np.uint8), np.eye(4)[:1].repeat(4, 0)).astype(int)
  assert heat[:, :20].sum() > 2 * heat[:, -20:].sum()


def test_residual_network_and_method_without_prototypes_say_so(model):
  config = model.config.copy_and_resolve_references()
  config.model.name = "resnet18"
  bare = model._replace(prototypes={}, config=config)
  bank = sources.build("digits", split="train")
  found = gallery.collect(bare, config, bank=bank, train=errors.UserError("gone"), arrays={})
  assert found.prototypes == "dino has no prototypes."
  assert found.attention == "resnet18 has no attention."
  assert found.views == "gone."


def test_run_whose_images_are_gone_keeps_its_numbers(run, tmp_path, capsys):
  folder = shutil.copytree(run, tmp_path / "moved")
  config = json.loads((folder / "config.json").read_text())
  for section in ("data", "probe"):
    config[section] |= {"name": "folder", "data_dir": str(tmp_path / "gone")}
  (folder / "config.json").write_text(json.dumps(config))
  report.main([f"--workdir={folder}", f"--out={tmp_path / 'page.html'}"])
  page = (tmp_path / "page.html").read_text()
  assert "data:image" not in page and page.count("Left out: data_dir=") == 3
  assert 'data-key="probe/knn"' in page and "page.html: 1 run, 0." in capsys.readouterr().out


def test_arrays_of_another_state_are_not_shown_with_this_one(run, tmp_path):
  folder = shutil.copytree(run, tmp_path / "other")
  file = folder / "eval" / "final" / "result.json"
  result = json.loads(file.read_text())
  result["measures"]["step"] = 3
  file.write_text(json.dumps(result))
  found = of_run.pictures(records.read([folder])[0], 10)
  assert "not known before the run ends" in found.prototypes and len(found.views) == 4


def test_pictures_are_small_webp_that_show_the_image():
  image = np.zeros((300, 200, 3), np.uint8)
  image[:150, :, 0] = 255
  picture = gallery._picture(image, "half")
  data = base64.b64decode(picture.uri.removeprefix("data:image/webp;base64,"))
  shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
  assert shown.shape == (96, 64, 3) and not picture.tiny and len(data) < 4000
  assert shown[:40, :, 0].min() > 200 and shown[60:, :, 0].max() < 60


@pytest.mark.parametrize(
  ("size", "shape"), [((20, 60), (13, 40)), ((20, 30), (20, 30)), ((40, 40), (40, 40))]
)
def test_an_image_beside_its_views_has_its_shape_and_no_margin(size, shape):
  image = np.random.default_rng(0).integers(100, 256, (*size, 3), np.uint8)
  shown = gallery._as_it_was(decoding.store(image, size, 40), size)
  assert shown.shape == (*shape, 3) and shown.min() > 50
