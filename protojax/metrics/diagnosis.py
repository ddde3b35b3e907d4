"""A set of prototypes in numbers, for checkpoints, on the host."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from absl import logging
from scipy import special
from sklearn import preprocessing

from protojax import errors
from protojax.metrics import chance, collapse, measures, rules, uniqueness, verdicts, wording

_QUANTILES = (0.05, 0.5, 0.95)
_ROWS = 256  # embeddings compared with all prototypes at a time
_GROUPS, _MEMBERS = 5, 5  # largest groups, and members of each, that are named
_SAME = 1e-6  # cosine distance of directions that differ by rounding alone
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
    of `uniqueness.measure`, cosine distances, norms; "usage" where there are embeddings, or their
    number as "zero_embeddings" where all are zero.
  """
  num, dim = weights.shape
  found, null = uniqueness.measure(weights), uniqueness.null(num, dim)
  directed = found.owner[0] >= 0
  lost = np.flatnonzero(~directed)
  headline = found.thresholds.index(rules.HEADLINE)
  groups = uniqueness.largest_groups(found.owner[headline], _GROUPS)
  known = measures.uniqueness(found.unique, null.unique, num)
  if lost.size:
    known["no_direction"] = lost.size / num
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
  if not embeddings.any():  # no cosine of theirs means anything
    found_of_features = _measures(known, prototypes=unit, features=features)
    return result | {"zero_embeddings": len(embeddings), "measures": found_of_features}
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
    if embeddings.ndim != 2:
      raise errors.UserError(f"the embeddings have shape {list(embeddings.shape)}: give [N, D]")
    if embeddings.shape[1] != weights.shape[1]:
      raise errors.UserError(
        f"the embeddings have {embeddings.shape[1]} dimensions and {name} {weights.shape[1]}: "
        + measures.not_compared(embeddings.shape, weights.shape[1])
      )
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(embeddings) < 2:
      raise errors.UserError(f"too few embeddings, {len(embeddings)}: give two rows or more")
    if bad.size:
      are, first, them = ("is", "", "it") if bad.size == 1 else ("are", "first ", "them")
      raise errors.UserError(
        f"{bad.size:,} of {len(embeddings):,} embeddings {are} not finite, {first}row {bad[0]}: "
        f"see what makes {them}, or leave {them} out"
      )
  if len(weights) > _MANY:
    logging.warning("comparing %s prototypes pair by pair: minutes", f"{len(weights):,}")
  if features is not None:
    features = np.asarray(measures.as_array(features), np.float32)
  result = examine(weights, gain=gain, cosine=cosine, embeddings=embeddings, features=features)
  verdict, sentences = wording.words(
    result,
    cosine=cosine,
    prototypes=made,
    for_usage=for_usage,
    use=use,
    circumstances=circumstances,
  )
  result |= {"aliases": list(aliases), "diagnosis": sentences}
  lines = wording.page(name, result)
  if aliases:
    lines.append(f"  the same numbers are called {', '.join(aliases)}: tied heads, one set")
  lines += ["", *wording.bullets(sentences)]
  return Diagnosis(verdict, result["measures"], sentences, result, lines)
