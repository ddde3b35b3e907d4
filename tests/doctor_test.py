import json
import math
import shutil

import foreign_layouts
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch_format as made
from PIL import Image

from protojax import api, cli, convert, doctor, errors, loading, pretrained
from protojax.interop import tensor_files
from protojax.metrics import collapse
from protojax.training import checkpoint, export, programs, workdir

pytestmark = pytest.mark.xdist_group("doctor")  # one worker: its tests share a costly fixture

_RNG = np.random.default_rng(0)
_NO_NETWORK = "data=digits: .* holds one array and no network to encode images with: give embedd"


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _head(v):
  return {
    "head.last_layer.weight_g": np.ones((len(v), 1), np.float32),
    "head.last_layer.weight_v": v.astype(np.float32),
  }


@pytest.fixture(scope="module")
def collapsed():
  return np.tile(_RNG.normal(size=(30, 32)), (10, 1)) * _RNG.uniform(1, 3, (300, 1))


@pytest.fixture(scope="module")
def full(tmp_path_factory, collapsed):
  """A full checkpoint of DINO: the teacher's prototypes are copies, the student's are not."""
  path = tmp_path_factory.mktemp("doctor") / "full.pth"
  student = {f"module.{k}": v for k, v in _head(_RNG.normal(size=(300, 32))).items()}
  made.save(path, {"student": student, "teacher": _head(collapsed), "epoch": 3})
  return path


def _examined(tmp_path, *argv):
  doctor.main([*map(str, argv), f"--json={tmp_path / 'out.json'}"])
  return json.loads((tmp_path / "out.json").read_text())


def test_a_file_of_one_matrix_needs_no_name(tmp_path, collapsed):
  np.save(tmp_path / "mine.npy", collapsed)
  result = _examined(tmp_path, tmp_path / "mine.npy", "--rows=prototypes")
  assert result["sets"]["mine"]["unique"]["unique"][0] == 30
  np.save(tmp_path / "wide.npy", collapsed.T)
  result = _examined(tmp_path, tmp_path / "wide.npy", "--transpose")
  assert result["sets"]["wide"]["unique"]["unique"][0] == 30


def test_a_lone_matrix_is_not_judged_before_somebody_says_what_it_is(tmp_path, collapsed, capsys):
  """Features of images that lie close together are no collapsed prototypes."""
  np.save(tmp_path / "features.npy", collapsed)
  safetensors.numpy.save_file({"w": collapsed}, tmp_path / "one.safetensors")
  for name, flags, said in (
    ("features.npy", [], "does not apply: give --rows=prototypes to have them judged"),
    ("one.safetensors", [], "nothing in the file says"),
    ("features.npy", ["--rows=features"], "features of images are described only"),
  ):
    result = _examined(tmp_path, tmp_path / name, *flags)
    assert result["kind"] == "matrix" and (result["rows"], result["dim"]) == (300, 32)
    assert result["measures"]["collapse/rankme"] > 1
    shown = capsys.readouterr().out
    assert said in " ".join(shown.split()) and "collapse:" not in shown and "unique" not in shown
  described = api.diagnose(tmp_path / "features.npy")
  assert described.verdict is None and ": give rows=prototypes to have" in described.sentences[0]
  np.save(tmp_path / "zeros.npy", np.zeros((9, 4)))
  zeros = api.diagnose(tmp_path / "zeros.npy")
  assert zeros.sentences[0].startswith("all rows are zero") and "mean_cosine" not in str(zeros)
  np.save(tmp_path / "maps.npy", np.ones((3, 4, 5)))
  np.save(tmp_path / "codes.npy", np.arange(9))
  # A name that says so, and embeddings to compare with, say enough.
  for name in ("prototypes.npy", "my_prototypes.npy"):
    np.save(tmp_path / name, collapsed)
    assert api.diagnose(tmp_path / name).verdict.label == "partial prototype collapse"
  assert api.diagnose(tmp_path / "features.npy", embeddings=collapsed[:9]).verdict is not None
  for path, flags, words in (
    ("features.npy", ["--rows=protos"], "rows=protos is unknown"),
    ("features.npy", ["--rows=features", "--transpose"], "leave the other arguments out"),
    ("features.npy", ["--data=digits"], _NO_NETWORK),
    ("features.npy", ["--rows=prototypes", "--data=digits"], _NO_NETWORK),
    ("features.npy", ["--key=features", "--data=digits"], _NO_NETWORK),
    ("prototypes.npy", ["--data=digits"], _NO_NETWORK),
    ("maps.npy", [], r"an array of 3 dimensions, \[3, 4, 5\] of float64; prototypes are \[K, D\]"),
    (
      "codes.npy",
      [],
      r"an array of 1 dimension, \[9\] of int64; prototypes are \[K, D\] of float",
    ),
  ):
    with pytest.raises(errors.UserError, match=words):
      doctor.main([str(tmp_path / path), *flags])


def test_what_is_no_matrix_of_prototypes_is_refused_by_its_shape(tmp_path):
  for array, shown in (
    (np.arange(9), "[9] of int64"),
    (np.ones((8, 4), np.int32), "[8, 4] of int32"),
    (np.ones((1, 32), np.float32), "[1, 32] of float32"),
    (np.ones((0, 32), np.float32), "[0, 32] of float32"),
  ):
    np.save(tmp_path / "mine.npy", array)
    for flags in ([], ["--rows=prototypes"]):
      with pytest.raises(errors.UserError) as caught:
        doctor.main([str(tmp_path / "mine.npy"), *flags])
      said = str(caught.value)
      assert f"{shown}; prototypes are [K, D] of floating point numbers, at least two" in said
      assert "key=" not in said


def test_a_guess_of_one_letter_is_no_guess(tmp_path):
  np.savez(tmp_path / "x.npz", a=np.eye(4), b=np.eye(5))
  with pytest.raises(errors.UserError, match="key=protos: no such array in this file"):
    doctor.main([str(tmp_path / "x.npz"), "--key=protos"])


def test_images_of_a_divided_folder_are_those_of_its_train_split(foreign, tmp_path, capsys):
  for split, count in (("train", 6), ("val", 3)):
    for i in range(count):
      path = tmp_path / "images" / split / f"class{i % 2}" / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (16, 16), (40 * i, 0, 9)).save(path)
  flags = [str(foreign), "--data=folder", f"--data_dir={tmp_path / 'images'}"]
  for more, expected in (
    ([], f"{tmp_path / 'images' / 'train'}, 6 of 6"),
    (["--split=val"], f"{tmp_path / 'images' / 'val'}, 3 of 3"),
  ):
    doctor.main([*flags, *more])
    assert expected in capsys.readouterr().out
  shutil.rmtree(tmp_path / "images" / "val")
  flags[-1] = f"--data_dir={tmp_path / 'images' / 'train'}"  # not divided
  doctor.main(flags)
  assert "6 of 6" in capsys.readouterr().out


def test_prototypes_found_by_name_are_transposed_too(tmp_path, collapsed, capsys):
  """Stored [D, K], as nothing but the number of rows hints."""
  path = tmp_path / "turned.safetensors"
  turned = np.ascontiguousarray(collapsed.T.astype(np.float32))
  safetensors.numpy.save_file({"module.prototypes.weight": turned}, path)
  (one,) = _examined(tmp_path, path, "--transpose")["sets"].values()
  assert (one["num"], one["dim"], one["unique"]["unique"][0]) == (300, 32, 30)
  assert "leave --transpose" not in capsys.readouterr().out
  doctor.main([str(path)])
  said = " ".join(capsys.readouterr().out.split())
  assert "fewer rows than columns, 32 and 300: if they are stored [D, K], give --transpose" in said
  asked = api.diagnose(path).sentences[-1]
  assert "give transpose=True: the verdict is on the wrong rows then" in asked


@pytest.mark.parametrize(
  "part, gain",
  [
    (".weight_v", ".weight_g"),
    (".parametrizations.weight.original1", ".parametrizations.weight.original0"),
    (".weight", ".bias"),
  ],
)
def test_the_heading_that_is_printed_is_taken_as_key(tmp_path, part, gain):
  path = tmp_path / "x.safetensors"
  rows = _RNG.normal(size=(40, 16)).astype(np.float32)
  layer = {f"a.last_layer{part}": rows, f"a.last_layer{gain}": np.ones((40, 1), np.float32)}
  safetensors.numpy.save_file(layer | {"b.last_layer.weight": rows[:9]}, path)
  heading = next(iter(api.diagnose(path).sets))
  found = api.diagnose(path, key=heading)
  assert heading == "a.last_layer" and list(found.sets) == [heading]
  assert f"prototypes taken from a.last_layer{part}\n\n{heading}: 40 prototypes" in str(found)


def test_embeddings_compared_with_several_sets_are_said_to_come_out_of_one_head(full, tmp_path):
  """Unless one of the sets was chosen."""
  v = _RNG.normal(size=(30, 16)).astype(np.float32)
  path = tmp_path / "two.safetensors"
  safetensors.numpy.save_file({"prototypes0.weight": v, "prototypes1.weight": v[::-1].copy()}, path)
  words = "all 2 sets are compared with the same embeddings, which come out of one head"
  rows = _RNG.normal(size=(50, 16))
  assert words in str(api.diagnose(path, embeddings=rows))
  assert words not in str(api.diagnose(path, embeddings=rows, key="prototypes0"))
  assert words not in str(api.diagnose(path))


def test_embeddings_that_fit_either_way_are_asked_about(tmp_path):
  """The prototypes [D, K] and embeddings [N, D], or [K, D] and [D, N]."""
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file({"prototypes.weight": np.ones((64, 32), np.float32)}, path)
  with pytest.raises(errors.UserError, match="give transpose=True, or transpose the embeddings"):
    api.diagnose(path, embeddings=np.ones((32, 64)))
  with pytest.raises(errors.UserError, match="they seem to be columns, 32 x 90"):
    api.diagnose(path, embeddings=np.ones((32, 90)))


def test_images_are_run_through_a_checkpoint_of_dinov2(tmp_path):
  """Registers, LayerScale, and a head for patches beside the one for class tokens."""
  parts = {"backbone": foreign_layouts.vit(registers=3, scaled=True)}
  parts |= {f"{kind}_head": foreign_layouts.head(seed=i) for i, kind in enumerate(("dino", "ibot"))}
  arrays = {f"teacher.{part}.{k}": v for part, one in parts.items() for k, v in one.items()}
  safetensors.numpy.save_file(arrays, tmp_path / "full.safetensors")
  found = api.diagnose(tmp_path / "full.safetensors", data="digits", limit=40).sets
  assert found["teacher.dino_head.last_layer"].result["usage"]["images"] == 40
  assert "usage" not in found["teacher.ibot_head.last_layer"].result


def test_a_pointer_of_git_lfs_is_called_that(tmp_path):
  """Whatever it is called: it is text, and no log."""
  for name in ("x.pth", "pytorch_model.bin", "metrics.jsonl"):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(errors.UserError, match=f"{name} is a pointer of Git LFS, .* git lfs pull"):
      doctor.main([str(tmp_path / name)])


def test_the_status_tells_a_collapse_only_if_asked(full, tmp_path):
  doctor.main([str(full)])
  with pytest.raises(SystemExit) as ended:
    doctor.main([str(full), "--fail"])
  assert ended.value.code == 1
  doctor.main([str(full), "--fail", "--which=student"])  # "unique, use unknown" is no alarm


def test_a_flag_says_whether_norms_count(tmp_path, capsys):
  """As names do: the same matrix is compared in the same way under any name."""
  weights = _RNG.normal(size=(64, 16)) * np.where(np.arange(64) < 10, 50.0, 1.0)[:, None]
  np.save(tmp_path / "z.npy", _RNG.normal(size=(500, 16)))
  np.save(tmp_path / "mine.npy", weights)
  used = {}
  for flag in ("", "--cosine", "--no-cosine"):
    flags = [f"--embeddings={tmp_path / 'z.npy'}", *filter(None, [flag])]
    usage = _examined(tmp_path, tmp_path / "mine.npy", *flags)["sets"]["mine"]["usage"]
    used[flag], shown = usage["used"], capsys.readouterr().out
    assert usage["compared_by"] == ("cosine" if flag == "--cosine" else "product")
    assert ("--cosine compares directions" in shown) == (flag != "--cosine")
    by_product = "inner product such a prototype wins images by its norm"  # folded before it
    assert (by_product in shown) == (flag == "--cosine")
  assert used[""] == used["--no-cosine"] < 0.5 < used["--cosine"]


def test_what_shows_that_prototypes_lie_the_other_way_round_refuses_them(tmp_path, collapsed):
  """The head ends in 32 dimensions, or there are 300 gains, or embeddings of 32 dimensions."""
  turned = np.ascontiguousarray(collapsed.T.astype(np.float32))
  sides = {0: 64, 3: 32}
  swav = {f"projection_head.{i}.weight": np.ones((n, 64), np.float32) for i, n in sides.items()}
  dino = {"head.last_layer.weight_g": np.ones((300, 1), np.float32)}
  path = tmp_path / "file.safetensors"
  for arrays, flags, why in (
    (swav | {"prototypes.weight": turned}, [], "the head before it ends in 32 dimensions"),
    (dino | {"head.last_layer.weight_v": turned}, [], "300 gains lie beside it, one a prototype"),
    ({"prototypes.weight": turned}, ["--embeddings=z.npy"], "the embeddings have 32 dimensions"),
  ):
    safetensors.numpy.save_file(arrays, path)
    np.save(tmp_path / "z.npy", collapsed[:9])
    flags = [flag.replace("z.npy", str(tmp_path / "z.npy")) for flag in flags]
    with pytest.raises(errors.UserError, match=rf"{why}: it is stored \[D, K\]: give transpose"):
      doctor.main([str(path), *flags])
    (one,) = _examined(tmp_path, path, "--transpose", *flags)["sets"].values()
    assert (one["num"], one["unique"]["unique"][0]) == (300, 30)
  safetensors.numpy.save_file(swav | {"prototypes.weight": collapsed.astype(np.float32)}, path)
  with pytest.raises(errors.UserError, match=r"stored \[K, D\]: leave transpose=True out"):
    doctor.main([str(path), "--transpose"])


def test_few_prototypes_behind_a_head_that_fits_raise_no_doubt(tmp_path, capsys):
  arrays = {"projection_head.weight": np.ones((32, 64), np.float32)}
  arrays["prototypes.weight"] = _RNG.normal(size=(8, 32)).astype(np.float32)
  safetensors.numpy.save_file(arrays, tmp_path / "few.safetensors")
  doctor.main([str(tmp_path / "few.safetensors")])
  assert "--transpose" not in capsys.readouterr().out
  backbone = {"cls_token": np.ones((1, 1, 32), np.float32)}
  backbone["prototypes.weight"] = _RNG.normal(size=(32, 8)).astype(np.float32)
  safetensors.numpy.save_file(backbone, tmp_path / "no_head.safetensors")
  doctor.main([str(tmp_path / "no_head.safetensors")])
  assert "as many rows, 32, as the backbone has dimensions" in capsys.readouterr().out


def test_rows_that_are_not_finite_are_the_verdict(tmp_path, collapsed, capsys):
  np.save(tmp_path / "nan.npy", np.full((40, 8), np.nan))
  np.save(tmp_path / "one.npy", np.where(np.arange(300)[:, None] == 7, np.inf, collapsed))
  for name, flags, count in (
    ("nan.npy", [], "40 of 40"),
    ("nan.npy", ["--rows=prototypes"], "40 of 40"),
    ("one.npy", ["--rows=prototypes"], "1 of 300"),
  ):
    doctor.main([str(tmp_path / name), *flags])
    bullets = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  - ")]
    assert bullets[0].startswith(f"  - non-finite: {count} rows are not finite")
  assert api.diagnose(tmp_path / "nan.npy").verdict.label == "non-finite"


def test_a_file_that_is_no_checkpoint_is_called_that(tmp_path):
  for content in (bytes(range(160, 256)) * 20, b"<html>not found</html>"):
    (tmp_path / "garbage.pth").write_bytes(content)
    with pytest.raises(errors.UserError, match="garbage.pth is no checkpoint: called .pth, but"):
      doctor.main([str(tmp_path / "garbage.pth")])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
  """A full checkpoint of DINO as it is published, small, with an average of its own."""
  path = tmp_path_factory.mktemp("foreign") / "full.pth"
  parts = {"backbone": foreign_layouts.vit(), "head": foreign_layouts.head(prototypes=24)}
  teacher = {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}
  made.save(path, {"teacher": teacher, "student": {f"module.{k}": v for k, v in teacher.items()}})
  return path


def test_images_show_which_prototypes_of_a_foreign_checkpoint_are_used(foreign, tmp_path, capsys):
  """Usage is by the backbone and head of the file; the same from what convert makes of it."""
  flags = ["--data=digits", "--limit=100"]
  usage = _examined(tmp_path, foreign, *flags)["sets"]["teacher.head.last_layer"]["usage"]
  shown = capsys.readouterr().out
  assert "images: digits/train, 100 of 1,442" in shown and "usage by 100 embeddings" in shown
  assert "1 attention heads: width / 64, since no tensor tells and no config.json lies" in shown
  assert "beside it: --heads=NUMBER says another" in shown
  assert usage["images"] == 100 and "backbone" in usage["features"]
  convert.bring_in(foreign, tmp_path / "converted")
  again = _examined(tmp_path, tmp_path / "converted", *flags)
  assert again["sets"]["prototypes"]["usage"] == pytest.approx(usage, rel=1e-3)
  model = loading.load(tmp_path / "converted")
  seen = pretrained.encoded(
    model, pretrained.source(model, "train", name="digits"), parts=("codes",), limit=100
  )
  counts = np.bincount(seen["codes"]["prototypes"], minlength=24)
  assert usage["unused"] == np.sum(counts == 0)
  assert usage["largest_share"] == pytest.approx(counts.max() / 100)


def test_prototypes_of_learned_lengths_are_compared_alike_before_and_after_convert(
  tmp_path, capsys
):
  """Codes are by product there; a row that is 50 times as long takes many images."""
  head = foreign_layouts.head(prototypes=24)
  head["last_layer.weight_g"][3] *= 50.0
  parts = {"backbone": foreign_layouts.vit(), "head": head}
  teacher = {f"{part}.{k}": v for part, arrays in parts.items() for k, v in arrays.items()}
  made.save(tmp_path / "gains.pth", {"teacher": teacher})
  flags = ["--data=digits", "--limit=100"]
  file = _examined(tmp_path, tmp_path / "gains.pth", *flags)["sets"]["teacher.head.last_layer"]
  converted = convert.bring_in(tmp_path / "gains.pth", tmp_path / "converted")
  assert any("differ in length: codes go by the largest product" in line for line in converted)
  capsys.readouterr()
  again = _examined(tmp_path, tmp_path / "converted", *flags)["sets"]["prototypes"]
  assert "50.0 times the median" in capsys.readouterr().out
  assert again["usage"] == pytest.approx(file["usage"], rel=1e-3)
  model = loading.load(tmp_path / "converted")
  source = pretrained.source(model, "train", name="digits")
  codes = pretrained.encoded(model, source, parts=("codes",), limit=100)["codes"]["prototypes"]
  counts = np.bincount(codes, minlength=24)
  assert again["usage"]["unused"] == np.sum(counts == 0)


def test_what_would_show_the_use_of_prototypes_is_said_as_it_is_typed(
  foreign, full, run, tmp_path, capsys
):
  shutil.copytree(run / "exported", tmp_path / "exported")
  for path, words in (
    (
      foreign,
      "give --data=folder --data_dir=IMAGES, for this file holds the network that leads up",
    ),
    (full, "give --embeddings=FILE.npy, [N, D], what comes out of the head just before the proto"),
    (run, "give --data=run or --data=folder --data_dir=IMAGES; random"),
    (tmp_path / "exported", "from weights: give --data=folder --data_dir=IMAGES; random"),
  ):
    doctor.main([str(path)])
    assert words in " ".join(capsys.readouterr().out.split())
  assert any("this file holds no network" in s for s in api.diagnose(full).sentences)
  assert "give embeddings; random" in api.diagnose(np.eye(8)).sentences[-1]


def test_of_several_sets_those_that_images_do_not_reach_are_told_so(foreign, tmp_path):
  """iBOT's, whose patches have prototypes of their own."""
  arrays = {k: v for k, v in tensor_files.read(foreign).items() if k.startswith("teacher.")}
  patches = {
    k.replace("last_layer", "last_layer2"): v[::-1] for k, v in arrays.items() if "last_layer" in k
  }
  path = tmp_path / "ibot.safetensors"
  safetensors.numpy.save_file({k: v.copy() for k, v in (arrays | patches).items()}, path)
  name = "teacher.head.last_layer"
  alone = f"just before the prototypes, for the file's network leads up to {name} alone"
  for found in (api.diagnose(path), api.diagnose(path, data="digits", limit=100)):
    images, of_patches = found.sets[name], found.sets[f"{name}2"]
    assert alone in of_patches.sentences[-1] and "usage" not in of_patches.result
    assert alone not in images.sentences[-1]


def test_a_student_is_judged_where_the_teacher_has_no_prototypes_and_said_to_be(foreign, tmp_path):
  teacher = {k: v for k, v in tensor_files.read(foreign).items() if k.startswith("teacher.")}
  student = {k.replace("teacher.", "student.", 1): v for k, v in teacher.items()}
  teacher = {k: v for k, v in teacher.items() if "last_layer" not in k}
  path = tmp_path / "half.safetensors"
  safetensors.numpy.save_file(teacher | student, path)
  found = api.diagnose(path)
  assert list(found.sets) == ["student.head.last_layer"]
  said = " ".join(str(found).split())
  assert "of the student, not of the teacher that is in the file, too: the head's last" in said
  assert "for this file holds the network that leads up to them" in found.sentences[-1]
  seen = api.diagnose(path, data="digits", limit=100).sets["student.head.last_layer"]
  assert seen.result["usage"]["images"] == 100


def test_rows_of_zeros_in_a_weight_normalised_layer_are_called_that(foreign, tmp_path):
  arrays = {k: v.copy() for k, v in tensor_files.read(foreign).items() if k.startswith("teacher.")}
  arrays["teacher.head.last_layer.weight_v"][:2] = 0.0
  safetensors.numpy.save_file(arrays, tmp_path / "zeros.safetensors")
  path = tmp_path / "zeros.safetensors"
  said = " ".join(str(api.diagnose(path)).split())
  assert "2 rows of zeros in the file; weight normalisation makes 0 / 0 of them" in said
  words = "row 0 and 1 more of teacher.head.last_layer.weight_v is zeros, of which weight"
  with pytest.raises(errors.UserError, match=f"cannot be run up to its prototypes: {words}"):
    api.diagnose(path, data="digits")
  with pytest.raises(errors.UserError, match=f"{words}.* nothing was written"):
    convert.bring_in(path, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_images_are_run_through_a_checkpoint_with_transposed_prototypes(foreign, tmp_path):
  flags = ["--data=digits", "--limit=100"]
  name = "teacher.head.last_layer"
  expected = _examined(tmp_path, foreign, *flags)["sets"][name]["usage"]
  arrays = dict(tensor_files.read(foreign))
  arrays[f"{name}.weight_v"] = np.ascontiguousarray(arrays[f"{name}.weight_v"].T)
  safetensors.numpy.save_file(arrays, tmp_path / "turned.safetensors")
  found = _examined(tmp_path, tmp_path / "turned.safetensors", "--transpose", *flags)["sets"]
  assert found[name]["usage"] == pytest.approx(expected, rel=1e-5)


def test_tensors_that_are_not_finite_are_named(foreign, tmp_path, capsys):
  """Of a file, run or not, of what older versions converted, and of a backbone alone."""
  arrays = {k: v for k, v in tensor_files.read(foreign).items() if k.startswith("teacher.")}
  bad = "teacher.backbone.blocks.1.norm1.weight"
  path = tmp_path / "nan.safetensors"
  safetensors.numpy.save_file(arrays | {bad: np.full_like(arrays[bad], np.nan)}, path)
  said = f"1 of {len(arrays)} tensors hold NaN or infinity: {bad}"
  with pytest.raises(SystemExit, match="1"):
    doctor.main([str(path), "--fail", f"--json={tmp_path / 'found.json'}"])
  assert f"non-finite: {said}" in " ".join(capsys.readouterr().out.split())
  found = json.loads((tmp_path / "found.json").read_text())
  assert found["alarm"] and found["verdict"]["sentence"].startswith(said)
  alone = "; without data the prototypes alone are judged$"
  words = f"nan.safetensors cannot be run .*: {said}: take an .* copy{alone}"
  with pytest.raises(errors.UserError, match=words):
    doctor.main([str(path), "--data=digits"])
  backbone = {k: v for k, v in tensor_files.read(path).items() if ".head." not in k}
  safetensors.numpy.save_file(backbone, tmp_path / "backbone.safetensors")
  with pytest.raises(errors.UserError, match=f"no prototypes found .* infinity: {bad}$"):
    doctor.main([str(tmp_path / "backbone.safetensors")])
  convert.bring_in(foreign, tmp_path / "old")
  tensors, info = export.read(tmp_path / "old")
  sets = export.read_prototypes(tmp_path / "old", info)
  ours = "params.backbone.blocks_1.norm1.scale"
  export.write(tmp_path / "old", tensors | {ours: np.full(64, np.inf, np.float32)}, info, sets)
  with pytest.raises(SystemExit, match="1"):
    doctor.main([str(tmp_path / "old"), "--fail"])
  shown = " ".join(capsys.readouterr().out.split())
  assert "non-finite: 1 of" in shown and f"tensors hold NaN or infinity: {ours}: export or" in shown
  words = f"old cannot be run: .* infinity: {ours}: export or .*{alone}"
  with pytest.raises(errors.UserError, match=words):
    doctor.main([str(tmp_path / "old"), "--data=digits"])


def test_a_student_beside_the_teacher_that_is_judged_is_mentioned(foreign, tmp_path):
  arrays = {k: v for k, v in tensor_files.read(foreign).items() if k.startswith("teacher.")}
  own = {k.replace("teacher.", "student."): v for k, v in arrays.items()}
  last = "student.head.last_layer.weight_v"
  moved = {k: v + 1.0 if k == last else v for k, v in own.items()}
  for student, said in (
    (own, "are equal to these to the bit"),
    (moved, "differ from these: --which=student judges"),
  ):
    safetensors.numpy.save_file(arrays | student, tmp_path / "both.safetensors")
    shown = cli.with_flags(str(api.diagnose(tmp_path / "both.safetensors")))
    assert "the student's prototypes in the file" in shown and said in shown


def test_a_head_without_a_last_layer_of_numbers_is_not_called_a_backbone_alone(
  foreign, tmp_path, capsys
):
  """By the doctor and in the account of convert; the student's are taken in the teacher's place."""
  arrays = tensor_files.read(foreign)
  gone = {k: v for k, v in arrays.items() if k.startswith("teacher.") and "last_layer" not in k}
  whole = gone | {"teacher.head.last_layer.weight": np.ones((24, 16), np.int32)}
  other = gone | {"teacher.head.last_layer.weight": np.ones((24, 5), np.float32)}
  path = tmp_path / "file.safetensors"
  for tensors, said in (
    (
      gone,
      "the head's last layer, whose rows are the prototypes, is missing (there are teacher.he",
    ),
    (whole, "teacher.head.last_layer.weight is int32, not float"),
    (other, "teacher.head.last_layer.weight has 5 columns and the head ends in 16"),
  ):
    safetensors.numpy.save_file(tensors, path)
    lines = convert.bring_in(path, tmp_path / "converted", overwrite=True)
    assert any(line.startswith(f"note: no prototypes: {said}") for line in lines)
    if tensors is not other:
      with pytest.raises(errors.UserError) as caught:
        doctor.main([str(path)])
      assert said in str(caught.value) and "without the head" not in str(caught.value)
  students = {k: v for k, v in arrays.items() if k.startswith("student.")}
  safetensors.numpy.save_file(whole | students, path)
  doctor.main([str(path)])
  assert "left out: teacher.head.last_layer.weight is int32, not" in capsys.readouterr().out


def test_images_are_not_advised_where_they_would_be_refused(foreign, tmp_path, capsys):
  arrays = {k: v for k, v in tensor_files.read(foreign).items() if k.startswith("teacher.")}
  norm = "teacher.backbone.norm.weight"
  nan = arrays | {norm: np.full_like(arrays[norm], np.nan)}
  gone = {k: v for k, v in arrays.items() if k != norm}
  path = tmp_path / "file.safetensors"
  for tensors, why in (
    (nan, f"1 of 38 tensors hold NaN or infinity: {norm}"),
    (gone, f"{norm} (backbone.norm.scale in protojax) is missing"),
  ):
    safetensors.numpy.save_file(tensors, path)
    doctor.main([str(path)])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"the network in this file cannot be run up to them: {why}; random" in shown
    assert "--data" not in shown and "give --embeddings=FILE.npy" in shown
    with pytest.raises(errors.UserError) as caught:
      doctor.main([str(path), "--data=digits"])
    assert f"cannot be run up to its prototypes: {why}" in str(caught.value)
  parts = {"backbone": foreign_layouts.vit(width=96), "head": foreign_layouts.head(width=96)}
  whole = {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}
  safetensors.numpy.save_file(whole, path)
  doctor.main([str(path)])
  shown = " ".join(capsys.readouterr().out.split())
  assert "give --data=folder --data_dir=IMAGES --heads=NUMBER, for this file holds the net" in shown


def test_a_checkpoint_that_cannot_be_run_says_why_and_what_to_do(foreign, full, tmp_path):
  arrays = tensor_files.read(foreign)
  headless = {k: v for k, v in arrays.items() if ".mlp." not in k or ".blocks." in k}
  safetensors.numpy.save_file(headless, tmp_path / "headless.safetensors")
  for path, flags, words in (
    (
      full,
      ["--data=digits"],
      "data=digits: .* cannot be run .* holds no network .*embeddings=FILE",
    ),
    (tmp_path / "headless.safetensors", ["--data=digits"], "no projection head of DINO"),
    (foreign, ["--data=run"], "data=run is for runs of protojax"),
    (foreign, ["--data=digits", "--key=teacher.head.last_layer.weight_v"], "data and key="),
    (foreign, ["--data=nothing"], "nothing"),
    (foreign, ["--data=folder"], "data_dir=None of .* give data_dir=FOLDER .in training"),
  ):
    with pytest.raises(errors.UserError, match=words) as caught:
      doctor.main([str(path), *flags])
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_dino_is_examined_by_its_teacher(full, tmp_path, capsys):
  result = _examined(tmp_path, full)
  ((name, one),) = result["sets"].items()
  assert name == "teacher.head.last_layer" and (one["num"], one["dim"]) == (300, 32)
  assert one["unique"]["unique"][:3] == [30] * 3 and one["random"]["unique"][0] == 300
  assert one["norm"]["most"] == pytest.approx(1.0) and one["groups"][0]["size"] == 10
  shown = capsys.readouterr().out
  for text in (
    "DINO",
    "weights of the teacher",
    "300 prototypes of 32 dimensions",
    "30 (10.0%)",
    "partial prototype collapse: 90% of 300",
  ):
    assert text in shown
  assert "\n  - partial prototype collapse" in shown
  other = _examined(tmp_path, full, "--which=student")["sets"]
  assert list(other) == ["student.module.head.last_layer"]
  assert other["student.module.head.last_layer"]["unique"]["unique"][0] == 300


def test_the_program_prints_and_writes_what_the_call_finds(full, tmp_path, capsys):
  result = _examined(tmp_path, full)
  found = api.diagnose(full)
  assert capsys.readouterr().out == f"protojax doctor: {full}\n{cli.with_flags(str(found))}\n"
  assert found.verdict.label == "partial prototype collapse" and list(found.sets) == [
    *result["sets"]
  ]
  assert {k: result[k] for k in found.result} == json.loads(json.dumps(found.result))


def test_the_call_takes_arrays_and_refuses_what_says_nothing_about_them(collapsed, full):
  found = api.diagnose(collapsed, embeddings=collapsed[:50])
  assert found.verdict.label == "partial prototype collapse"
  assert found.measures["collapse/used"] == pytest.approx(0.1)
  with pytest.raises(errors.UserError, match="which means nothing for an array"):
    api.diagnose(collapsed, which="teacher")
  with pytest.raises(errors.UserError, match="there is no /nowhere"):
    api.diagnose("/nowhere")
  assert api.diagnose(str(full), embeddings=collapsed[:50]).result["sets"]


def test_embeddings_show_what_is_used(full, collapsed, tmp_path, capsys):
  rows = _unit(collapsed)[:4].repeat(50, axis=0) + 0.01 * _RNG.normal(size=(200, 32))
  np.save(tmp_path / "z.npy", rows)
  result = _examined(tmp_path, full, f"--embeddings={tmp_path / 'z.npy'}")
  seen = result["sets"]["teacher.head.last_layer"]["usage"]
  assert seen["images"] == 200 and seen["used"] < 0.2 and seen["unused"] > 250
  assert f"{seen['unused']} by none" in capsys.readouterr().out
  np.save(tmp_path / "z.npy", rows[:, :16])
  with pytest.raises(errors.UserError, match="16 dimensions and teacher.head.last_layer 32"):
    doctor.main([str(full), f"--embeddings={tmp_path / 'z.npy'}"])


def test_embeddings_in_the_file_of_the_prototypes_are_pointed_at(collapsed, tmp_path, capsys):
  path = tmp_path / "both.npz"
  np.savez(path, prototypes=collapsed, embedding=collapsed[:50])
  doctor.main([str(path)])
  shown = " ".join(capsys.readouterr().out.split())
  assert f"give --embeddings={path}, which holds an array embedding [50, 32]" in shown
  doctor.main([str(path), f"--embeddings={path}"])
  assert "usage by 50 embeddings" in capsys.readouterr().out


def test_a_file_of_embed_gives_its_embeddings_and_never_its_features(full, collapsed, tmp_path):
  rows = _unit(collapsed)[:4].repeat(50, axis=0) + 0.01 * _RNG.normal(size=(200, 32))
  alike = np.ones((200, 32)) + 1e-3 * _RNG.normal(size=(200, 32))
  np.savez(tmp_path / "f.npz", features=alike, embedding=rows, filename=np.array(["a"] * 200))
  result = _examined(tmp_path, full, f"--embeddings={tmp_path / 'f.npz'}")
  used = result["sets"]["teacher.head.last_layer"]["usage"]["used"]
  np.save(tmp_path / "z.npy", rows)
  again = _examined(tmp_path, full, f"--embeddings={tmp_path / 'z.npy'}")
  assert used == again["sets"]["teacher.head.last_layer"]["usage"]["used"]
  for arrays in ({"features": alike}, {"features": alike, "code": np.arange(200)}):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(errors.UserError, match=r"called embedding in it, there is features \[200"):
      doctor.main([str(full), f"--embeddings={tmp_path / 'f.npz'}"])


def test_a_file_without_known_prototypes_lists_its_matrices_and_asks(tmp_path, capsys, collapsed):
  path = tmp_path / "b.npz"
  np.savez(path, **{"patch_embed.proj.weight": np.zeros((4, 3, 2, 2)), "fc": collapsed.T})
  with pytest.raises(errors.UserError, match=r"full ckpt.* its matrices: fc \[32, 300\]$"):
    doctor.main([str(path)])
  doctor.main([str(path), "--key=fc"])
  assert "transpose" in capsys.readouterr().out
  result = _examined(tmp_path, path, "--key=fc", "--transpose")
  assert result["sets"]["fc"]["unique"]["unique"][0] == 30


def test_a_log_is_read_for_what_it_is(tmp_path, capsys):
  losses = [9.0, *[math.log(4096)] * 9]
  path = tmp_path / "log.txt"
  path.write_text(
    "".join(json.dumps({"train_loss": x, "epoch": i}) + "\n" for i, x in enumerate(losses))
  )
  result = _examined(tmp_path, path)
  assert result["kind"] == "log" and "ln 4096" in result["diagnosis"][0]
  assert "uniform collapse: the loss is 8.318 = ln 4096" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run that has saved its first state and written one line."""
  folder = tmp_path_factory.mktemp("doctor") / "run"
  config = tiny.config(prototypes="frozen")
  program = programs.Program(config, 0, devices=jax.devices()[:1])
  folder = workdir.claim(str(folder), config)
  with jax.set_mesh(program.mesh):
    state = program.init(config.seed)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(1, state, workdir.metadata(config, 0.0))
    checkpoints.close()
    workdir.export_encoder(folder, 1, state, program)
  (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.5}\n')
  return folder


def test_a_run_is_judged_by_its_metrics_its_prototypes_and_its_images(run, tmp_path, capsys):
  result = _examined(tmp_path, run, "--data=run", "--limit=100")
  assert result["kind"] == "run" and result["run"]["step"] == 1
  one = result["sets"]["prototypes"]
  model = loading.load(str(run))
  images = pretrained.source(model, "train")
  parts = ("features", "embeddings", "codes")
  seen = pretrained.encoded(model, images, parts=parts, limit=100)
  codes = seen["codes"]["prototypes"]
  assert one["usage"]["images"] == 100
  assert one["usage"]["used"] == pytest.approx(len(set(codes)) / 32)
  shown = capsys.readouterr().out
  assert "run: " in shown and "checkpoint of step 1" in shown and "100 of " in shown
  np.save(tmp_path / "z.npy", seen["embeddings"]["prototypes"])
  again = _examined(tmp_path, run, f"--embeddings={tmp_path / 'z.npy'}")
  alone = again["sets"]["prototypes"]["usage"]
  of_features = {"features", "rankme", "feature_std", "mean_cosine"}
  assert all(alone[key] == value for key, value in one["usage"].items() if key not in of_features)
  # As in training: of the backbone, where the run is at hand to make them.
  assert one["usage"]["rankme"] == pytest.approx(float(collapse.rankme(seen["features"]["last"])))
  assert alone["rankme"] == pytest.approx(float(collapse.rankme(seen["embeddings"]["prototypes"])))
  assert "are of the backbone's features" in shown
  assert "are of the head's embeddings" in capsys.readouterr().out


def test_a_run_of_one_step_is_warming_up_whatever_its_prototypes_look_like(run, tmp_path, capsys):
  doctor.main([str(run), "--data=run", "--limit=100"])
  shown = capsys.readouterr().out
  assert shown.count("warming up") == 2 and "cluster collapse" not in shown
  assert "unused:" not in shown


def test_a_run_shows_the_use_of_prototypes_that_it_has_measured(run, tmp_path, capsys):
  """Of the checkpoint's step it is judged too, of another one only shown."""
  folder = shutil.copytree(run, tmp_path / "run")
  use = {"collapse/used": 0.5, "collapse/used_most": 1.0, "collapse/used_sample": 0.25}
  lines = [{"step": 1, "train/loss": 3.5} | use, {"step": 2, "train/loss": 3.5}]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  result = _examined(tmp_path, folder)["sets"]["prototypes"]
  shown = " ".join(capsys.readouterr().out.split())
  assert "prototypes used at step 1 by its labelled images: 50.0%, by metrics.jsonl" in shown
  assert "50.0% are used" in shown and "use unknown" not in shown and "cannot be seen" not in shown
  assert result["use_by_metrics"] == {"collapse/used": 0.5, "collapse/used_most": 1.0}
  lines = [{"step": 9, "train/loss": 3.5, "collapse/used_sample": 0.25}]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert "use_by_metrics" not in _examined(tmp_path, folder)["sets"]["prototypes"]
  shown = capsys.readouterr().out
  assert "used at step 9 by its monitor's sample: 25.0%" in shown and "cannot be seen" in shown


def test_a_run_that_died_before_its_first_checkpoint_still_has_a_verdict(run, tmp_path, capsys):
  shutil.copy(run / "config.json", tmp_path)
  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 1, "train/loss": null, "non_finite": ["train/loss"]}\n'
  )
  for path in (tmp_path, tmp_path / "metrics.jsonl"):
    doctor.main([str(path)])
    assert "non-finite at step 1" in capsys.readouterr().out


def test_exported_weights_are_examined_by_the_prototypes_beside_them(run, tmp_path):
  flags = ["--data=digits", "--limit=100"]
  expected = _examined(tmp_path, run, *flags)["sets"]
  shutil.copytree(run / "exported", tmp_path / "exported")
  for file in ("", "encoder.safetensors", "prototypes.safetensors"):
    found = _examined(tmp_path, tmp_path / "exported" / file, *flags)["sets"]
    assert found["prototypes"]["unique"] == expected["prototypes"]["unique"]
    assert found["prototypes"]["usage"] == pytest.approx(expected["prototypes"]["usage"], rel=1e-3)
  (tmp_path / "exported" / "prototypes.safetensors").unlink()
  with pytest.raises(errors.UserError, match="without prototypes: .* give the workdir of the run"):
    doctor.main([str(tmp_path / "exported")])


@pytest.mark.parametrize(
  "flags, said",
  [
    (["--data=run"], "data=run is for runs"),
    (["--step=3"], "step means nothing"),
    (["--which=both"], "invalid choice"),
    (["--kye=x"], "did you mean --key"),
    (["--key=teacher.head.last_layer.weight"], "did you mean"),
    (["--limit=9"], "without data"),
    (["--data=run", "--limit=-1"], "negative"),
    (["--data=run", "--embeddings=x"], "give one"),
    (["--json=/nowhere/x.json"], "no folder"),
    (["--json=/"], "is a folder"),
    (["--embeddings=/nowhere.npy"], "no file"),
  ],
)
def test_a_mistake_is_one_line(full, flags, said):
  with pytest.raises(errors.UserError, match=said) as caught:
    doctor.main([str(full), *flags])
  assert "\n" not in str(caught.value)


def test_the_program_ends_with_one_line_and_status_2(tmp_path, capfd):
  made.save(tmp_path / "x.pth", {"w": np.ones(3), "bad": made.Global("posix", "system")})
  with pytest.raises(SystemExit) as ended:
    cli.guarded(doctor.main, [str(tmp_path / "x.pth")])
  done = capfd.readouterr()
  assert ended.value.code == 2 and done.out == ""
  assert done.err.startswith("protojax: ") and len(done.err.splitlines()) == 1


def test_of_two_files_the_second_is_refused():
  with pytest.raises(errors.UserError, match="a.pth and b.pth: the doctor examines one a call"):
    doctor.main(["a.pth", "b.pth", "c.pth"])
