"""The page of a report: one HTML file with everything in it, nothing fetched from anywhere."""

import html
import json
import math
from collections.abc import Mapping, Sequence

from protojax import __version__, trees
from protojax.reports import curves, gallery, numbers, style
from protojax.reports import record as records

_ATTENTION = (
  "How much the class token attends to each patch in the last block: the image as it is evaluated, "
  "the mean over heads, each head; each map from 0 (dark) to its own largest weight."
)
_VIEWS = (
  "The first images of the run's first batch and the very views that its first step trained on: "
  "crops and colours; patches that a method hides are shown too."
)
_NOT_YET = "No measure of prototypes was written yet; the first comes at step monitor.every."
_NO_PROTOTYPES = "No run here has prototypes, so there is nothing to say about their collapse."


def build(
  runs: Sequence[records.Record], pictures: Mapping[str, gallery.Pictures | str], command: str
) -> str:
  """Makes the HTML of a report.

  Args:
    runs: from `record.read`, in the order of their colours.
    pictures: {run's name: its pictures, or a sentence why there are none}.
    command: the command line that writes this page again, for its last line.
  """
  title = ", ".join(run.name for run in runs) if len(runs) < 5 else f"{len(runs)} runs"
  sections = {
    "Verdict": f'<div class="runs">{numbers.cards(runs)}</div>',
    "Numbers": _numbers(runs),
    "Training": _lead("By the step, from metrics.jsonl. A cross marks a value that was not finite.")
    + _grid(curves.training(runs), "metrics.jsonl holds no measure yet."),
    "Prototypes": _prototypes(runs),
    "Gallery": _each(runs, pictures, "prototypes", _gallery),
    "Attention": _lead(_ATTENTION) + _each(runs, pictures, "attention", _rows),
    "Views": _lead(_VIEWS) + _each(runs, pictures, "views", _rows),
    "Settings": _settings(runs),
  }
  links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
  legend = "".join(
    f"<b>{numbers.swatch(i)}{_e(run.name)}</b>" for i, run in enumerate(runs) if len(runs) > 1
  )
  body = "".join(
    f'<section id="{name.lower()}"><h2>{name}</h2>{content}</section>'
    for name, content in sections.items()
  )
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{_e(title)}: protojax report</title><style>{style.CSS}</style></head><body>"
    f"<header><h1>{_e(title)}</h1><p>Pretraining with protojax: what was trained, what came out of "
    "it, and whether anything collapsed.</p></header>"
    f"<nav><div>{links}<span>{legend}</span></div></nav><main>{body}</main>"
    f"<footer>protojax {__version__}. Written by <code>{_e(command)}</code></footer>"
    f"<script>{style.SCRIPT}</script></body></html>\n"
  )


def _numbers(runs) -> str:
  files = dict.fromkeys(
    records.FINAL if records.FINAL in run.results else f"{records.METRICS} (last value of each)"
    for run in runs
  )
  lead = _lead(f"From {' and '.join(files)} of each run; hover a number for file, key and digits.")
  other = numbers.evaluations(runs)
  return f'{lead}<div class="panel">{numbers.key_numbers(runs)}</div>' + (
    f'<div class="panel">{other}</div>' if other else ""
  )


def _prototypes(runs) -> str:
  tags, ends = curves.sets(runs), curves.ends(runs)
  if not tags:
    without = all(_setting(run, "method", "prototypes") == "none" for run in runs)
    return _lead(_NO_PROTOTYPES if without else _NOT_YET) + _grid(ends, "")
  parts = []
  for tag in tags:
    grid = _grid(curves.prototypes(runs, tag), "")
    parts.append(numbers.folded(f"Prototype set: {tag.rstrip('_')}", grid) if tag else grid)
  last = (
    "<h3>At the end of the run</h3>"
    + _lead("From eval/final/arrays.npz.")
    + _grid(ends, "The distributions are written when a run ends.")
  )
  lead = _lead(
    "Unique and used belong together: random prototypes that never move are unique too, and a "
    "single prototype that takes every image is used."
  )
  return lead + "".join(parts) + last


def _setting(run, section: str, name: str):
  """A setting of the run, None where its config does not say it."""
  found = run.config.get(section)
  return found.get(name) if hasattr(found, "get") else None


def _each(runs, pictures, part: str, show) -> str:
  """One part of every run's pictures, or the sentence in its place."""
  parts = []
  for i, run in enumerate(runs):
    own = pictures[run.name]
    found = own if isinstance(own, str) else getattr(own, part)
    heading = f"<h3>{numbers.swatch(i)}{_e(run.name)}</h3>" * (len(runs) > 1)
    parts.append(heading + (_lead(f"Left out: {found}") if isinstance(found, str) else show(found)))
  return "".join(parts)


def _gallery(found) -> str:
  parts = [_lead(found.how)]
  for kind, cards in found.kinds.items():
    parts.append(f'<h3>{_e(kind)}</h3><div class="protos">{"".join(map(_card, cards))}</div>')
  return "".join(parts)


def _card(card) -> str:
  pure = "" if math.isnan(card.purity) else f", {card.purity:.0%} are “{_e(card.majority)}”"
  images = "".join(_image(picture) for picture in card.images)
  count = "dead: 0 images" if not card.count else f"{card.count:,} image{'s' * (card.count > 1)}"
  return (
    f'<div class="proto"><p><b>№ {card.number:,}</b> <span>{count}{pure}</span></p>'
    f'<div class="strip">{images}</div></div>'
  )


def _rows(rows) -> str:
  most = max(len(row) for row in rows)
  lines = []
  for row in rows:
    cells = "".join(
      f"<figure>{_image(picture)}<figcaption>{_e(picture.text)}</figcaption></figure>"
      for picture in row
    )
    lines.append(f"<div>{cells}</div>")
  return f'<div class="rows" style="--n:{most}">{"".join(lines)}</div>'


def _image(picture) -> str:
  text = _e(picture.text)
  tiny = ' class="tiny"' * picture.tiny
  return f'<img{tiny} src="{picture.uri}" alt="{text}" title="{text}" loading="lazy">'


def _settings(runs) -> str:
  flat = [_flat(run) for run in runs]
  keys = sorted(set().union(*flat))
  if not keys:
    return _lead("config.json of the run could not be read.")
  parts = []
  if len(runs) > 1:
    differing = [k for k in keys if len({f.get(k, "–") for f in flat}) > 1]
    heads = "".join(
      f'<th scope="col">{numbers.swatch(i)}{_e(run.name)}</th>' for i, run in enumerate(runs)
    )
    rows = "".join(_difference(key, runs, flat) for key in differing)
    parts.append(
      _lead("Settings that differ between the runs, from their config.json.")
      + f'<div class="panel"><table class="{numbers.kinds(runs)}"><thead><tr>'
      f'<th scope="col">Setting</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
      if differing
      else _lead("All settings of the runs are the same.")
    )
  for i, (run, settings) in enumerate(zip(runs, flat, strict=True)):
    parts.append(
      f"<details><summary>All {len(settings)} settings of {numbers.swatch(i)}{_e(run.name)}"
      f"</summary>{numbers.settings_list(settings)}</details>"
    )
  return "".join(parts)


def _flat(run) -> dict[str, str]:
  return {k: json.dumps(v, default=str) for k, v in trees.flat(run.config).items()}


def _difference(key, runs, flat) -> str:
  cells = "".join(
    f'<td><span class="of">{numbers.swatch(i)}{_e(run.name)}</span>{_e(f.get(key, "–"))}</td>'
    for i, (run, f) in enumerate(zip(runs, flat, strict=True))
  )
  return f'<tr><th scope="row">{_e(key)}</th>{cells}</tr>'


def _grid(figures: Sequence[str], otherwise: str) -> str:
  shown = "".join(figures)
  return f'<div class="grid">{shown}</div>' if shown else _lead(otherwise) * bool(otherwise)


def _lead(text: str) -> str:
  return f'<p class="lead">{_e(text)}</p>'


def _e(text) -> str:
  return html.escape(str(text))
