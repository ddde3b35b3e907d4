import json

import numpy as np
import pytest

from protojax import config as configs
from protojax import errors, resolving
from protojax.metrics import collapse, diagnosis, rules, verdicts, wording

_RNG = np.random.default_rng(0)


def _rows(num, dim):
  return _RNG.normal(size=(num, dim)).astype(np.float32)


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _words(weights, *, cosine=False, prototypes="learned", **named):
  result = diagnosis.examine(weights, cosine=cosine, **named)
  json.dumps(result, allow_nan=False)
  return result, wording.words(result, cosine=cosine, prototypes=prototypes)[1]


def test_random_prototypes_are_unique_and_not_called_good():
  result, said = _words(_rows(512, 64))
  assert said[0] == "unique, use unknown: 512 of 512 prototypes are unique, random ones 512"
  assert len(said) == 2 and "whether they are used" in said[1]
  assert result["groups"] == [] and result["copies_to_the_bit"] == 0


def test_copies_are_counted_grouped_and_named_as_partial_collapse():
  weights = np.tile(_rows(50, 64), (8, 1))
  weights[200:] += 1e-4 * _rows(200, 64)
  result, said = _words(weights)
  assert result["unique"] == {"unique": [50] * 5, "components": [50] * 5, "isolated": [0] * 5}
  assert result["copies_to_the_bit"] == 150
  assert result["groups"][0] == {"size": 8, "first": [0, 50, 100, 150, 200]}
  assert said[0].startswith("partial prototype collapse: 88% of 400")
  assert "about 50, 8.0 prototypes to each" in said[1] and "mixture" in said[1]


def test_numbers_match_numpy():
  weights = _rows(300, 24) * np.geomspace(1, 0.05, 24).astype(np.float32) + 0.2
  gain = _RNG.uniform(0.5, 2, 300)
  result = diagnosis.examine(weights, gain=gain)
  unit = _unit(weights.astype(np.float64))
  cosine = unit @ unit.T
  norms = np.linalg.norm(weights, axis=1)
  for key, values in (("norm", norms), ("gain", gain)):
    expected = [values.min(), np.median(values), values.max()]
    np.testing.assert_allclose(list(result[key].values()), expected, rtol=1e-5)
  values = np.linalg.svd(unit, compute_uv=False)
  energy = np.cumsum(values**2) / np.sum(values**2)
  spectrum = result["spectrum"]
  np.testing.assert_allclose(spectrum["rankme"], collapse.rankme(unit), rtol=1e-3)
  assert spectrum["directions_for_99_percent"] == np.argmax(energy >= 0.99) + 1
  among = cosine[~np.eye(300, dtype=bool)]
  np.testing.assert_allclose(spectrum["mean_cosine"], among.mean(), rtol=1e-5)
  np.fill_diagonal(cosine, -1)
  np.testing.assert_allclose(
    result["nearest"]["distance"], np.quantile(1 - cosine.max(1), (0.05, 0.5, 0.95)), atol=1e-6
  )


def test_usage_is_that_of_the_largest_product_of_the_weights():
  """A prototype with a large norm wins, unless the method compares directions."""
  weights = np.eye(8, dtype=np.float32)
  weights[3] *= 9.0
  embeddings = np.float32(np.eye(8) + 0.2)
  for cosine, used in ((False, 1 / 8), (True, 1.0)):
    result, said = _words(weights, cosine=cosine, embeddings=embeddings)
    np.testing.assert_allclose(result["usage"]["used"], used)
    (norms,) = (s for s in said if "wins images by its norm" in s)
    assert ("it does not matter" in norms) == cosine
  assert result["usage"]["unused"] == 0 and result["usage"]["images"] == 8
  np.testing.assert_allclose(result["usage"]["perplexity"], 8.0, rtol=1e-5)


def test_a_page_says_how_prototypes_and_random_ones_were_compared():
  """By products, random ones have these norms: few of them win images, too."""
  weights = _rows(64, 16)
  weights[:10] *= 50.0
  embeddings = _rows(500, 16)
  by_product = diagnosis.diagnose(weights, embeddings=embeddings)
  by_cosine = diagnosis.diagnose(weights, embeddings=embeddings, cosine=True)
  assert "(largest product, norms count; random prototypes have these norms" in str(by_product)
  assert "(largest cosine, for random prototypes too)" in str(by_cosine)
  names = ("collapse/used", "collapse/used_random")
  assert all(by_product.measures[name] < 0.3 for name in names)
  assert all(by_cosine.measures[name] > 0.8 for name in names)
  unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
  assert "(largest cosine" in str(diagnosis.diagnose(unit, embeddings=embeddings))  # the same


def test_prototypes_of_a_run_are_judged_as_its_training_judges_them():
  """A slow start looks like a cluster collapse; and what is set already is no advice."""
  embeddings = _rows(200, 32) * 0.1 + 3 * np.eye(32, dtype=np.float32)[0]
  config = configs.default("dino")
  config.num_steps = 1000
  config.method.prototypes = "mixture"
  config = resolving.resolve(config, 2000)

  def found(step, **more):
    told = verdicts.circumstances_of(config, step) | more
    return diagnosis.diagnose(
      _rows(128, 32), embeddings=embeddings, made="mixture", circumstances=told
    )

  early = found(20)
  assert early.verdict.label == "warming up" and "no verdict before step" in early.sentences[0]
  late = found(config.num_steps)
  assert (
    late.verdict.label == diagnosis.diagnose(_rows(128, 32), embeddings=embeddings).verdict.label
  )
  assert late.verdict.label in ("cluster collapse", "unique but unused")
  assert config.mixture.balanced and "mixture.balanced" not in late.sentences[0]


def test_usage_matches_collapse_over_many_blocks():
  weights, embeddings = _rows(64, 16), _rows(1000, 16)
  seen = diagnosis.examine(weights, embeddings=embeddings)["usage"]
  codes = (embeddings @ weights.T).argmax(axis=1)
  np.testing.assert_allclose(seen["used"], len(set(codes)) / 64)
  counts = np.bincount(codes, minlength=64) / 1000
  entropy = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
  np.testing.assert_allclose(seen["perplexity"], np.exp(entropy), rtol=1e-5)
  np.testing.assert_allclose(seen["largest_share"], counts.max())
  np.testing.assert_allclose(
    seen["relative_uniqueness"], collapse.relative_uniqueness(weights, embeddings), rtol=1e-4
  )


def test_one_prototype_for_all_embeddings_is_cluster_collapse():
  embeddings = _rows(200, 32) * 0.5 + 3 * np.eye(32, dtype=np.float32)[0]
  weights = _rows(128, 32)
  weights[:, 0] -= 1.0
  weights[7] = 10 * np.eye(32)[0]
  _, said = _words(weights, embeddings=embeddings, cosine=True)
  assert said[0].startswith("cluster collapse") and "one of 128" in said[0]


def test_near_prototypes_of_near_features_are_a_narrow_cone():
  offset = 60 * np.eye(64, dtype=np.float32)[0]
  weights, embeddings = _rows(256, 64) + offset, _rows(500, 64) + offset
  _, alone = _words(weights)
  assert alone[0].startswith("partial prototype collapse")
  assert any("the same way (mean cosine 0.98)" in s for s in alone)
  _, said = _words(weights, embeddings=embeddings, cosine=True)
  assert said[0].startswith("narrow cone") and not any("effective number" in s for s in said)


def test_rows_that_are_zero_or_not_finite_are_named():
  weights = _rows(40, 8)
  weights[3], weights[5, 2], weights[9] = 0, np.nan, np.inf
  result, said = _words(weights)
  assert result["without_direction"] == {"zero": 1, "not_finite": 2, "first": [3, 5, 9]}
  assert said[1].startswith("1 row is zero and 2 rows are not finite (first: 3, 5, 9)")
  for value, words in ((np.inf, "1 row is not finite (first: 7)"), (0, "1 row is zero (first: 7)")):
    _, said = _words(np.where(np.arange(40)[:, None] == 7, np.float32(value), _rows(40, 8)))
    assert any(s.startswith(words) for s in said)
  _, said = _words(np.full((4, 3), np.nan, np.float32))
  assert said[0].startswith("non-finite: 4 of 4 rows are not finite")
  assert said[-1].startswith("fewer than two of 4")
  _, said = _words(np.zeros((4, 3), np.float32))
  assert said[0].startswith("fewer than two of 4")


def test_what_else_is_wrong_beside_rows_that_are_not_finite_is_said():
  weights = np.tile(_rows(50, 64), (8, 1))
  weights[7] = np.inf
  _, said = _words(weights)
  assert said[0].endswith("a checkpoint without them (also: partial prototype collapse)")
  _, said = _words(np.where(np.arange(40)[:, None] == 7, np.nan, _rows(40, 32)))
  assert said[0].endswith("go back to a checkpoint without them")


def test_equal_rows_are_a_complete_collapse():
  """Whatever their lengths are, with images and without, and beside rows that are none."""
  equal = np.tile(_rows(1, 16), (64, 1))
  longer = equal * np.linspace(1, 2, 64, dtype=np.float32)[:, None]
  some = np.where(np.arange(64)[:, None] == 3, 0.0, equal)
  for weights, words in (
    (equal, "all 64 rows are equal to the bit: a complete collapse, one prototype 64 times"),
    (longer, "all 64 rows have one direction: a complete collapse"),
    (some, "all 63 rows that are prototypes are equal to the bit: a complete collapse"),
  ):
    result, said = _words(weights)
    assert said[0].startswith("complete prototype collapse: all prototypes are one and the same")
    assert any(s.startswith(words) for s in said) and not any("redundant" in s for s in said)
    assert result["alike"]
  _, said = _words(equal, embeddings=_rows(90, 16) + 9)
  assert said[0].startswith("cluster collapse") and "complete prototype" in said[0]
  assert not any("redundant" in s for s in said)
  near = equal + 0.01 * _rows(64, 16)
  assert not _words(near)[0]["alike"]


def test_bunched_prototypes_are_told_from_copies():
  centres = np.repeat(_unit(_rows(60, 64)), 5, axis=0)
  result, said = _words(centres + 0.05 * _rows(300, 64))  # about .14 from each other
  assert result["unique"]["unique"][0] == 300
  assert said[0].startswith("prototypes bunch: 20% of 300 prototypes are unique at cosine distance")
  result, said = _words(centres + 0.09 * _rows(300, 64))  # about .34
  assert result["unique"]["unique"][0] == 300
  assert said[0].startswith("unique") and "bunch, without being copies" in said[1]


def test_prototypes_that_few_images_use_are_not_ok():
  """Of 4,096 that are all unique 196 are used, and 3,900 by none."""
  weights = _unit(_rows(4096, 32))
  embeddings = weights[np.arange(1500) % 196] + 0.01 * _rows(1500, 32)
  found = diagnosis.diagnose(weights, embeddings=embeddings)
  assert "3,900 by none" in str(found) and "4.8% are used" in str(found)
  assert found.verdict.label == "unique but unused" and not found.verdict.collapsed
  joined = diagnosis.joined(
    {"a": found}, lines=[], result={}, verdict=rules.Verdict("ok", "by metrics", False)
  )
  assert joined.verdict == found.verdict and joined.sentences[0] == "by metrics"
  well = diagnosis.diagnose(weights[:196], embeddings=embeddings)
  assert well.verdict.label == "no collapse" and well.sentences[0].endswith("; 100.0% are used")


def test_a_chain_is_told_from_groups():
  angles = np.linspace(0, np.pi, 400)
  weights = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
  result, said = _words(weights)
  assert result["unique"]["components"][0] == 1 < result["unique"]["unique"][0]
  assert any(s.startswith("they form 1 chain of near neighbours") for s in said)


def test_few_directions_are_said():
  weights = _rows(300, 6) @ np.linalg.qr(_rows(64, 6))[0].T
  _, said = _words(weights)
  assert any("span about 6 of 64 directions" in s for s in said)


@pytest.mark.parametrize(
  "prototypes, advice",
  [("kmeans", "lower method.num_prototypes"), ("mixture", "mixture.horizon_steps")],
)
def test_advice_is_for_how_the_prototypes_were_made(prototypes, advice):
  _, said = _words(np.tile(_rows(50, 64), (8, 1)), prototypes=prototypes)
  assert advice in said[0]


def test_a_diagnosis_is_printed_as_a_page_and_read_as_fields():
  weights = np.tile(_rows(50, 64), (8, 1))
  found = diagnosis.diagnose(weights, embeddings=_rows(90, 64), name="head")
  assert found.verdict.label == "partial prototype collapse" and found.verdict.collapsed
  assert found.measures["collapse/unique_0.025"] == 50 / 400
  assert found.measures == found.result["measures"] and found.sets == {}
  page = str(found)
  assert page.startswith("head: 400 prototypes of 64 dimensions\n")
  assert "\n  usage by 90 embeddings" in page and "\n  RankMe " in page
  assert "\n  - partial prototype collapse: 88% of 400" in page
  assert found.sentences[0].startswith("partial prototype collapse: 88%")
  assert json.loads(json.dumps(found.result, allow_nan=False)) == found.result


def test_use_and_spread_are_not_judged_by_a_few_images():
  """Each of the embeddings lies on a prototype of its own: nothing is wrong with any number."""
  weights = _rows(256, 16)
  for num in (2, 3, 4, 15):
    found = diagnosis.diagnose(weights, embeddings=weights[:num])
    assert found.verdict.label == "unique, use unknown"
    assert f"not judged by {num} embeddings" in found.sentences[-1]
    assert found.result["usage"]["unused"] == 256 - num  # shown nevertheless
  found = diagnosis.diagnose(weights, embeddings=weights[:16])
  assert found.verdict.label == "no collapse" and "not judged" not in "".join(found.sentences)


def test_embeddings_that_are_all_zero_are_called_that_and_not_measured():
  weights, zeros = _rows(64, 32), np.zeros((500, 32))
  for features, label in ((None, "representation collapse"), (_rows(500, 48), "dead projector")):
    found = diagnosis.diagnose(weights, embeddings=zeros, features=features)
    assert found.verdict.label == label and found.verdict.collapsed
    assert "all 500 embeddings are zero, so that no prototype is nearer" in found.sentences[0]
    assert "embedding cosine" not in str(found) and "usage" not in found.result
    assert ("collapse/mean_cosine" in found.measures) == (features is not None)
    assert not any("give embeddings" in s for s in found.sentences)


def test_tensors_of_torch_are_diagnosed_as_arrays_are():
  torch = pytest.importorskip("torch")
  weights, embeddings = _rows(60, 16), _rows(90, 16)
  found = diagnosis.diagnose(torch.from_numpy(weights), embeddings=torch.from_numpy(embeddings))
  assert found == diagnosis.diagnose(weights, embeddings=embeddings)


@pytest.mark.parametrize(
  "weights, embeddings, said",
  [
    (np.ones(4), None, r"shape \[4\]: give \[K, D\]"),
    (np.ones((1, 4)), None, "two rows and columns"),
    (np.eye(4), np.ones((9, 3)), "3 dimensions and prototypes 4"),
    (np.eye(4), np.ones(4), r"embeddings have shape \[4\]: give \[N, D\]"),
    (
      np.ones((6, 4)),
      np.ones((4, 9)),
      "prototypes 4: they seem to be columns, 4 x 9: transpose",
    ),
    (np.eye(4), np.ones((1, 4)), "too few embeddings, 1: give two rows or more"),
    (
      np.eye(4),
      np.diag([0, 0, np.nan, 0]),
      "1 of 4 embeddings is not finite, row 2: see wh.* it out",
    ),
    (
      np.eye(4),
      np.diag([0, np.inf, np.nan, 0]),
      "2 of 4 embeddings are not finite, first row 1: see",
    ),
  ],
)
def test_arrays_that_cannot_be_diagnosed_are_one_line(weights, embeddings, said):
  with pytest.raises(errors.UserError, match=said) as caught:
    diagnosis.diagnose(weights, embeddings=embeddings)
  assert "\n" not in str(caught.value)


def test_of_several_sets_the_first_that_is_ill_has_the_verdict():
  sets = {"a": diagnosis.diagnose(_rows(40, 32)), "b": diagnosis.diagnose(np.ones((9, 4)))}
  found = diagnosis.joined(sets, lines=["file"], result={"kind": "file"})
  assert found.verdict == sets["b"].verdict and found.verdict.collapsed
  assert found.measures == sets["b"].measures and found.sets is sets
  assert str(found) == f"file\n\n{sets['a']}\n\n{sets['b']}"
  assert list(found.result["sets"]) == ["a", "b"] and found.result["kind"] == "file"


def test_copies_below_the_limit_are_said():
  rows = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
  rows[5:15] = rows[3]
  said = str(diagnosis.diagnose(rows))
  assert "10 rows are copies: more than 10% of all would be called a collapse" in " ".join(
    said.split()
  )
