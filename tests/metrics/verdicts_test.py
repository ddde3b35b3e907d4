import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import config as configs
from protojax import metrics, trees
from protojax.methods import carp, self_classifier, swav
from protojax.metrics import chance, collapse, pairwise, verdicts

LN_K = math.log(4096)
# A run that is well: every measure there is.
WELL = {
  "train/loss": 7.91,
  "train/ln_k": LN_K,
  "train/target_entropy": 6.10,
  "collapse/unique_0.025": 1.0,
  "collapse/unique_0.025_random": 1.0,
  "collapse/drift": 0.4,
  "collapse/used": 0.61,
  "collapse/used_sample": 0.2,
  "collapse/perplexity": 1200.0,
  "collapse/feature_std": 0.8,
  "collapse/mean_cosine": 0.3,
  "collapse/rankme": 143.2,
  "collapse/teacher_distance": 0.01,
  "probe/knn": 0.712,
  "time/img_per_s": 1630.4,
  "time/data_wait": 0.013,
}


def judge(changes=(), **options):
  """The verdict on WELL with changes; None takes a measure away."""
  given = {"num_prototypes": 4096, "step": 1200}
  return verdicts.judge({**WELL, **dict(changes)}, **{**given, **options})


def test_a_run_that_is_well_is_ok():
  verdict = judge()
  assert verdict.label == "ok" and not verdict.collapsed
  for part in ("unique 100%", "random ones 100%", "cosine 0.40", "used 61%", "perplexity 1,200"):
    assert part in verdict.sentence


@pytest.mark.parametrize(
  ("changes", "label", "words"),
  [
    ({"train/loss": math.nan}, "non-finite", ("train/loss", "optim.lr")),
    ({"collapse/rankme": math.inf}, "non-finite", ("collapse/rankme",)),
    ({"collapse/teacher_distance": 0.0}, "aliased teacher", ("share no arrays",)),
    (
      {"train/loss": 8.3178, "train/target_entropy": 8.317},
      "uniform collapse",
      ("loss 8.318 = ln 4096", "method.teacher_temp"),
    ),
    (
      {"train/loss": 8.3178, "train/target_entropy": None},
      "uniform collapse",
      ("loss 8.318 = ln 4096: every image",),
    ),
    (
      {"train/loss": 0.01, "train/target_entropy": 0.005, "collapse/perplexity": 1.01},
      "one-hot collapse",
      ("same prototype", "method.teacher_temp"),
    ),
    (
      {"collapse/feature_std": 0.004},
      "representation collapse",
      ("std 0.004", "teacher.momentum"),
    ),
    ({"collapse/perplexity": 2.5}, "cluster collapse", ("about 2 of 4,096", "sinkhorn")),
    ({"collapse/used_sample": 2 / 4096}, "cluster collapse", ("about 2 of 4,096",)),
    (
      {"collapse/perplexity": None, "collapse/perplexity_sample": 1.8},
      "cluster collapse",
      ("about 2 of 4,096",),
    ),
    (
      {"collapse/embedding_cosine": 1.0, "collapse/feature_std": 0.14},
      "dead projector",
      ("std 0.140", "head.norm=batch"),
    ),
    ({"collapse/rankme": 1.4, "collapse/feature_std": 0.1}, "dimensional collapse", ("1.4",)),
    ({"collapse/rankme": 4.0}, "dimensional collapse", ("4.0 directions",)),
    (
      {"collapse/unique_0.025": 0.37},
      "partial prototype collapse",
      ("63% of 4,096 prototypes are copies (random ones: 0%", "method.prototypes=mixture"),
    ),
  ],
)
def test_every_collapse_has_its_name_and_advice(changes, label, words):
  verdict = judge(changes)
  assert verdict.label == label and verdict.collapsed
  assert "\n" not in verdict.sentence
  for word in words:
    assert word in verdict.sentence


def test_advice_fits_what_the_run_has():
  """No momentum where no teacher is measured, no mixture for a dictionary that never moves."""
  alone = judge({"collapse/feature_std": 0.004, "collapse/teacher_distance": None})
  assert "teacher" not in alone.sentence and "raise batch_size" in alone.sentence
  codes = judge({"collapse/unique_0.025": 0.37}, prototypes="dictionary")
  said = "raise head.bottleneck or lower method.num_prototypes"
  assert codes.sentence.endswith(f"{said}, by protojax's names of settings")  # whose is it?
  own = judge({"collapse/unique_0.025": 0.37}, prototypes="dictionary", settings={})
  assert own.sentence.endswith(said)


def test_advice_does_not_tell_to_set_what_is_set():
  settings = {"method.targets": "sinkhorn", "optim.lr": 0.1, "head.norm_output": False}
  one = {"collapse/perplexity": 1.0, "train/target_entropy": 0.01}
  assert judge(one, settings=settings).sentence.endswith(": lower optim.lr")
  codes = judge(one, settings=settings, prototypes="dictionary").sentence
  assert codes.endswith(": set head.norm_output=True or lower optim.lr")
  settings["head.norm_output"] = True
  assert "norm_output" not in judge(one, settings=settings, prototypes="dictionary").sentence


def test_few_codes_in_the_sample_alone_count_late_only():
  few = {"collapse/perplexity": None, "collapse/perplexity_sample": 3.5}  # quickstart, step 120
  assert judge(few, step=499).label == "ok"
  assert judge(few, step=500).label == "cluster collapse"
  assert judge({**few, "train/target_entropy": 0.1}, step=100).label == "ok"
  one = {**few, "train/target_entropy": 0.1, "collapse/perplexity_sample": 1.1}
  assert judge(one, step=100).label == "one-hot collapse"
  assert judge({**few, "collapse/perplexity": 1.8}, step=100).label == "cluster collapse"


def test_what_else_holds_is_named_too():
  """Copies among the prototypes may be the reason why every image gets all of them."""
  changes = {"train/loss": 8.3178, "train/target_entropy": 8.317, "collapse/unique_0.025": 0.03}
  verdict = judge(changes)
  assert verdict.label == "uniform collapse"
  assert verdict.sentence.endswith("(also: partial prototype collapse)")


@pytest.mark.parametrize(
  "changes",
  [
    {"train/loss": 8.3178},  # crosses ln K on its way down, with targets that say something
    {"train/loss": 8.30, "train/target_entropy": None},
    {"train/target_entropy": 0.02},  # sharp and diverse is healthy
    {"collapse/unique_0.025": 0.93},
    {"collapse/unique_0.025": 0.4, "collapse/unique_0.025_random": 0.42},  # no room for more
    {"collapse/feature_std": 0.134, "collapse/rankme": 2.9},  # untrained ViT on digits
    {"collapse/embedding_cosine": 0.99998},
  ],
)
def test_healthy_oddities_are_ok(changes):
  assert judge(changes).label == "ok"


def test_of_several_terms_the_cross_entropy_is_compared_with_chance():
  """KoLeo or a patch loss beside it moves the loss, not the collapse."""
  flat = {"train/loss": LN_K + 1.5, "train/cross_entropy": LN_K, "train/target_entropy": LN_K}
  assert judge(flat).label == "uniform collapse"
  assert judge({**flat, "train/loss": LN_K, "train/cross_entropy": 7.0}).label == "ok"


def test_a_loss_says_nothing_where_a_method_names_no_ln_k():
  uniform = {"train/loss": LN_K, "train/target_entropy": LN_K}
  assert judge(uniform).label == "uniform collapse"
  assert judge({**uniform, "train/ln_k": None}).label == "ok"


def test_a_method_without_prototypes_is_judged_by_its_features():
  features = {"train/loss": 3.0, "collapse/feature_std": 0.8, "collapse/rankme": 40.0}
  verdict = verdicts.judge(features, num_prototypes=0, step=500, prototypes="none")
  assert verdict.label == "no collapse" and "prototype" not in verdict.sentence
  bad = {**features, "collapse/feature_std": 0.001}
  assert verdicts.judge(bad, num_prototypes=0, step=500).label == "representation collapse"


def test_one_hot_collapse_reads_the_largest_entropy():
  """CARP's targets spread over a block of the prototypes."""
  changes = {"train/target_entropy": 0.3, "collapse/perplexity": 1.0}
  assert judge(changes).label == "one-hot collapse"
  assert judge({**changes, "train/ln_k": math.log(8)}).label == "cluster collapse"


def test_first_steps_are_warming_up_unless_something_is_not_finite():
  """At step 0 teacher and student are equal and a centred target uniform: that is no collapse."""
  fresh = {
    "collapse/teacher_distance": 0.0,
    "train/loss": LN_K,
    "train/target_entropy": LN_K,
    "collapse/feature_std": 0.01,
    "collapse/used_sample": 1 / 4096,
  }
  verdict = judge(fresh, step=99)
  assert verdict.label == "warming up" and not verdict.collapsed
  assert judge(fresh, step=100).label == "aliased teacher"
  assert judge({**fresh, "train/loss": math.inf}, step=1).label == "non-finite"


def test_nothing_measured_is_no_collapse_and_has_no_numbers():
  for measures in ({}, dict.fromkeys(WELL)):
    verdict = verdicts.judge(measures, num_prototypes=64, step=500)
    assert verdict.label == "not judged" and not verdict.collapsed
    assert verdict.sentence == "nothing was measured yet that shows a collapse"


def test_what_was_not_measured_is_left_out_of_a_sentence():
  """Of a checkpoint the doctor knows neither where prototypes started nor the loss."""
  unique = {"collapse/unique_0.025": 0.16, "collapse/unique_0.025_random": 1.0}
  assert verdicts.judge(unique, num_prototypes=1000).sentence.startswith(
    "84% of 1,000 prototypes are copies (random ones: 0%; unique 16% (random ones 100%)): "
  )
  few = verdicts.judge({"collapse/perplexity": 1.2}, num_prototypes=1000).sentence
  assert few.startswith("one of 1,000 prototypes takes nearly all images (perplexity 1): ")
  few = verdicts.judge({"collapse/perplexity": 2.7}, num_prototypes=1000).sentence
  assert few.startswith("about 3 of 1,000 prototypes take nearly all images (perplexity 3): ")
  sample = {"collapse/perplexity_sample": 1.2}
  assert " nearly all images: " in verdicts.judge(sample, num_prototypes=1000).sentence
  unused = judge({"collapse/used": 0.01, "collapse/unique_0.025": None}).sentence
  assert unused.startswith("1.0% of 4,096 prototypes are used: ")
  flat = verdicts.judge({"collapse/feature_std": 0.004}, num_prototypes=0).sentence
  assert "(std 0.004 of 1): " in flat
  certain = {"collapse/perplexity": 1.0, "train/target_entropy": 0.01, "train/ln_k": LN_K}
  assert "(entropy 0.01 of 8.32): " in verdicts.judge(certain, num_prototypes=4096).sentence
  seen = {"collapse/feature_std": 0.8, "collapse/used": 0.6, "probe/knn": 0.7}
  assert verdicts.judge(seen, num_prototypes=64).sentence == (
    "prototypes used 60%; features std 0.80"
  )


def test_near_prototypes_among_near_features_are_a_narrow_cone():
  changes = {"collapse/unique_0.025": 0.04, "collapse/relative_uniqueness": 1.3}
  # Features are apart: the median distance of prototypes says nothing of copies of under half.
  for apart in ({"collapse/mean_cosine": 0.79}, {"collapse/embedding_cosine": 0.3}):
    assert judge({**changes, **apart}).label == "partial prototype collapse"
  changes["collapse/mean_cosine"] = 0.81
  verdict = judge(changes, prototypes="mixture")
  assert verdict.label == "narrow cone" and not verdict.collapsed
  copies = {**changes, "collapse/relative_uniqueness": 0.01}
  assert judge(copies, prototypes="mixture").label == "partial prototype collapse"


def test_advice_fits_the_run():
  few = {"collapse/unique_0.025": 0.1}
  assert "method.prototypes=mixture" not in judge(few, prototypes="mixture").sentence
  assert "mixture.horizon_steps" in judge(few, prototypes="mixture").sentence
  one = {"collapse/perplexity": 1.0}
  assert "method.targets=sinkhorn" in judge(one).sentence
  assert "method.targets" not in judge(one, settings={"optim.lr": 0.1, "batch_size": 64}).sentence


def test_advice_names_settings_that_exist():
  import re

  known = trees.flat(configs.default())
  every = " ".join(
    judge(c, settings=s, prototypes=p).sentence
    for s in (None, known)
    for p in ("learned", "mixture")
    for c in (
      {"train/loss": math.nan},
      {"collapse/teacher_distance": 0.0},
      {"train/loss": LN_K, "train/target_entropy": LN_K},
      {"train/target_entropy": 0.0, "collapse/perplexity": 1.0},
      {"collapse/perplexity": 1.0},
      {"collapse/feature_std": 0.0},
      {"collapse/rankme": 1.0},
      {"collapse/unique_0.025": 0.0},
      {"collapse/unique_0.025": 0.0, "collapse/relative_uniqueness": 1.0},
      {"collapse/used": 0.01},
      {"floor/knn_untrained": 0.9},
      {"floor/knn_untrained": 0.71},
    )
  )
  sections = "optim|method|mixture|teacher|augment|model|head|data|monitor"
  named = set(re.findall(rf"\b(?:{sections})\.[a-z_]+", every))
  assert len(named) > 8
  options = carp.OPTIONS | swav.OPTIONS | self_classifier.OPTIONS
  assert named <= set(known) | {f"method.{key}" for key in options}
  assert {"batch_size", "precision"} <= set(known)


# What a run that learns has beside WELL; the deviation of an accuracy of .3 is .0046 of 10,000.
LEARNS = {
  "floor/knn_untrained": 0.30,
  "floor/knn_pixels": 0.36,
  "floor/test_images": 10_000.0,
  "floor/loss_start": 8.5,
}


@pytest.mark.parametrize(
  ("changes", "label"),
  [
    ({}, "ok"),
    ({"probe/knn": 0.3301}, "ok"),
    ({"probe/knn": 0.3299}, "little learned yet"),
    ({"probe/knn": 0.3050}, "little learned yet"),
    ({"probe/knn": 0.3045}, "nothing learned yet"),
    ({"probe/knn": 0.3045, "floor/test_images": 30_000.0}, "little learned yet"),
    ({"probe/knn": 0.2910}, "nothing learned yet"),
    ({"probe/knn": 0.2905}, "worse than at the start"),
    # Raw pixels that are worse than the net are no bar: two standard deviations above it are.
    ({"probe/knn": 0.3045, "floor/knn_pixels": 0.1}, "nothing learned yet"),
    ({"probe/knn": 0.3091, "floor/knn_pixels": 0.1}, "little learned yet"),
    ({"probe/knn": 0.3093, "floor/knn_pixels": 0.1}, "ok"),
    ({"probe/knn": 0.3093, "floor/knn_pixels": None}, "ok"),
    ({"probe/knn": 0.3091, "floor/knn_pixels": 0.302}, "little learned yet"),
    ({"probe/knn": 0.60, "floor/knn": 0.3045}, "nothing learned yet"),  # of the floors' images
    ({"probe/knn": None}, "no collapse"),
    ({"probe/knn": None, "floor/knn_untrained": None, "floor/knn_pixels": None}, "no collapse"),
    ({"floor/knn_untrained": None, "floor/knn_start": 0.73}, "worse than at the start"),
    ({"train/loss": 8.59, "train/target_entropy": None}, "ok"),
    ({"train/loss": 8.61, "train/target_entropy": None}, "worse than at the start"),
    ({"train/loss": 9.0, "train/cross_entropy": 7.0}, "ok"),  # of several terms
    ({"train/loss": 8.61, "floor/loss_start": None}, "ok"),
    ({"probe/linear_fitted": 0.3863, "floor/linear_pixels": 0.40}, "ok"),  # deviations of .0069
    ({"probe/linear_fitted": 0.3860, "floor/linear_pixels": 0.40}, "worse than raw pixels"),
    (  # of more images than the floors
      {"probe/linear_fitted": 0.41, "floor/linear": 0.38, "floor/linear_pixels": 0.40},
      "worse than raw pixels",
    ),
    ({"probe/linear_fitted": 0.3860}, "ok"),
    ({"probe/linear_fitted": 0.3, "floor/linear_pixels": 0.4, "floor/test_images": 60.0}, "ok"),
    ({"collapse/unique_0.25": 0.89, "collapse/unique_0.25_random": 1.0}, "prototypes bunch"),
    ({"collapse/unique_0.25": 0.91, "collapse/unique_0.25_random": 1.0}, "ok"),
    ({"collapse/unique_0.25": 0.4, "collapse/unique_0.25_random": 0.45}, "ok"),  # few dimensions
    ({"collapse/unique_0.25": 0.4}, "ok"),  # of random ones nothing is known
    ({"collapse/used": 0.051}, "ok"),
    ({"collapse/used": 0.049}, "unique but unused"),
    ({"collapse/used": 0.049, "collapse/unique_0.025": None}, "unique but unused"),
    ({"collapse/used": 0.049, "collapse/unique_0.025": 0.5}, "partial prototype collapse"),
    ({"collapse/used": 0.049, "collapse/used_most": 0.20}, "unique but unused"),
    ({"collapse/used": 0.049, "collapse/used_most": 0.19}, "ok"),  # there were so few images
    ({"collapse/used": 0.2, "collapse/used_random": 0.39}, "ok"),
    ({"collapse/used": 0.2, "collapse/used_random": 0.41}, "unique but unused"),
    ({"collapse/used_sample": 0.2, "collapse/used_sample_random": 0.39}, "ok"),
    ({"collapse/used_sample": 0.2, "collapse/used_sample_random": 0.41}, "unique but unused"),
  ],
)
def test_ok_needs_a_net_that_learned_and_prototypes_that_are_used(changes, label):
  verdict = judge({**LEARNS, **changes})
  assert verdict.label == label
  assert label == "partial prototype collapse" or not verdict.collapsed


def test_what_is_no_collapse_is_told_with_its_numbers():
  worse = judge({**LEARNS, "probe/knn": 0.2, "train/loss": 9.0, "train/target_entropy": None})
  assert worse.sentence.startswith(
    "k-NN 20.0%, the untrained net 30.0%; loss 9.00, at the start 8.50, ln K 8.32: lower optim.lr"
  )
  little = judge({**LEARNS, "probe/knn": 0.31}).sentence
  assert "k-NN 31.0% is nearer to the untrained net's 30.0% than to the 36.0% of raw pixels" in (
    little
  )
  noisy = judge({**LEARNS, "probe/knn": 0.307, "floor/knn_pixels": 0.2}).sentence
  assert "30.7% is above the untrained net's 30.0% by less than two standard deviations (0.5%" in (
    noisy
  )
  again = judge({"floor/knn_start": 0.72}).sentence
  assert "is not above the net it started from's 72.0%" in again
  near = {"collapse/unique_0.25": 0.73, "collapse/unique_0.25_random": 1.0}
  assert "73% of 4,096 prototypes are unique at cosine distance 0.25 (random ones: 100%)" in (
    judge(near).sentence
  )
  assert judge(near | {"collapse/unique_0.025": 0.5}).sentence.count("also") == 0
  assert judge(near, prototypes="kmeans").label == "ok"  # means of features lie where those do
  mixture = judge(near, prototypes="mixture", settings={"mixture.horizon_steps": 1200.0})
  assert mixture.sentence.endswith("raise mixture.horizon_steps to 2400 (from 1200)")
  assert "horizon_steps to twice what it is" in judge(near, prototypes="mixture").sentence
  below = judge({**LEARNS, "probe/linear_fitted": 0.3, "floor/linear_pixels": 0.36})
  assert below.sentence.startswith("linear 30.0% on frozen features, 36.0% on raw pixels: raise ")
  used = {"collapse/used": 0.049, "collapse/used_random": 0.5}
  assert "4.9% are used; random ones on the same embeddings: 50.0%" in judge(used).sentence


def test_prototypes_have_time_to_be_used():
  """Self-Classifier and SwAV with a mixture begin with two or three codes."""
  few = {"collapse/used": 0.04}
  assert judge(few, step=499).label == "ok"
  assert judge(few, step=500).label == "unique but unused"
  assert judge(few, step=400, num_steps=400).label == "unique but unused"
  assert judge(few, step=None).label == "unique but unused"


def test_nothing_is_well_after_one_update():
  assert metrics.verdict(WELL | {"collapse/num_prototypes": 4096}).label == "ok"
  one = metrics.verdict(WELL | {"collapse/num_prototypes": 4096}, step=1)
  assert one.label == "warming up"
  short = _config()
  short.num_steps = 20
  assert verdicts.of_run(WELL, config=short, step=20).label == "warming up"


def test_a_loss_that_rises_above_chance_is_not_ok():
  """Four nats and a half at the start, five later, where saying nothing would give 4.34."""
  rising = {**WELL, "train/loss": 5.07, "train/ln_k": 4.34, "train/target_entropy": 3.0}
  verdict = judge({**rising, "floor/loss_start": 4.54}, num_prototypes=77)
  assert verdict.label == "worse than at the start" and "loss 5.07, at the start 4.54" in (
    verdict.sentence
  )


def test_uniqueness_alone_is_not_ok():
  rows = np.asarray(chance.random_prototypes(64, 32))
  alone = metrics.verdict(metrics.summary(prototypes=rows))
  assert alone.label == "unique, use unknown" and not verdicts.is_alarm(alone)
  embeddings = np.random.default_rng(0).normal(size=(500, 32))
  assert metrics.verdict(metrics.summary(prototypes=rows, embeddings=embeddings)).label == (
    "no collapse"
  )


def test_measures_of_collapsed_arrays_reach_the_right_verdict():
  rng = np.random.default_rng(0)
  good = rng.normal(size=(400, 32))
  rows = np.asarray(chance.random_prototypes(64, 32))

  def label(features=good, matrix=rows, codes=None, teacher_scale=1.01):
    encoder = {"w": jnp.ones((3, 3))}
    teacher = jax.tree.map(lambda x: x * teacher_scale, encoder)
    codes = rng.integers(64, size=400) if codes is None else codes
    measures = {
      "collapse/feature_std": collapse.feature_std(features),
      "collapse/rankme": collapse.rankme(features),
      "collapse/unique_0.025": pairwise.unique_counts(matrix)[0] / 64,
      "collapse/unique_0.025_random": chance.random_unique(64, 32)[0] / 64,
      "collapse/perplexity": collapse.usage_perplexity(codes, 64),
      "collapse/teacher_distance": collapse.teacher_distance(encoder, teacher),
    }
    measures = {k: float(v) for k, v in measures.items()}
    return verdicts.judge(measures, num_prototypes=64, step=500).label

  assert label() == "no collapse"
  assert label(matrix=np.repeat(rows[:8], 8, axis=0)) == "partial prototype collapse"
  assert label(codes=np.zeros(400, int)) == "cluster collapse"
  assert label(features=np.ones((400, 32)) + 1e-4 * good) == "representation collapse"
  assert label(features=good[:, :3] @ rows[:3]) == "dimensional collapse"
  assert label(teacher_scale=1.0) == "aliased teacher"


def test_a_verdict_needs_neither_step_nor_k():
  rng = np.random.default_rng(0)
  copies = np.repeat(rng.normal(size=(16, 32)), 4, axis=0)
  measures = metrics.summary(prototypes=copies, features=rng.normal(size=(100, 32)))
  verdict = metrics.verdict(measures)
  assert verdict.label == "partial prototype collapse" and "75% of 64" in verdict.sentence
  assert verdict == verdicts.judge(measures, num_prototypes=64, step=10**6)
  one = {"collapse/perplexity_sample": 1.2, "train/ln_k": math.log(512), "collapse/drift": None}
  assert metrics.verdict(one).sentence.startswith("one of 512 prototypes")
  aliased = metrics.verdict({**measures, "collapse/teacher_distance": 0.0})
  assert "the teacher equals the student: set" in aliased.sentence


def test_equal_embeddings_are_a_collapse_of_what_makes_them():
  """Not of the prototypes, of which equal embeddings can use but one."""
  rows = np.random.default_rng(0).normal(size=(256, 32))
  measures = metrics.summary(prototypes=rows, embeddings=np.tile(rows[:1], (400, 1)))
  verdict = metrics.verdict(measures)
  assert verdict.label == "representation collapse" and "(also: cluster" in verdict.sentence


def test_rows_without_direction_are_no_copies():
  rows = np.random.default_rng(0).normal(size=(256, 32))
  found = {}
  for zeros in (0, 20, 60):
    given = np.where(np.arange(256)[:, None] < zeros, 0.0, rows)
    measures = metrics.summary(prototypes=given, embeddings=rows[zeros:])
    looked = metrics.summary(prototypes=given, partners=collapse.partners(given, 128))
    share = looked.get("collapse/no_direction", 0.0)
    assert share == pytest.approx(zeros / 256, abs=0.01)
    assert ("collapse/no_direction" in measures) == bool(zeros)
    found[zeros] = metrics.verdict(measures)
  assert found[0].label == found[20].label == "no collapse"
  assert found[60].label == "prototypes without direction" and "23% of 256" in found[60].sentence
  assert "copies" not in found[60].sentence
  copied = np.where(np.arange(256)[:, None] < 60, 0.0, np.repeat(rows[:64], 4, axis=0))
  both = metrics.verdict(metrics.summary(prototypes=copied)).sentence
  assert both.startswith("57% of 256 prototypes are copies") and "(also: prototypes without" in both


def test_a_verdict_on_features_alone_says_nothing_of_prototypes():
  features = np.random.default_rng(0).normal(size=(100, 32))
  verdict = metrics.verdict({**metrics.summary(features=features), "train/loss": 2.0})
  assert verdict.label == "no collapse" and "prototypes" not in verdict.sentence
  assert metrics.verdict(metrics.summary(features=np.ones((9, 4)))).collapsed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_the_verdict_and_not_what_they_make(value):
  rows = np.random.default_rng(0).normal(size=(64, 32))
  bad = np.where(np.arange(64)[:, None] < 2, value, rows)
  found = metrics.verdict(metrics.summary(prototypes=bad, embeddings=rows), step=1)
  assert found.label == "non-finite" and found.collapsed
  assert found.sentence.startswith(
    "2 of 64 prototypes are not finite: nothing made with them means"
  )
  sets = {"prototypes": rows, "patch": bad}
  assert metrics.verdict(metrics.summary(prototypes=sets)).sentence.startswith(
    "2 of 64 patch proto"
  )


@pytest.mark.parametrize("ln_k", [{}, {"train/ln_k": math.nan}, {"collapse/num_prototypes": 64}])
def test_a_loss_that_is_not_finite_needs_no_k(ln_k):
  found = metrics.verdict({"train/loss": math.nan, **ln_k})
  assert found.label == "non-finite" and found.sentence.startswith("train/loss")


@pytest.mark.parametrize("measures", [{}, {"train/loss": 3.0}, {"collapse/used": 0.5}])
def test_measures_without_k_are_refused_in_one_line(measures):
  with pytest.raises(ValueError, match="how many prototypes.*collapse/num_prototypes") as caught:
    metrics.verdict(measures)
  assert "\n" not in str(caught.value)


def _config(name="dino", **method):
  config = configs.default(name)
  config.update({"num_steps": 5000, "batch_size": 82})
  config.method.update({"num_prototypes": 4096, **method})
  config.optim.warmup_steps = 100
  return config


def test_verdict_reads_the_config():
  uniform = {"train/loss": LN_K, "train/ln_k": LN_K, "train/target_entropy": LN_K}
  assert verdicts.of_run(uniform, config=_config(), step=100).label == "uniform collapse"
  assert verdicts.of_run(uniform, config=_config(), step=99).label == "warming up"
  assert "method.targets" in verdicts.of_run(uniform, config=_config(), step=100).sentence
  sentence = verdicts.of_run(uniform, config=_config("carp"), step=100).sentence
  assert "method.t" not in sentence and "optim.lr" in sentence
  sharp = {**uniform, "train/target_entropy": 7.0}
  assert verdicts.of_run(sharp, config=_config(), step=100).label == "not judged"
  certain = {"train/target_entropy": 0.5, "train/ln_k": math.log(512), "collapse/perplexity": 1.0}
  assert verdicts.of_run(certain, config=_config("carp"), step=100).label == "one-hot collapse"
  longer = _config()
  longer.optim.warmup_steps = 2000
  assert verdicts.of_run(uniform, config=longer, step=499).label == "warming up"
  assert verdicts.of_run(uniform, config=longer, step=500).label == "uniform collapse"
  short = _config()
  short.num_steps, short.optim.warmup_steps = 300, 2000
  assert verdicts.of_run(uniform, config=short, step=149).label == "warming up"
  assert verdicts.of_run(uniform, config=short, step=150).label == "uniform collapse"


@pytest.mark.parametrize(
  ("start", "knn", "label"),
  [(59 / 60, 59 / 60, "no collapse"), (1.0, 1.0, "no collapse"), (0.9, 0.9, "nothing learned yet")],
)
def test_where_the_untrained_net_is_right_nobody_is_told_to_train_on(start, knn, label):
  """59 of 60 images: two standard deviations above that lie above all of them."""
  floors = {"floor/knn_untrained": start, "floor/knn_pixels": start, "floor/test_images": 60.0}
  found = judge({**floors, "probe/knn": knn}, step=1000)
  assert found.label == label
  assert ("more of them, or harder ones" in found.sentence) == (label == "no collapse")


def test_few_images_do_not_make_prototypes_unused_that_random_ones_do_not_use_either():
  seen = {"collapse/used": 0.016, "collapse/used_random": 0.018, "collapse/unique_0.025": 1.0}
  few = seen | {"collapse/used_most": 0.078}
  assert verdicts.judge(few, num_prototypes=512).label != "unique but unused"
  many = seen | {"collapse/used_most": 0.2}
  assert verdicts.judge(many, num_prototypes=512).label == "unique but unused"
