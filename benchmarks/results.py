"""The papers' claims beside what was measured here: python -m benchmarks.results

Writes docs/results.md from docs/results/, trains nothing. A row of `CLAIMS` says what a paper says,
where it would show here, and what would have to hold for "seen"; numbers and verdicts come from the
JSON. What has not been tried stands there too.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from benchmarks import cifar10

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
QUICKSTART = ROOT / "docs" / "results" / "quickstart.json"
CAUSES = ROOT / "docs" / "results" / "collapse_causes.json"
LONG_TAIL = ROOT / "docs" / "results" / "long_tail.json"
IN_PART = "seen in part"

_BEFORE = """\
# The papers' claims, and ours beside them

Claims of the two papers that this library is about, what was measured here for each, and whether it
was seen. `python -m benchmarks.results` writes this page from `docs/results/`; how each number was
made is said there and under [Protocols](#protocols). Nothing here is of the papers' size: two CPU
cores, thousands of steps, images of 8 and 32 pixels. "Not seen" is what these runs say, and no
more; "not tested" is said as loudly as the rest. Numbers are percent, n how many seeds.

"""

_PROTOCOLS = """\
## Protocols

- **digits**: scikit-learn's handwritten digits, 8 x 8 pixels, 1,442 train and 355 test images; the
  quickstart's recipe, 512 prototypes of 32 dimensions, balanced targets, three seeds:
  `python benchmarks/quickstart.py`, versions and commits in `docs/results/quickstart.json`.
- **in four times as many steps**: the same for 10,000 steps, the mixture's horizon too, [what makes
  prototypes copies](collapse.md#what-makes-prototypes-copies).
- **CIFAR-10**: CIFAR-10 (JPEG copy), ViT of .47 M parameters, K = 1,024, D = 128 (4,096 codes for
  FALCON), 2,000 steps of 128 images (5.1 epochs), Sinkhorn targets in every row called dino:
  `python benchmarks/cifar10.py`, versions, commits and configs in `docs/results/cifar10/`.
- **unique**: share of K kept by the greedy cover at a cosine distance; **used**: share of K that is
  nearest to some train image; **k-NN**: weighted, cosine, k = 20, temperature .07, all train images
  as bank, held-out test images; **linear**: logistic regression on frozen features, its strength
  chosen on a tenth of the bank. Features of the teacher's backbone, last layer.
- Mean and standard deviation where there are several seeds. One value is called higher where means
  differ by more than both standard deviations together; of one seed nothing is called seen.
"""


class Value(NamedTuple):
  """Of one row, in percent."""

  mean: float
  deviation: float
  seeds: int

  def __str__(self) -> str:
    spread = f" ± {self.deviation:.1f}" if self.seeds > 1 else ""
    return f"{self.mean:.1f}{spread} (n = {self.seeds})"


class Claim(NamedTuple):
  """Attributes:
  paper: arXiv id, and where in it.
  says: the claim with its numbers.
  ours: what was measured, in words and numbers; "" where nothing was.
  seen: whether it was seen, or `IN_PART`; None where it was not tested.
  """

  paper: str
  says: str
  ours: str
  seen: bool | str | None


def measured(measure: str) -> Callable[[str], Value]:
  """A function of "SET: row" to a row's value: of digits, long runs on them, or CIFAR-10."""
  digits = json.loads(QUICKSTART.read_text())["rows"]
  causes = json.loads(CAUSES.read_text())
  several, single = cifar10.by_seed(), cifar10.published()

  def of_set(where: str, row: str) -> list[dict]:
    if where == "digits":
      return digits[row]
    if where == "long digits":
      seeds = [name for name in causes if name == row or name.startswith(f"{row}, seed ")]
      return [causes[name]["measures"] for name in seeds]
    return several.get(row) or [single[row]]

  def of(name: str) -> Value:
    where, _, row = name.partition(": ")
    values = [100.0 * run[measure] for run in of_set(where, row)]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Value(float(np.mean(values)), deviation, len(values))

  return of


def _above(one: Value, other: Value) -> bool:
  """Whether one is above another by more than both deviations, of several seeds each."""
  several = min(one.seeds, other.seeds) > 1
  return several and one.mean - other.mean > one.deviation + other.deviation


def _judged(comparisons: Iterable[bool]) -> bool | str:
  """True of all that hold, False of none, else `IN_PART`."""
  found = list(comparisons)
  return all(found) or (IN_PART if any(found) else False)


def while_learning() -> tuple[str, bool | str]:
  """When joint prototypes on digits draw together, and what the net knew by then; one seed.

  Returns:
    That in words, and whether any had drawn together in the first fifth of the run, at .25 and at
    .5: a tenth fewer of them unique than of random ones.
  """
  run = json.loads(CAUSES.read_text())["joint"]
  keys = ("collapse/unique_0.25", "collapse/unique_0.5", "probe/knn")
  unique, near, knn = (dict(run["curves"][key]) for key in keys)
  said = ", ".join(
    f"step {step:,}: {100 * unique[step]:.1f} and {100 * near[step]:.1f} "
    f"(k-NN {100 * knn[step]:.1f})"
    for step in (500, 1_000, 1_500, 2_500)
  )
  random = [run["measures"][f"{key}_random"] for key in keys[:2]]
  early = _judged(now[500] < 0.9 * free for now, free in zip((unique, near), random, strict=True))
  return f"unique at .25 and .5 at {said}; random ones {100 * random[1]:.1f} at .5", early


def at_equal_drift() -> str:
  """Uniqueness of joint prototypes and of a mixture beside their drift, in words; one seed each."""
  rows = json.loads(CAUSES.read_text())

  def said(row: str, threshold: str) -> str:
    of = rows[row]["measures"]
    unique = 100 * of[f"collapse/unique_{threshold}"]
    return f"{unique:.1f} at .{threshold[2:]} (drift {of['collapse/drift']:.2f})"

  slower = said("joint, half the rate", "0.25")
  return (
    f"digits, one seed each: joint at half the learning rate {slower}, "
    f"a mixture at half its horizon {said('mixture, half the horizon', '0.25')}, at a twentieth "
    f"{said('mixture, a twentieth of the horizon', '0.025')}: a mixture moves less unless its "
    "horizon is short, and moved as far it is no more unique"
  )


def rare_classes() -> str:
  """Balanced and rare accuracies on the long tail of CIFAR-10, in words; one seed."""
  rows = json.loads(LONG_TAIL.read_text())

  def said(row: str) -> str:
    of = rows[row]["measures"]
    return ", ".join(f"{100 * of[key]:.1f}" for key in ("linear_balanced", "linear_medium"))

  return (
    f"CIFAR-10 with 5,000 images of one class down to 50: linear, balanced and of the two rare "
    f"classes, joint {said('joint')}, decoupled {said('mixture, balanced')} (n = 1): nothing for "
    "the rare ones in either"
  )


def claims() -> list[Claim]:
  """In the order of the papers; questions that neither asks come after its claims."""
  copies, bunched, near = (measured(f"collapse/unique_{t}") for t in ("0.025", "0.25", "0.5"))
  random = measured("collapse/unique_0.5_random")
  used, knn, linear = map(measured, ("collapse/used", "probe/knn", "probe/linear_fitted"))
  joint, apart = "digits: joint", "digits: decoupled"
  long = "long digits: joint, four times as long"
  long_apart = "long digits: mixture, four times as long, horizon too"
  recipes_horizon = "long digits: mixture, four times as long"
  dino, balanced, paper = (
    f"CIFAR-10: dino {kind}" for kind in ("joint", "mixture, balanced", "mixture, paper")
  )
  frozen = "CIFAR-10: dino frozen"
  carp, carp_apart = "CIFAR-10: carp joint", "CIFAR-10: carp mixture"
  swav, swav_apart = "CIFAR-10: swav", "CIFAR-10: swav mixture"
  falcon, *others = (
    f"CIFAR-10: {row}" for row in ("falcon", "barlow twins", "swav", "self-classifier", "gedi")
  )
  decoupled = (apart, balanced, paper)
  centred, centred_apart = (f"digits: {row}, centred targets" for row in ("joint", "decoupled"))
  centred += " (DINO's)"
  on_digits = ((joint, apart), (long, long_apart))
  pairs = ((joint, apart), (dino, balanced), (carp, carp_apart), (swav, swav_apart))
  published = cifar10.published()
  pixels = published["raw pixels"]
  when, early = while_learning()
  ranks = {
    row: f"{published[row]['collapse/rankme']:.1f}" for row in ("falcon", "untrained encoder")
  }
  return [
    Claim(
      "2510.20108, table 1",
      "Prototypes learned jointly become copies: of DINO's 60,000, 908 are unique at .025 (1.5 %), "
      "of CARP's 65,536, 7,052 (10.8 %)",
      f"unique at .025: digits {copies(joint)}, in four times as many steps {copies(long)}, "
      f"CIFAR-10 dino {copies(dino)}, carp {copies(carp)}: only runs that are long for their data "
      "have copies, and then a tenth of what the paper has",
      _judged(
        (_above(copies(joint), copies(long)), copies(dino).mean < 50, copies(long).mean < 50)
      ),
    ),
    Claim(
      "2510.20108",
      "They draw together early in training",
      f"unique at .25 after 2,500 steps: digits joint {bunched(joint)}, decoupled "
      f"{bunched(apart)}; {when}; on CIFAR-10 not yet: at .5 dino {near(dino)}, carp {near(carp)}",
      early,
    ),
    Claim(
      "2510.20108, table 1 and figure 3",
      "Decoupled prototypes stay unique: 100 % at .025",
      f"digits {copies(apart)}, in four times as many steps {copies(long_apart)}, CIFAR-10 "
      f"{copies(balanced)}, as in the paper {copies(paper)}",
      _above(copies(long_apart), copies(long))
      and min(copies(x).mean for x in (*decoupled, long_apart)) > 99.0,
    ),
    Claim(
      "asked here",
      "Are they more unique than joint ones that have moved as little?",
      at_equal_drift(),
      False,
    ),
    Claim(
      "2510.20108, table 1 and figure 3",
      "... and 100 % at .25",
      f"digits {bunched(apart)}, CIFAR-10 {bunched(balanced)}, as in the paper {bunched(paper)}; "
      f"in four times as many steps on digits {bunched(long_apart)}, with a horizon of 7,000 steps "
      f"{bunched(recipes_horizon)}, where joint ones are {bunched(long)}",
      min(bunched(x).mean for x in (*decoupled, long_apart)) > 99.0,
    ),
    Claim(
      "2510.20108, figure 3",
      "... and 100 % at .5",
      f"digits {near(apart)}, where random ones are {random(apart)}; CIFAR-10 {near(balanced)}, as "
      f"in the paper {near(paper)}",
      min(near(x).mean for x in decoupled) > 99.0,
    ),
    Claim(
      "2510.20108, figure 3",
      "k-NN on ImageNet rises from 67.7 to 69.5 (CARP)",
      f"on CIFAR-10 it does not: carp {knn(carp)}, decoupled {knn(carp_apart)}; no ImageNet here",
      None,
    ),
    Claim(
      "2510.20108, table 3",
      "k-NN and linear accuracy on ImageNet are above DINO's",
      "neither ImageNet nor DINO's targets here, see the next line; on digits, with DINO's targets "
      f"on both sides: k-NN joint {knn(centred)}, decoupled {knn(centred_apart)}; linear "
      f"{linear(centred)}, {linear(centred_apart)}",
      None,
    ),
    Claim(
      "asked here",
      "Are k-NN and linear accuracy on CIFAR-10 above those of joint prototypes with the same "
      "(Sinkhorn) targets, and of frozen ones?",
      f"k-NN joint {knn(dino)}, frozen {knn(frozen)}, decoupled {knn(balanced)}, as in the paper "
      f"{knn(paper)}, raw pixels {100 * pixels['probe/knn']:.1f}; linear {linear(dino)}, "
      f"{linear(frozen)}, {linear(balanced)}, {linear(paper)}, raw pixels "
      f"{100 * pixels['probe/linear_fitted']:.1f}",
      _judged(_above(of(balanced), of(row)) for of in (knn, linear) for row in (dino, frozen)),
    ),
    Claim(
      "2510.20108, table 2",
      "Rare classes gain on long-tailed images (iNaturalist-2018)",
      rare_classes(),
      None,
    ),
    Claim(
      "asked here",
      "Are decoupled prototypes better used?",
      f"used, joint and decoupled: digits {used(joint)}, {used(apart)}; CIFAR-10 dino "
      f"{used(dino)}, {used(balanced)}, as in the paper {used(paper)}; carp {used(carp)}, "
      f"{used(carp_apart)}; swav {used(swav)}, {used(swav_apart)}",
      _judged(_above(used(two), used(one)) for one, two in pairs),
    ),
    Claim(
      "asked here",
      "Are features of digits better?",
      f"k-NN joint {knn(joint)}, decoupled {knn(apart)}, in four times as many steps {knn(long)}, "
      f"{knn(long_apart)}; linear {linear(joint)}, {linear(apart)}, {linear(long)}, "
      f"{linear(long_apart)}; raw pixels 97.7 and 97.2, an image is .3",
      _judged(_above(of(two), of(one)) for of in (knn, linear) for one, two in on_digits),
    ),
    Claim(
      "2410.04959",
      "A fixed dictionary and its loss avoid collapses of representation, dimensions and clusters",
      f"CIFAR-10: {used(falcon)} of 4,096 codes used, RankMe {ranks['falcon']}, the lowest of "
      f"the README's table (untrained {ranks['untrained encoder']}), after 2,000 steps",
      None,
    ),
    Claim(
      "2410.04959, table 1",
      "Accuracy above Barlow Twins, SwAV, Self-Classifier and GEDI (ResNet-8, CIFAR-10: 68)",
      f"k-NN of a small ViT: {', '.join(f'{x[10:]} {knn(x)}' for x in (falcon, *others))}: "
      "another net and measure",
      None,
    ),
    Claim(
      "2410.04959, table 2",
      "Linear accuracy on ImageNet-100 grows with the number of codes, 64.9 to 74.0",
      "",
      None,
    ),
  ]


def floors() -> str:
  """Accuracies without training, a Markdown table."""
  digits = json.loads(QUICKSTART.read_text())["rows"]["joint"]
  cifar = cifar10.published()
  lines = ["| floor | digits: k-NN | linear | CIFAR-10: k-NN | linear |", "|---|---|---|---|---|"]
  for name, keys, row in (
    ("raw pixels", ("floor/knn_pixels", "floor/linear_pixels"), "raw pixels"),
    ("untrained net", ("floor/knn_untrained", None), "untrained encoder"),
  ):
    cells = [f"{100 * np.mean([r[k] for r in digits]):.1f}" if k else "–" for k in keys]
    cells += [f"{100 * cifar[row][k]:.1f}" for k in ("probe/knn", "probe/linear_fitted")]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  knn, linear = measured("probe/knn"), measured("probe/linear_fitted")
  still = "digits: frozen random", "CIFAR-10: dino frozen"
  cells = [str(value(row)) for row in still for value in (knn, linear)]
  return "\n".join([*lines, "| prototypes that never move | " + " | ".join(cells) + " |"])


def page() -> str:
  """docs/results.md."""
  said = {True: "seen", False: "not seen", None: "not tested"}
  lines = ["| paper | it says | measured here | |", "|---|---|---|---|"]
  for one in claims():
    lines.append(
      f"| {one.paper} | {one.says} | {one.ours or '–'} | **{said.get(one.seen, one.seen)}** |"
    )
  table = "\n".join(lines)
  return f"{_BEFORE}{table}\n\n## Floors\n\n{floors()}\n\n{_PROTOCOLS}"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.parse_args()
  PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
  main()
