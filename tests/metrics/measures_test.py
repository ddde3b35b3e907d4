"""One table of measures: what it computes, under which names, and who shows it."""

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from protojax import errors, metrics
from protojax.metrics import chance, collapse, diagnosis, measures, pairwise, rules
from protojax.reports import curves, numbers, record
from protojax.training import console

_RNG = np.random.default_rng(0)
_K, _D, _N = 48, 8, 60
_ARRAYS = {
  "prototypes": _RNG.normal(size=(_K, _D)).astype(np.float32),
  "initial_prototypes": _RNG.normal(size=(_K, _D)).astype(np.float32),
  "features": _RNG.normal(size=(_N, 12)).astype(np.float32),
  "embeddings": _RNG.normal(size=(_N, _D)).astype(np.float32),
  "codes": _RNG.integers(_K, size=_N).astype(np.int32),
}
_NAMES = (
  *("num_prototypes", "unique_0.025", "unique_0.25", "unique_0.5", "used", "perplexity", "drift"),
  *("used_most", "used_random"),
  *("relative_uniqueness", "embedding_cosine", "unique_of"),
  *("rankme", "feature_std", "mean_cosine", "teacher_distance"),
)


@pytest.fixture
def known_rows(monkeypatch):
  """The table without rows that came later, so that names can be compared to the last one."""
  rows = tuple(row for row in measures.MEASURES if row.name in _NAMES)
  assert sorted(row.name for row in rows) == sorted(_NAMES)
  monkeypatch.setattr(measures, "MEASURES", rows)


@pytest.mark.usefixtures("known_rows")
def test_every_name_is_what_its_function_gives():
  encoder, teacher = {"w": jnp.ones(3)}, {"w": jnp.full(3, 1.5)}
  got = metrics.summary(**_ARRAYS, encoder=encoder, teacher=teacher)
  a, expected = _ARRAYS, {"num_prototypes": _K}
  counts = pairwise.unique_counts(a["prototypes"])
  for i, threshold in enumerate((0.025, 0.05, 0.1, 0.25, 0.5)):
    expected[f"unique_{threshold}"] = counts[i] / _K
    expected[f"unique_{threshold}_random"] = chance.random_unique(_K, _D)[i] / _K
  random = np.asarray(chance.random_prototypes(_K, _D))
  nearest = (a["embeddings"] @ random.T).argmax(axis=1)
  expected |= {
    "used": len(set(a["codes"].tolist())) / _K,
    "used_most": 1.0,
    "used_random": len(set(nearest.tolist())) / _K,
    "perplexity": collapse.usage_perplexity(a["codes"], _K),
    "drift": collapse.drift(a["prototypes"], a["initial_prototypes"]),
    "relative_uniqueness": collapse.relative_uniqueness(a["prototypes"], a["embeddings"]),
    "embedding_cosine": collapse.mean_pairwise_cosine(a["embeddings"]),
    "rankme": collapse.rankme(a["features"]),
    "feature_std": collapse.feature_std(a["features"]),
    "mean_cosine": collapse.mean_pairwise_cosine(a["features"]),
    "teacher_distance": 0.5,
  }
  assert got == {f"collapse/{k}": pytest.approx(float(v), rel=1e-6) for k, v in expected.items()}
  assert all(type(value) is float for value in got.values())


@pytest.mark.usefixtures("known_rows")
def test_what_is_not_given_is_not_measured():
  assert metrics.summary() == {}
  got = metrics.summary(features=_ARRAYS["features"])
  assert set(got) == {f"collapse/{k}" for k in ("rankme", "feature_std", "mean_cosine")}
  got = metrics.summary(codes=_ARRAYS["codes"], num_prototypes=_K)
  names = ("num_prototypes", "used", "used_most", "perplexity")
  assert set(got) == {f"collapse/{k}" for k in names}


def test_of_many_prototypes_some_stand_for_all_and_the_measures_say_so():
  some = collapse.partners(_ARRAYS["prototypes"], 12)
  got = metrics.summary(**_ARRAYS, partners=some)
  assert got["collapse/unique_of"] == 12
  assert got["collapse/unique_0.25"] == pytest.approx(some.unique[3] / _K)
  assert got["collapse/unique_0.25_random"] == pytest.approx(some.random[3] / _K)
  assert "collapse/unique_of" not in metrics.summary(**_ARRAYS)


def test_prototypes_are_compared_once(monkeypatch):
  compared = []
  pairs = pairwise.pairs
  monkeypatch.setattr(pairwise, "pairs", lambda *a: [compared.append(1), pairs(*a)][1])
  metrics.summary(**_ARRAYS)  # random prototypes are compared too, once a process
  compared.clear()
  metrics.summary(**_ARRAYS)
  assert len(compared) == 1


def test_the_names_of_a_sample_say_so():
  few = {"codes": _ARRAYS["codes"][:12], "embeddings": _ARRAYS["embeddings"][:12]}
  got = metrics.summary(**few, prototypes=_ARRAYS["prototypes"], sample=True)
  assert got["collapse/used_sample_most"] == 12 / _K
  assert 0 < got["collapse/used_sample_random"] <= 12 / _K
  assert {"collapse/used_sample", "collapse/perplexity_sample"} <= set(got)
  assert not {"collapse/used", "collapse/used_most", "collapse/used_random"} & set(got)


def test_embeddings_without_codes_are_coded_by_the_largest_cosine():
  scales = _RNG.uniform(0.1, 9, (_K, 1)).astype(np.float32)  # which a cosine does not see
  prototypes, embeddings = scales * _ARRAYS["prototypes"], _ARRAYS["embeddings"]
  unit = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
  codes = (embeddings @ unit.T).argmax(axis=1)
  got = metrics.summary(prototypes=prototypes, embeddings=embeddings)
  assert got == metrics.summary(prototypes=prototypes, embeddings=embeddings, codes=codes)
  assert 0 < got["collapse/used"] < 1


def test_sets_carry_their_name_and_samples_say_so():
  both = {"prototypes": _ARRAYS["prototypes"], "patch": _ARRAYS["prototypes"][:10]}
  codes = {"prototypes": _ARRAYS["codes"], "patch": _ARRAYS["codes"] % 10}
  got = metrics.summary(prototypes=both, codes=codes, sample=True)
  alone = metrics.summary(prototypes=both["patch"], codes=codes["patch"], sample=True)
  assert "collapse/used_sample" in alone and "collapse/used" not in alone
  for name, value in alone.items():
    assert got[name.replace("collapse/", "collapse/patch_")] == value
  assert got["collapse/num_prototypes"] == _K and got["collapse/patch_num_prototypes"] == 10


@pytest.mark.parametrize(
  "to", [jnp.asarray, np.ndarray.tolist, "torch"], ids=["jax", "lists", "torch"]
)
def test_arrays_of_other_libraries_give_the_same_numbers(to):
  if to == "torch":
    to = pytest.importorskip("torch").from_numpy
  got = metrics.summary(**{name: to(array) for name, array in _ARRAYS.items()})
  assert got == pytest.approx(metrics.summary(**_ARRAYS), rel=1e-6)


def test_torch_tensors_of_bfloat16_are_read_and_those_with_a_gradient_refused():
  torch = pytest.importorskip("torch")
  tensor = torch.from_numpy(_ARRAYS["prototypes"]).bfloat16()
  got = metrics.summary(prototypes=tensor)
  assert got == metrics.summary(prototypes=tensor.float().numpy())
  with pytest.raises(errors.UserError, match="without gradient") as caught:
    metrics.summary(prototypes=torch.ones(3, 2, requires_grad=True))
  assert "\n" not in str(caught.value)


def test_what_is_known_is_not_computed_again(monkeypatch):
  refused = measures.Measure("rankme", ("features",), lambda features: 1 / 0)
  monkeypatch.setattr(measures, "MEASURES", (refused,))
  known = {"collapse/rankme": 3.0}
  assert metrics.summary(features=_ARRAYS["features"], known=known) == known


@pytest.mark.parametrize(
  ("arrays", "said"),
  [
    ({"prototypes": np.ones(3)}, r"prototypes of 'prototypes' has shape \[3\]: give \[K, D\]"),
    ({"prototypes": np.ones((3, 2)), "embeddings": np.ones((5, 4))}, "4 dimensions and prototypes"),
    (
      {"prototypes": np.ones((3, 2)), "embeddings": np.ones((2, 5))},
      "to be columns, 2 x 5: tra",
    ),
    ({"prototypes": np.ones((3, 2)), "initial_prototypes": np.ones((4, 2))}, "of step 0"),
    ({"codes": np.zeros(4, int)}, "give num_prototypes"),
    ({"features": np.ones(4)}, r"give \[N, F\]"),
  ],
)
def test_shapes_that_do_not_fit_are_one_line(arrays, said):
  with pytest.raises(errors.UserError, match=said) as caught:
    metrics.summary(**arrays)
  assert "\n" not in str(caught.value)


def test_a_new_row_is_shown_by_log_line_report_and_doctor(monkeypatch, tmp_path):
  row = measures.Measure(
    "widest",
    ("prototypes",),
    lambda prototypes: jnp.linalg.norm(prototypes, axis=1).max(),
    form=".3f",
    short="wide",
    title="Widest prototype",
    meaning="largest norm",
  )
  monkeypatch.setattr(measures, "MEASURES", (*measures.MEASURES, row))
  weights = np.eye(6, 4, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]
  values = metrics.summary(prototypes=weights)
  assert values["collapse/widest"] == 1.0
  config = ml_collections.ConfigDict({"num_steps": 9, "batch_size": 4, "method": {}})
  line = console.log_line(3, values, rules.Verdict("ok", "", False), config=config)
  assert "  wide 1.000  [ok]" in line
  assert "\n  Widest prototype    1\n" in str(diagnosis.diagnose(weights))
  curve = {"collapse/widest": (np.array([1, 2]), np.array([1.0, 1.5]))}
  run = record.Record("a", tmp_path, ml_collections.ConfigDict(), curve, {}, {}, ())
  assert any("Widest prototype" in figure for figure in curves.prototypes([run], ""))
  table = numbers.key_numbers([run])
  assert (
    "Widest prototype" in table and "largest norm" in table and 'data-key="collapse/widest' in table
  )


def test_the_report_explains_every_measure_that_has_a_title():
  rows = [row for row in measures.MEASURES if row.title]
  assert {"rankme", "used", "unique_0.025"} <= {row.name for row in rows}
  assert all(row.meaning and "{" not in row.meaning for row in rows)
  assert len({row.title for row in rows}) == len(rows)


@pytest.mark.parametrize(
  ("codes", "words"),
  [
    (
      np.full(9, 99),
      "codes of 'prototypes' go from 99 to 99 and there are 16 prototypes: rows count",
    ),
    (np.arange(1, 17), "from 1 to 16 .* from 0 to 15"),
    (np.array([3, -1]), "from -1 to 3 .* leave images without one out"),
    (np.zeros(4), "codes of 'prototypes' are float64: give integers"),
  ],
)
def test_codes_that_are_no_rows_of_the_prototypes_are_refused(codes, words):
  with pytest.raises(errors.UserError, match=words):
    metrics.summary(prototypes=np.eye(16, dtype=np.float32), codes=codes)
  assert metrics.summary(codes=np.arange(16), num_prototypes=16)["collapse/used"] == 1.0


def test_codes_of_other_images_than_the_embeddings_are_refused():
  rows = np.eye(4, dtype=np.float32)
  words = "^2 codes of 'prototypes' and 4 embeddings: give both of the same images"
  with pytest.raises(errors.UserError, match=words):
    metrics.summary(prototypes=rows, embeddings=rows, codes=np.array([0, 1]))


def test_prototypes_that_are_not_finite_take_no_embedding():
  embeddings = _RNG.normal(size=(60, 8)).astype(np.float32)
  rows = _RNG.normal(size=(20, 8)).astype(np.float32)
  bad = np.insert(rows, 3, np.nan, axis=0)
  usual, found = (metrics.summary(prototypes=p, embeddings=embeddings) for p in (rows, bad))
  assert found["collapse/perplexity"] == pytest.approx(usual["collapse/perplexity"])
  assert found["collapse/used"] == pytest.approx(usual["collapse/used"] * 20 / 21)
  none = metrics.summary(prototypes=np.full_like(rows, np.nan), embeddings=embeddings)
  assert "collapse/used" not in none
