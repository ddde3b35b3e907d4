"""What `diagnosis.examine` found, said: a verdict, sentences and the page of numbers."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from protojax.metrics import measures, rules, verdicts

_CHAINED = 0.5  # components over unique prototypes, below which they are no separate groups
_CONE = 0.5  # mean cosine of prototypes that point the same way; random ones have 0
_NORMS = 3.0  # largest norm over the median, of prototypes that win by their norm
_FLAT = 0.5  # of the rank there could be
_OF_PROTOTYPES = ("unique", "num_prototypes", "no_direction")  # measures that need no image
_EXPLAINED = "docs/instruments.md, The numbers"


def _rows_are(count: int) -> str:
  return "1 row is" if count == 1 else f"{count:,} rows are"


def _times(ratio: float) -> str:
  return f"{ratio:.1f}" if ratio < 1e6 else f"{ratio:.0e}"


def zero_embeddings(count: int, std: float | None) -> rules.Verdict:
  """The verdict on embeddings that are all zero; `std` of the backbone's features, if measured."""
  said = f"all {count:,} embeddings are zero, so that no prototype is nearer to one than any other"
  if std is not None and std >= rules.LIMITS["feature_std"]:
    return rules.Verdict(
      "dead projector",
      f"{said}: the backbone tells images apart (std {std:.3f} of 1), the head does not",
      True,
    )
  return rules.Verdict("representation collapse", f"{said}: see where they are made", True)


def tensors_not_finite(named: str) -> rules.Verdict:
  """The verdict on a network with tensors that are not finite, `named` by `trees.not_finite`."""
  return rules.Verdict(
    "non-finite", f"{named}: nothing made with them means anything; take a copy without them", True
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
  images = result["usage"]["images"] if "usage" in result else None
  too_few = images is not None and images < rules.LIMITS["images"]
  if too_few:
    known = {k: v for k, v in known.items() if k.partition("/")[2].startswith(_OF_PROTOTYPES)}
  lost = result["without_direction"]
  told = {"prototypes": prototypes} | dict(circumstances or {})
  alike = result.get("alike", False)
  bad = [rules.not_finite(lost["not_finite"], num)] if lost["not_finite"] else []
  zero = result.get("zero_embeddings", 0)
  if zero:
    bad.append(zero_embeddings(zero, known.get("collapse/feature_std")))
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
    copies = random[headline] - count - lost["zero"] - lost["not_finite"]
    if copies > 0:
      out.append(
        f"{_rows_are(copies)} {'a copy' if copies == 1 else 'copies'}: more than "
        f"{rules.LIMITS['copies']:.0%} of all would be called a collapse"
      )
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
  chains = result["unique"]["components"][headline]
  if chains < _CHAINED * count:
    out.append(
      f"they form {chains:,} chain{'s' * (chains > 1)} of near neighbours, not {count:,} separate "
      "groups: the greedy count depends on their order"
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
  if norm["most"] > _NORMS * norm["median"]:
    larger = f"the largest norm is {_times(norm['most'] / norm['median'])} times the median"
    if cosine:
      out.append(
        f"{larger}: compared by cosine, as here, it does not matter; by inner product such a "
        "prototype wins images by its norm"
      )
    else:
      out.append(
        f"{larger}: such a prototype wins images by its norm; keep norms at 1 "
        "(norm_last_layer=True) or account for them (vMF)"
      )
  if too_few:
    out.append(
      f"use and spread are not judged by {images} embeddings, which have no more codes and "
      f"directions than that: give {rules.LIMITS['images']} or more"
    )
  if "usage" not in result and not use and not zero:
    out.append(
      f"whether they are used cannot be seen from weights: give {for_usage}; random prototypes "
      "that never moved look as unique as the best"
    )
  return verdict, out


def _percent(count: int, num: int) -> str:
  return f"{count:,} ({count / num:.1%})"


def _table_row(name: str, cells) -> str:
  return f"  {name:<13}" + "".join(f"{cell:>17}" for cell in cells)


def page(name: str, result: Mapping[str, Any]) -> list[str]:
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


def bullets(sentences: Sequence[str]) -> list[str]:
  """One sentence after the other, in lines of the width of the table."""
  wrapped = (textwrap.wrap(s, 96, break_on_hyphens=False) for s in sentences)
  return [("    " if i else "  - ") + line for lines in wrapped for i, line in enumerate(lines)]
