"""A set of prototypes in numbers, and what the numbers mean; for checkpoints, on the host."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from protojax.metrics import collapse, uniqueness, verdicts

_QUANTILES = (0.05, 0.5, 0.95)
_ROWS = 256  # embeddings compared with all prototypes at a time
_GROUPS, _MEMBERS = 5, 5  # largest groups, and members of each, that are named
_CHAINED = 0.5  # components over unique prototypes, below which they are no separate groups
_CONE = 0.5  # mean cosine of prototypes that point the same way; random ones have 0
_NORMS = 3.0  # largest norm over the median, of prototypes that win by their norm
_FLAT = 0.5  # of the rank there could be


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
    "rankme": float(np.exp(-(share * np.log(share)).sum())),
    "largest_possible": min(unit.shape),
    "directions_for_99_percent": int(np.searchsorted(energy.cumsum(), 0.99 * energy.sum()) + 1),
    "mean_cosine": float(collapse.mean_pairwise_cosine(unit)),
  }


def _summary(values: np.ndarray) -> dict[str, float]:
  return {
    k: float(f(values)) for k, f in (("least", np.min), ("median", np.median), ("most", np.max))
  }


def usage(
  weights: np.ndarray, unit: np.ndarray, nearest: np.ndarray, embeddings: np.ndarray
) -> dict[str, Any]:
  """Which prototypes the embeddings fall on.

  Args:
    weights: float32 [K, D]; the one with the largest product takes an image.
    unit: float32 [K, D], directions.
    nearest: float32 [K], cosine distance of each to the nearest other.
    embeddings: [N, D], what the method compares with prototypes.
  """
  codes, distances = [], []
  for start in range(0, len(embeddings), _ROWS):
    rows = np.asarray(embeddings[start : start + _ROWS], np.float32)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosine = rows @ unit.T
    distances.append(1.0 - cosine.max(axis=1))
    codes.append((cosine if weights is unit else rows @ weights.T).argmax(axis=1))
  codes, num = np.concatenate(codes), len(weights)
  counts = np.bincount(codes, minlength=num)
  spread = float(np.median(np.concatenate(distances)))
  embeddings = np.asarray(embeddings, np.float32)
  return {
    "images": len(embeddings),
    "used": float(collapse.used_fraction(codes, num)),
    "perplexity": float(collapse.usage_perplexity(codes, num)),
    "unused": int(np.sum(counts == 0)),
    "largest_share": float(counts.max() / len(embeddings)),
    "relative_uniqueness": float(np.median(nearest)) / max(spread, 1e-7),
    "feature_std": float(collapse.feature_std(embeddings)),
    "rankme": float(collapse.rankme(embeddings)),
    "mean_cosine": float(collapse.mean_pairwise_cosine(embeddings)),
  }


def examine(
  weights: np.ndarray,
  *,
  gain: np.ndarray | None = None,
  cosine: bool = False,
  embeddings: np.ndarray | None = None,
) -> dict[str, Any]:
  """Everything about one set of prototypes that can be seen without its run.

  Args:
    weights: float32 [K, D], K and D above 1, rows of any norm.
    gain: [K], factors of a weight-normalised layer, if it is one.
    cosine: whether features are compared with directions only.
    embeddings: [N, D], N > 1, to see which prototypes are used.

  Returns:
    What can be written as JSON; counts of `uniqueness.measure`, cosine distances, norms.
  """
  num, dim = weights.shape
  seen = uniqueness.measure(weights)
  null = uniqueness.null(num, dim)
  directed = seen.owner[0] >= 0
  lost = np.flatnonzero(~directed)
  headline = seen.thresholds.index(verdicts.HEADLINE)
  groups = uniqueness.largest_groups(seen.owner[headline], _GROUPS)
  result = {
    "num": num,
    "dim": dim,
    "thresholds": list(seen.thresholds),
    "unique": {k: getattr(seen, k).tolist() for k in ("unique", "components", "isolated")},
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
    return result
  norms = np.linalg.norm(weights[directed].astype(np.float64), axis=1)
  unit = np.zeros_like(weights)
  unit[directed] = weights[directed] / norms[:, None]
  near = seen.nearest[directed]
  rows = np.ascontiguousarray(weights[directed])
  different = np.unique(rows.view(np.dtype((np.void, rows.dtype.itemsize * dim)))).size
  result |= {
    "copies_to_the_bit": len(rows) - different,
    "nearest": {
      "quantiles": list(_QUANTILES),
      "distance": np.quantile(near, _QUANTILES).tolist(),
      "random": uniqueness.null_nearest(num, dim, _QUANTILES).tolist(),
    },
    "norm": _summary(norms),
    "spectrum": _spectrum(unit[directed]),
  }
  if gain is not None:
    result["gain"] = _summary(np.asarray(gain, np.float64))
  if embeddings is not None:
    directions_only = cosine or (directed.all() and np.ptp(norms) < 1e-6)
    met = unit if directions_only else np.where(directed[:, None], weights, 0.0)
    result["usage"] = usage(met, unit, near, embeddings)
  return result


def measures(result: Mapping[str, Any]) -> dict[str, float]:
  """The part of `examine`'s result that `verdicts.judge` knows, by its names."""
  num, headline = result["num"], result["thresholds"].index(verdicts.HEADLINE)
  out = {
    f"collapse/unique_{verdicts.HEADLINE}": result["unique"]["unique"][headline] / num,
    f"collapse/unique_{verdicts.HEADLINE}_random": result["random"]["unique"][headline] / num,
  }
  known = ("used", "perplexity", "relative_uniqueness", "feature_std", "rankme", "mean_cosine")
  return out | {f"collapse/{k}": result["usage"][k] for k in known if "usage" in result}


def words(result: Mapping[str, Any], *, cosine: bool, prototypes: str = "learned") -> list[str]:
  """What `examine`'s result means and what to try, a few sentences; the verdict first.

  Args:
    result: from `examine`.
    cosine: whether features are compared with directions only.
    prototypes: how they were made, `method.prototypes`; "learned" for other people's.
  """
  num = result["num"]
  verdict = verdicts.judge(
    measures(result), num_prototypes=num, step=1, grace_steps=0, prototypes=prototypes
  )
  unique, random = result["unique"]["unique"], result["random"]["unique"]
  headline = result["thresholds"].index(verdicts.HEADLINE)
  count = unique[headline]
  if verdict.label == "ok":
    out = [f"ok: {count:,} of {num:,} prototypes are unique, random ones {random[headline]:,}"]
  else:
    out = [f"{verdict.label}: {verdict.sentence}"]
  lost = result["without_direction"]
  if lost["zero"] or lost["not_finite"]:
    out.append(
      f"{lost['zero']:,} rows are zero and {lost['not_finite']:,} are not finite (first: "
      f"{', '.join(map(str, lost['first']))}): they are no prototypes, and training on will spread "
      "what is not finite; go back to a checkpoint without them"
    )
  if "spectrum" not in result:
    return [f"fewer than two of {num:,} rows have a direction: nothing to compare", *out[1:]]
  if verdict.label == "partial prototype collapse":
    out.append(
      f"the effective number of clusters is about {count:,}, {num / count:.1f} prototypes to each"
      + "; learned together with the encoder, prototypes do this whatever K is (arXiv 2510.20108 "
      "has 908 of 60,000 for DINO): more of them will not help; moving them outside the gradient "
      "(in protojax: method.prototypes=mixture) or pushing them apart (KoLeo on prototypes, arXiv "
      "2410.14060; in protojax: method.koleo_proto) may" * (prototypes == "learned")
    )
  for threshold, one, other in zip(result["thresholds"], unique, random, strict=True):
    if verdict.label == "ok" and other - one > verdicts.LIMITS["copies"] * num:
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
  if spectrum["mean_cosine"] > _CONE and "usage" not in result:
    out.append(
      f"prototypes point the same way (mean cosine {spectrum['mean_cosine']:.2f}): if the features "
      "do too, they are near without being redundant; --embeddings tells"
    )
  if spectrum["rankme"] < _FLAT * spectrum["largest_possible"] and verdict.label == "ok":
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
  if "usage" not in result:
    out.append(
      "whether they are used cannot be seen from weights: pass --embeddings, or --data for a run "
      "of protojax; random prototypes that never moved look as unique as the best"
    )
  return out
