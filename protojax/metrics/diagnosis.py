"""A set of prototypes in numbers, and what the numbers mean; for checkpoints, on the host."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from absl import logging
from scipy import special
from sklearn import preprocessing

from protojax import errors
from protojax.metrics import chance, collapse, measures, rules, uniqueness, verdicts

_QUANTILES = (0.05, 0.5, 0.95)
_ROWS = 256  # embeddings compared with all prototypes at a time
_GROUPS, _MEMBERS = 5, 5  # largest groups, and members of each, that are named
_CHAINED = 0.5  # components over unique prototypes, below which they are no separate groups
_CONE = 0.5  # mean cosine of prototypes that point the same way; random ones have 0
_SAME = 1e-6  # cosine distance of directions that differ by rounding alone
_NORMS = 3.0  # largest norm over the median, of prototypes that win by their norm
_FLAT = 0.5  # of the rank there could be
_EXPLAINED = "docs/instruments.md, The numbers"
_MANY = 100_000  # prototypes; 65,536 of 256 dimensions take less than a minute of two cores


class Diagnosis(NamedTuple):
  """What was found out about prototypes, a run or a log; printed, it reads as a page of text.

  Attributes:
    verdict: one for all. Of several sets that of the first that is not well; of a run that on its
      metrics, where there are some; None where there is nothing to judge.
    measures: by the names of metrics.jsonl, of the set that has the verdict; {} without prototypes.
    sentences: what it means and what to try, the verdict first.
    result: everything as JSON.
    lines: of the page.
    sets: {name: its own diagnosis} for every set of prototypes in a file or a run.
  """

  verdict: rules.Verdict | None
  measures: dict[str, float]
  sentences: list[str]
  result: dict[str, Any]
  lines: list[str]
  sets: Mapping[str, Self] = {}

  def __str__(self) -> str:
    return "\n".join(self.lines)


def _spectrum(unit: np.ndarray) -> dict[str, float]:
  """Singular values of unit rows [K, D], not centred: effective rank, and what carries them."""
  # Of the D x D product in float64: its squares still have eight digits.
  gram = np.zeros((unit.shape[1],) * 2)
  for start in range(0, len(unit), 4096):
    rows = unit[start : start + 4096].astype(np.float64)
    gram += rows.T @ rows
  energy = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
  values = np.sqrt(energy)[: min(unit.shape)]
  share = values / values.sum() + 1e-7  # as arXiv 2210.02885, equation 1
  return {
    "rankme": float(np.exp(special.entr(share).sum())),
    "largest_possible": min(unit.shape),
    "directions_for_99_percent": int(np.searchsorted(energy.cumsum(), 0.99 * energy.sum()) + 1),
    "mean_cosine": float(collapse.mean_pairwise_cosine(unit)),
  }


def _range(values: np.ndarray) -> dict[str, float]:
  return {
    k: float(f(values)) for k, f in (("least", np.min), ("median", np.median), ("most", np.max))
  }


def _nearest_prototypes(
  weights: np.ndarray, unit: np.ndarray, embeddings: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(codes int [N], cosine distance to the nearest prototype [N]) of embeddings [N, D].

  Args:
    weights: float32 [K, D]; the one with the largest product is an embedding's code.
    unit: float32 [K, D], their directions.
    embeddings: [N, D].
  """
  codes, distances = [], []
  for start in range(0, len(embeddings), _ROWS):
    rows = preprocessing.normalize(embeddings[start : start + _ROWS])
    cosine = rows @ unit.T
    distances.append(1.0 - cosine.max(axis=1))
    codes.append((cosine if weights is unit else rows @ weights.T).argmax(axis=1))
  return np.concatenate(codes), np.concatenate(distances)


def examine(
  weights: np.ndarray,
  *,
  gain: np.ndarray | None = None,
  cosine: bool = False,
  embeddings: np.ndarray | None = None,
  features: np.ndarray | None = None,
) -> dict[str, Any]:
  """Everything about one set of prototypes that can be seen without its run.

  Args:
    weights: float32 [K, D], K and D above 1, rows of any norm.
    gain: [K], factors of a weight-normalised layer, if it is one.
    cosine: whether features are compared with directions only.
    embeddings: float32 [N, D], N > 1, to see which prototypes are used.
    features: float32 [N, F] of the backbone, what a run measures RankMe and spread of; without
      them those are of the embeddings. Only with embeddings.

  Returns:
    What can be written as JSON: "measures" by the names of metrics.jsonl; and, beside them, counts
    of `uniqueness.measure`, cosine distances, norms.
  """
  num, dim = weights.shape
  found, null = uniqueness.measure(weights), uniqueness.null(num, dim)
  directed = found.owner[0] >= 0
  lost = np.flatnonzero(~directed)
  headline = found.thresholds.index(rules.HEADLINE)
  groups = uniqueness.largest_groups(found.owner[headline], _GROUPS)
  known = measures.uniqueness(found.unique, null.unique, num)
  result = {
    "num": num,
    "dim": dim,
    "thresholds": list(found.thresholds),
    "unique": {k: getattr(found, k).tolist() for k in ("unique", "components", "isolated")},
    "random": {k: getattr(null, k).tolist() for k in ("unique", "components", "isolated")},
    "random_drawn": null.drawn,
    "groups": [{"size": len(g), "first": g[:_MEMBERS].tolist()} for g in groups],
    "without_direction": {
      "zero": int(np.sum(np.isfinite(weights[lost]).all(axis=1))),
      "not_finite": int(np.sum(~np.isfinite(weights[lost]).all(axis=1))),
      "first": lost[:_MEMBERS].tolist(),
    },
  }
  if directed.sum() < 2:
    return result | {"measures": _measures(known, num_prototypes=num)}
  norms = np.linalg.norm(weights[directed].astype(np.float64), axis=1)
  unit = np.zeros_like(weights)
  unit[directed] = weights[directed] / norms[:, None]
  near = found.nearest[directed]
  rows = np.ascontiguousarray(weights[directed])
  different = np.unique(rows.view(np.dtype((np.void, rows.dtype.itemsize * dim)))).size
  result |= {
    "copies_to_the_bit": len(rows) - different,
    "alike": bool(np.min(unit[directed] @ unit[directed][0]) > 1.0 - _SAME),
    "nearest": {
      "quantiles": list(_QUANTILES),
      "distance": np.quantile(near, _QUANTILES).tolist(),
      "random": uniqueness.null_nearest(num, dim, _QUANTILES).tolist(),
    },
    "norm": _range(norms),
    "spectrum": _spectrum(unit[directed]),
  }
  if gain is not None:
    result["gain"] = _range(np.asarray(gain, np.float64))
  if embeddings is None:
    return result | {"measures": _measures(known, prototypes=unit)}
  directions_only = cosine or (directed.all() and np.ptp(norms) < 1e-6)
  compared = unit if directions_only else np.where(directed[:, None], weights, 0.0)
  codes, distances = _nearest_prototypes(compared, unit, embeddings)
  if not directions_only:  # random ones are compared in the same way: their directions, these norms
    random = np.asarray(chance.random_prototypes(num, dim))
    lengths = np.zeros(num, np.float32)
    lengths[directed] = norms
    taken, _ = _nearest_prototypes(random * lengths[:, None], random, embeddings)
    known["used_random"] = np.unique(taken).size / num
  # All pairs of prototypes have been compared: not once more.
  known["relative_uniqueness"] = float(np.median(near)) / max(float(np.median(distances)), 1e-7)
  result["measures"] = _measures(
    known,
    prototypes=unit,
    features=embeddings if features is None else features,
    embeddings=embeddings,
    codes=codes,
  )
  counts = np.bincount(codes, minlength=num)
  of_embeddings = {"features", "embeddings", "codes"}
  named = [row for row in measures.MEASURES if of_embeddings & set(row.inputs)]
  result["usage"] = {
    "images": len(embeddings),
    "compared_by": "cosine" if directions_only else "product",
    "features": "the head's embeddings" if features is None else "the backbone's features",
    "unused": int(np.sum(counts == 0)),
    "largest_share": float(counts.max() / len(embeddings)),
  } | {row.name: row.value(result["measures"]) for row in named}
  return result


def _measures(known: Mapping[str, float], **arrays) -> dict[str, float]:
  return measures.summary(known={f"collapse/{k}": v for k, v in known.items()}, **arrays)


def _rows_are(count: int) -> str:
  return "1 row is" if count == 1 else f"{count:,} rows are"


def not_finite(count: int, num: int) -> rules.Verdict:
  """The verdict on a matrix of `num` rows, `count` of which are not finite."""
  return rules.Verdict(
    "non-finite",
    f"{count:,} of {num:,} rows are not finite: nothing made with them means anything, and "
    "training on will spread it; go back to a checkpoint without them",
    True,
  )


def words(
  result: Mapping[str, Any],
  *,
  cosine: bool,
  prototypes: str = "learned",
  for_usage: str = "embeddings",
  use: Mapping[str, float] | None = None,
  circumstances: Mapping[str, Any] | None = None,
) -> tuple[rules.Verdict, list[str]]:
  """The verdict on `examine`'s result, and a few sentences: what it means and what to try.

  Args:
    result: from `examine`.
    cosine: whether features are compared with directions only.
    prototypes: how they were made, `method.prototypes`; "learned" for other people's.
    for_usage: what to give to see which are used.
    use: what somebody else measured of that, by the names of metrics.jsonl.
    circumstances: of the run, from `verdicts.circumstances_of`; they say `prototypes`, too.
  """
  num = result["num"]
  known = {**result["measures"], **(use or {})}
  lost = result["without_direction"]
  told = {"prototypes": prototypes} | dict(circumstances or {})
  alike = result.get("alike", False)
  bad = [not_finite(lost["not_finite"], num)] if lost["not_finite"] else []
  verdict = verdicts.judge(known, num_prototypes=num, alike=alike, already=bad, **told)
  unique, random = result["unique"]["unique"], result["random"]["unique"]
  headline = result["thresholds"].index(rules.HEADLINE)
  count = unique[headline]
  well = not verdicts.is_alarm(verdict)
  if well:
    used = measures.BY_NAME["used"].value(known)
    early = f"{verdict.sentence}; " * (verdict.label == "warming up")
    out = [
      f"{verdict.label}: {early}{count:,} of {num:,} prototypes are unique, random ones "
      f"{random[headline]:,}" + ("" if used is None else f"; {used:.1%} are used")
    ]
  else:
    out = [f"{verdict.label}: {verdict.sentence}"]
  kinds = ((lost["zero"], "zero"), (lost["not_finite"], "not finite"))
  if said := " and ".join(f"{_rows_are(n)} {kind}" for n, kind in kinds if n):
    first, one = ", ".join(map(str, lost["first"])), len(lost["first"]) == 1
    out.append(
      f"{said} (first: {first}): {'it is no prototype' if one else 'they are no prototypes'}"
    )
  if "spectrum" not in result:
    few = f"fewer than two of {num:,} rows have a direction: nothing to compare"
    return verdict, [*out, few] if lost["not_finite"] else [few, *out[1:]]
  if alike:
    left = num - lost["zero"] - lost["not_finite"]
    what = (
      "are equal to the bit" if result["copies_to_the_bit"] == left - 1 else "have one direction"
    )
    some = " that are prototypes" * (left < num)
    out.append(f"all {left:,} rows{some} {what}: a complete collapse, one prototype {left:,} times")
  if verdict.label.endswith("prototype collapse"):
    out.append(
      f"the effective number of clusters is about {count:,}, {num / count:.1f} prototypes to each"
      + "; learned together with the encoder, prototypes do this whatever K is (arXiv 2510.20108 "
      "has 908 of 60,000 for DINO): more of them will not help; moving them outside the gradient "
      "(in protojax: method.prototypes=mixture) or pushing them apart (KoLeo on prototypes, arXiv "
      "2410.14060; in protojax: method.koleo_proto) may" * (prototypes == "learned")
    )
  for threshold, one, other in zip(result["thresholds"], unique, random, strict=True):
    if well and other - one > rules.LIMITS["copies"] * num:
      out.append(
        f"at a distance of {threshold:g} only {one:,} are unique (random ones: {other:,}): they "
        "bunch, without being copies"
      )
      break
  if result["unique"]["components"][headline] < _CHAINED * count:
    out.append(
      f"they form {result['unique']['components'][headline]:,} chains of near neighbours, not "
      f"{count:,} separate groups: the greedy count depends on their order"
    )
  spectrum = result["spectrum"]
  if spectrum["mean_cosine"] > _CONE and "usage" not in result and not alike:
    out.append(
      f"prototypes point the same way (mean cosine {spectrum['mean_cosine']:.2f}): if the features "
      "do too, they are near without being redundant; embeddings tell"
    )
  if spectrum["rankme"] < _FLAT * spectrum["largest_possible"] and not verdict.collapsed:
    out.append(
      f"they span about {spectrum['rankme']:.0f} of {spectrum['largest_possible']} directions "
      "(RankMe)"
    )
  norm = result["norm"]
  if not cosine and norm["most"] > _NORMS * norm["median"]:
    out.append(
      f"the largest norm is {norm['most'] / norm['median']:.1f} times the median: such a prototype "
      "wins images by its norm; keep norms at 1 (norm_last_layer=True) or account for them (vMF)"
    )
  if "usage" not in result and not use:
    out.append(
      f"whether they are used cannot be seen from weights: give {for_usage}; random prototypes "
      "that never moved look as unique as the best"
    )
  return verdict, out


def _percent(count: int, num: int) -> str:
  return f"{count:,} ({count / num:.1%})"


def _table_row(name: str, cells) -> str:
  return f"  {name:<13}" + "".join(f"{cell:>17}" for cell in cells)


def _page(name: str, result: Mapping[str, Any]) -> list[str]:
  """The lines that show `examine`'s result for the set called `name`."""
  num, dim = result["num"], result["dim"]
  lines = [f"{name}: {num:,} prototypes of {dim} dimensions", ""]
  lines.append(_table_row("unique at", (f"{t:g}" for t in result["thresholds"])))
  for kind, label in (
    ("unique", "greedy cover"),
    ("components", "components"),
    ("isolated", "isolated"),
  ):
    lines.append(_table_row(label, (_percent(n, num) for n in result["unique"][kind])))
  lines.append(_table_row("random cover", (_percent(n, num) for n in result["random"]["unique"])))
  lines += [
    "  cover: in index order, strictly nearer; components: single linkage; isolated: none nearer;",
    "  random: greedy cover of unit rows of the same K and D, "
    + (
      "drawn once"
      if result["random_drawn"]
      else "not drawn: fewer than .001 near pairs are expected"
    ),
  ]
  if result["groups"]:
    lines.append(f"  largest groups of the cover at {rules.HEADLINE:g}, with their first rows:")
    lines += [
      f"    {g['size']:,}: {', '.join(map(str, g['first']))}"
      + ", ..." * (g["size"] > len(g["first"]))
      for g in result["groups"]
    ]
  lost = result["without_direction"]
  lines.append(f"  rows that are zero: {lost['zero']:,}, not finite: {lost['not_finite']:,}")
  if "spectrum" not in result:
    return lines
  near, spectrum, norm = result["nearest"], result["spectrum"], result["norm"]
  lines += [
    f"  copies to the bit: {result['copies_to_the_bit']:,}",
    "  nearest other prototype, 5 % / median / 95 %: "
    + " / ".join(f"{v:.4f}" for v in near["distance"]),
    "    of random ones, by the distribution of cosines on the sphere: "
    + " / ".join(f"{v:.4f}" for v in near["random"]),
    f"  norm, least / median / most: {norm['least']:.4g} / {norm['median']:.4g} / "
    f"{norm['most']:.4g}"
    + (
      f"; gain g {result['gain']['least']:.4g} to {result['gain']['most']:.4g}"
      if "gain" in result
      else ""
    ),
    f"  spectrum of the directions: RankMe {spectrum['rankme']:.1f} of "
    f"{spectrum['largest_possible']}, {spectrum['directions_for_99_percent']} singular values hold "
    f"99 % of the energy, mean cosine {spectrum['mean_cosine']:z.3f}",
  ]
  if "usage" in result:
    usage = result["usage"]
    by = {
      "cosine": "largest cosine, for random prototypes too",
      "product": "largest product, norms count; random prototypes have these norms; cosine=True "
      "compares directions",
    }[usage["compared_by"]]
    lines.append(
      f"  usage by {usage['images']:,} embeddings ({by}): {usage['unused']:,} by none, the most "
      f"used takes {usage['largest_share']:.1%}; RankMe and spread are of {usage['features']}"
    )
  counted = {f"unique_{t}" for t in result["thresholds"]} | {"num_prototypes"}  # shown above
  shown = [row for row in measures.MEASURES if row.name not in counted]
  values = [(row, row.value(result["measures"])) for row in shown]
  if any(value is not None for _, value in values):
    lines.append(f"  what these mean: {_EXPLAINED}")
  return lines + [
    f"  {row.title or row.label or row.name.replace('_', ' '):<19} "
    + (f"{value:.1%}" if row.is_share else f"{value:.4g}")
    for row, value in values
    if value is not None
  ]


def joined(
  sets: Mapping[str, Diagnosis],
  *,
  lines: Sequence[str],
  result: Mapping[str, Any],
  verdict: rules.Verdict | None = None,
) -> Diagnosis:
  """One diagnosis of a file or a run from those of its sets of prototypes.

  Args:
    sets: {name: its own}, may be empty.
    lines: what the page says before them.
    result: what the result holds beside them.
    verdict: on the run; None, or one without an alarm, gives way to that of a set that is not well.
  """
  ill = [one for one in sets.values() if verdicts.is_alarm(one.verdict)]
  first = next(iter([*ill, *sets.values()]), None)
  gives_way = bool(verdict and ill and not verdicts.is_alarm(verdict))
  sentences = [*([verdict.sentence] if verdict else []), *(first.sentences if first else [])]
  return Diagnosis(
    verdict=first.verdict if first and (gives_way or verdict is None) else verdict,
    measures=first.measures if first else {},
    sentences=sentences,
    result={**result, "sets": {name: one.result for name, one in sets.items()}},
    lines=[*lines, *(line for one in sets.values() for line in ("", *one.lines))],
    sets=sets,
  )


def bullets(sentences: Sequence[str]) -> list[str]:
  """One sentence after the other, in lines of the width of the table."""
  wrapped = (textwrap.wrap(s, 96, break_on_hyphens=False) for s in sentences)
  return [("    " if i else "  - ") + line for lines in wrapped for i, line in enumerate(lines)]


def diagnose(
  prototypes: Any,
  *,
  embeddings: Any = None,
  features: Any = None,
  name: str = "prototypes",
  gain: np.ndarray | None = None,
  cosine: bool = False,
  made: str = "learned",
  aliases: Sequence[str] = (),
  for_usage: str = "embeddings",
  use: Mapping[str, float] | None = None,
  circumstances: Mapping[str, Any] | None = None,
) -> Diagnosis:
  """Says whether prototypes are copies of one another and, with embeddings, whether they are used.

  Arrays are of NumPy, JAX or anything with `__dlpack__` or `__array__`, such as a tensor of PyTorch
  in the host's memory.

  >>> import numpy as np
  >>> found = diagnose(np.repeat(np.eye(16), 4, axis=0))
  >>> found.verdict.label, found.measures["collapse/unique_0.025"]
  ('partial prototype collapse', 0.25)

  Args:
    prototypes: [K, D], K and D above 1, rows of any norm as features meet them.
    embeddings: [N, D], N > 1, finite: what is compared with the prototypes.
    features: [N, F] of the backbone, for RankMe and spread, which are of the embeddings without.
    name: of the set.
    gain: [K], factors of a weight-normalised layer, if it is one.
    cosine: whether features are compared with directions only.
    made: how the prototypes were, `method.prototypes`; "learned" for other people's.
    aliases: names of other layers with the same numbers (tied heads).
    for_usage: what the reader can give to see which prototypes are used, where nothing was given.
    use: shares that a run has measured of these very prototypes, by the names of metrics.jsonl.
    circumstances: of that run, from `verdicts.circumstances_of`: it is judged as in its training,
      and advice names no setting that is set.

  Raises:
    UserError: for arrays of other shapes, or embeddings that are not finite.
  """
  weights = np.asarray(measures.as_array(prototypes), np.float32)
  if weights.ndim != 2 or min(weights.shape) < 2:
    raise errors.UserError(
      f"{name} has shape {list(weights.shape)}: give [K, D], two rows and columns or more"
    )
  if embeddings is not None:
    embeddings = np.asarray(measures.as_array(embeddings), np.float32)
    if embeddings.ndim != 2 or embeddings.shape[1] != weights.shape[1]:
      raise errors.UserError(
        f"the embeddings have {embeddings.shape[-1]} dimensions and {name} {weights.shape[1]}: "
        "give what comes out of the head just before the prototypes, not features of the backbone"
      )
    if len(embeddings) < 2 or not np.isfinite(embeddings).all():
      raise errors.UserError("the embeddings must be at least two rows of finite numbers")
  if len(weights) > _MANY:
    logging.warning("comparing %s prototypes pair by pair: minutes", f"{len(weights):,}")
  if features is not None:
    features = np.asarray(measures.as_array(features), np.float32)
  result = examine(weights, gain=gain, cosine=cosine, embeddings=embeddings, features=features)
  verdict, sentences = words(
    result,
    cosine=cosine,
    prototypes=made,
    for_usage=for_usage,
    use=use,
    circumstances=circumstances,
  )
  result |= {"aliases": list(aliases), "diagnosis": sentences}
  lines = _page(name, result)
  if aliases:
    lines.append(f"  the same numbers are called {', '.join(aliases)}: tied heads, one set")
  lines += ["", *bullets(sentences)]
  return Diagnosis(verdict, result["measures"], sentences, result, lines)
