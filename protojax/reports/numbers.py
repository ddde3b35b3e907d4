"""The numbers of a report: verdicts, key numbers and evaluations, each with file and protocol.

Every number stands in a <data> element that names its run, its file and its key in there.
"""

import html
import math
import re
from collections.abc import Sequence

from protojax import trees
from protojax.metrics import measures as table
from protojax.metrics import rules, verdicts
from protojax.reports import charts, curves
from protojax.reports import record as records

_SAMPLE = "at most {images} evenly spread images of the bank"


# key in result.json, label, form, how it is obtained. {tag} is that of a prototype set.
_ACCURACIES = (
  (
    "probe/knn",
    "k-NN accuracy",
    "%",
    "cosine, k = {k}, T = {temperature}, weights "
    "exp(similarity / T); bank {bank}, tested on {test}; {features}; {transform}",
  ),
  (
    "probe/linear_fitted",
    "Linear accuracy",
    "%",
    "{linear}; bank {bank}, tested on {test}; {transform}",
  ),
  (
    "probe/linear",
    "Linear accuracy, online",
    "%",
    "softmax classifier trained by Adam beside the encoder on {bank}, tested on {test}",
  ),
)
_OF = "{floor_bank} bank and {floor_test} test images"
_SMALL = "at most 16 px a side"
_LOGISTIC = "logistic regression, the best of three strengths"
_FLOORS = (
  ("floor/knn", "k-NN accuracy, on the images of the floors", "%", f"{_OF}, k-NN as above"),
  (
    "floor/linear",
    "Linear accuracy, on the images of the floors",
    "%",
    f"{_OF}, frozen features, {_LOGISTIC}",
  ),
  ("floor/knn_pixels", "k-NN accuracy, raw pixels", "%", f"{_OF}, k-NN as above; {_SMALL}"),
  ("floor/linear_pixels", "Linear accuracy, raw pixels", "%", f"{_OF}, {_LOGISTIC}; {_SMALL}"),
  ("floor/knn_untrained", "k-NN accuracy, untrained net", "%", f"{_OF}, k-NN as above"),
  ("floor/knn_start", "k-NN accuracy, weights at the start", "%", f"{_OF}, k-NN as above"),
)
_TRAINING = (
  ("train/loss", "Loss", "", "training, mean of the last {log_every} steps"),
  (
    "train/ln_k",
    "ln K",
    "",
    "loss of uniform predictions, and the largest entropy of a target{block}",
  ),
  (
    "train/target_entropy",
    "Entropy of the targets",
    "",
    "nats, mean of the last {log_every} steps",
  ),
  ("time/img_per_s", "Images a second", "", "of training alone, over the last {log_every} steps"),
  ("seconds", "Wall time", "s", "compiling, training and evaluating, all restarts together"),
)
_COLUMNS = 4  # runs that have one each
_SIGNS = {"ok": "✓", "warn": "!", "bad": "✕", "open": "…"}


class _Facts(dict):
  """What a protocol does not say reads "n/a"."""

  def __missing__(self, key):
    return "n/a"


def _collapse() -> list[tuple[str, str, str, str]]:
  """The same of the measures of collapse."""
  found = []
  for row in table.MEASURES:
    how = row.meaning + "; random ones: {random}" * row.has_random
    if "codes" in row.inputs:
      how += "; bank {bank}"
    elif {"features", "embeddings"} & set(row.inputs):
      how += f"; {_SAMPLE}"
    if row.title:
      key = f"collapse/{'{tag}' * row.of_sets}{row.name}"
      found.append((key, row.title, "%" * row.is_share, how))
  return found


def verdict(run: records.Record) -> tuple[str, str, str]:
  """Judges a run by its last measures: (kind: ok, warn, bad or open; label; sentence)."""
  measures = run.measures(records.FINAL) or run.latest()
  try:
    found = verdicts.of_run(measures, config=run.config, step=run.step)
  except (AttributeError, KeyError, TypeError, ValueError):
    return "open", "no verdict", "config.json is missing or of another version."
  kinds_of_labels = {"ok": "ok", **dict.fromkeys(rules.OPEN, "open")}
  kind = "bad" if found.collapsed else kinds_of_labels.get(found.label, "warn")
  return kind, found.label, found.sentence


def cards(runs: Sequence[records.Record]) -> str:
  """Writes an <article> for every run: its verdict, and what was trained on what."""
  return "".join(_card(i, run) for i, run in enumerate(runs))


def _card(number: int, run: records.Record) -> str:
  kind, label, sentence = verdict(run)
  facts = _about(run)
  if records.FINAL not in run.results:
    facts["Unfinished"] = f"the numbers are the last ones, of step {run.step:,} or before"
  rows = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in facts.items())
  notes = "".join(f'<p class="note">{_e(note)}</p>' for note in run.notes)
  return (
    f'<article class="run {kind}"><h3>{swatch(number)}{_e(run.name)}</h3>'
    f'<p class="verdict"><b><span aria-hidden="true">{_SIGNS[kind]}</span> {_e(label)}</b> '
    f"{_e(sentence)}</p><dl>{rows}</dl>{notes}</article>"
  )


def _about(run: records.Record) -> dict[str, str]:
  config, facts = run.config, {}
  try:
    method = config.method
    facts["Method"] = method.name
    if method.num_prototypes and method.prototypes != "none":
      dim = config.head.bottleneck
      facts["Prototypes"] = f"{method.prototypes}, {method.num_prototypes:,} × {dim}"
    facts["Encoder"] = config.model.name
    facts["Data"] = f"{config.data.name}, {config.data.num_records:,} images"
    facts["Steps"] = f"{run.step:,} of {config.num_steps:,}, {config.batch_size:,} images each"
    facts["Seed"] = str(config.seed)
  except (AttributeError, KeyError, TypeError, ValueError):
    pass  # a config of another version: what it does say
  environment = run.results.get(records.FINAL, {}).get("environment", {})
  if isinstance(environment, dict) and environment:
    devices = environment.get("devices") or []
    versions = environment.get("packages") or {}
    facts["Ran on"] = (
      f"{len(devices)} × {devices[0] if devices else 'n/a'}, jax {versions.get('jax', 'n/a')}, "
      f"protojax {environment.get('protojax', 'n/a')}"
    )
  return facts


def key_numbers(runs: Sequence[records.Record]) -> str:
  """Writes a <table>: a row a measure, a column a run, and how the numbers were obtained.

  Further prototype sets have a table each, folded away.
  """
  parts = []
  for tag in ["", *(tag for tag in curves.sets(runs) if tag)]:
    body = []
    for key, label, form, how in (*_ACCURACIES, *_FLOORS, *_collapse(), *_TRAINING):
      if not tag or "{tag}" in key:
        key = key.replace("{tag}", tag)
        values = [_value(run, key) for run in runs]
        told = [
          how.format_map(_facts(run, key))
          for run, (value, _) in zip(runs, values, strict=True)
          if value is not None
        ]
        parted = [("", values)]
        if key.startswith(("probe/", "floor/")):
          parted = _by_size(values, [run.pixels for run in runs])
        if told:
          body += [_row(runs, label + at, key, form, some, told) for at, some in parted]
    table = _table(runs, body, last="How it was obtained")
    parts.append(folded(f"Prototype set: {tag.rstrip('_')}", table) if tag else table)
  return "".join(parts)


def _by_size(values: Sequence, sizes: Sequence[int | None]) -> list[tuple[str, list]]:
  """[(what to add to the label, values)]: a row for each size of images, since they are not alike.

  Args:
    values: (number, file) of each run.
    sizes: pixels of each run's images.
  """
  known = sorted({size for size in sizes if size is not None}, key=lambda s: _natural(str(s)))
  if len(known) < 2:
    return [("", list(values))]
  parted = []
  for size in (*known, None):
    some = [v if s == size else (None, "") for v, s in zip(values, sizes, strict=True)]
    if any(value is not None for value, _ in some):
      parted.append((f", at {size or 'unknown'} px", some))
  return parted


def _value(run: records.Record, key: str) -> tuple[float | None, str]:
  """(the number or None, its file): the final result's, else the latest of the curves."""
  if records.FINAL in run.results:
    return run.measures(records.FINAL).get(key), records.FINAL
  return run.latest().get(key), records.METRICS


def _facts(run: records.Record, key: str) -> _Facts:
  """What the texts of the number at `key` have in braces."""
  facts = _Facts(block="")
  try:
    config = run.config
    probe = config.probe
    facts |= {"images": f"{config.monitor.images:,}", "log_every": str(config.log_every)}
    facts |= {"k": probe.k, "temperature": probe.temperature}
    if size := config.method.get("partition_size"):  # K is not the number of all prototypes
      facts["block"] = f"; K: the {size} prototypes of a block"
    facts["bank"], facts["test"] = (
      f"{probe.name}/{split}" for split in (probe.train_split, probe.test_split)
    )
  except (AttributeError, KeyError, TypeError, ValueError):
    pass
  protocol = run.results.get(records.FINAL, {}).get("protocol", {})
  facts |= protocol if isinstance(protocol, dict) else {}
  size = re.search(r"\((\d+) images\)$", str(facts.get("bank")))  # of older runs the whole bank
  if size and 0 < (facts.get("limit") or 0) < int(size[1]):
    facts["bank"] = f"{facts['bank']}, {facts['limit']} of them, evenly spread"
  for name in ("bank", "test"):
    count, _ = _value(run, f"floor/{name}_images")
    facts[f"floor_{name}"] = "n/a" if count is None else f"{count:,.0f}"
  random, _ = _value(run, f"{key}_random")
  facts["random"] = "n/a" if random is None else written(random, "%")
  return facts


def evaluations(runs: Sequence[records.Record]) -> str:
  """Writes a table for every eval/*/result.json but the final one, with its protocol."""
  files = sorted({file for run in runs for file in run.results} - {records.FINAL})
  parts = []
  for file in files:
    keys = sorted({key for run in runs for key in run.measures(file)}, key=_natural)
    protocols = [run.results.get(file, {}).get("protocol", {}) for run in runs]
    sizes = [trees.flat(p).get("transform.px") if isinstance(p, dict) else None for p in protocols]
    body = [
      _row(runs, key + at, key, "", some, [])
      for key in keys
      for at, some in _by_size([(run.measures(file).get(key), file) for run in runs], sizes)
    ]
    told = "".join(
      f"<h4>{swatch(i)}{_e(run.name)}</h4>{settings_list(protocol)}"
      for i, (run, protocol) in enumerate(zip(runs, protocols, strict=True))
      if protocol
    )
    content = _table(runs, body) + folded("Protocol", told)
    summary = f"{file}{_of_steps(runs, file)}: {len(body)} numbers"
    parts.append(folded(summary, content, shown=len(body) <= 12))
  return "".join(parts)


def _of_steps(runs: Sequence[records.Record], file: str) -> str:
  """ ", of step 150": which state was measured; the other numbers may be of another."""
  steps = {}
  for run in runs:
    protocol = run.results.get(file, {}).get("protocol", {})
    known = trees.flat(protocol).get("model.step") if isinstance(protocol, dict) else None
    known = run.measures(file).get("step") if known is None else known
    if isinstance(known, int | float):
      steps[run.name] = f"{known:,.0f}"
  if len(set(steps.values())) < 2:
    return "".join(f", of step {step}" for step in [*steps.values()][:1])
  return ", of " + ", ".join(f"step {step} ({name})" for name, step in steps.items())


def _natural(key: str) -> list:
  """Order in which k10 comes before k100, and k20 between them."""
  parts = re.split(r"([0-9]+)", key)
  # Numbers of one length are in the order of their digits, and may be longer than Python reads.
  found = [(part.isdigit(), part.lstrip("0") * part.isdigit(), part) for part in parts]
  return [(number, len(digits), digits, part) for number, digits, part in found]


def folded(summary: str, content: str, shown: bool = False) -> str:
  """Wraps content in <details> whose summary is plain text, open if `shown`."""
  return f"<details{' open' * shown}><summary>{_e(summary)}</summary>{content}</details>"


def settings_list(tree: dict) -> str:
  """Writes a <dl> of a JSON object's entries, nested names joined by dots."""
  items = trees.flat(tree).items() if isinstance(tree, dict) else []
  return (
    '<dl class="wide">'
    + "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in items)
    + "</dl>"
  )


def kinds(runs) -> str:
  """The CSS classes of a table with a column for each run."""
  return "keys many" if len(runs) > _COLUMNS else "keys"


def _table(runs, body: list[str], last: str = "") -> str:
  if not body:
    return "<p>No number was written yet.</p>"
  heads = "".join(f'<th scope="col">{swatch(i)}{_e(r.name)}</th>' for i, r in enumerate(runs))
  end = f'<th scope="col">{last}</th>' * bool(last)
  return (
    f'<table class="{kinds(runs)}{" few" * (not last)}"><thead><tr><th scope="col">Measure</th>'
    f"{heads}{end}</tr></thead><tbody>{''.join(body)}</tbody></table>"
  )


def _row(runs, label, key, form, values, told) -> str:
  cells = []
  for number, (run, (value, file)) in enumerate(zip(runs, values, strict=True)):
    name = f'<span class="of">{swatch(number)}{_e(run.name)}</span>' * (len(runs) > 1)
    shown = '<span class="none">–</span>'
    if value is not None:
      shown = (
        f'<data value="{_e(repr(value))}" data-run="{_e(run.name)}" data-file="{_e(file)}" '
        f'data-key="{_e(key)}" title="{_e(f"{file}: {key} = {value!r}")}">'
        f"{_e(written(value, form))}</data>"
      )
      if file == records.METRICS and (step := run.taken(key)) is not None:
        shown += f" <small>step {step:,}</small>"
    cells.append(f"<td>{name}{shown}</td>")
  mono = f"<code>{_e(key)}</code>" if label != key else ""
  how = ""
  if told:
    known = dict.fromkeys(told)
    how = f'<td class="how">{"<br>".join(_e(t) for t in known)}</td>'
  return f'<tr><th scope="row">{_e(label)}{mono}</th>{"".join(cells)}{how}</tr>'


def written(value: float, form: str = "") -> str:
  """Writes a number for people: form "%" of a share, "s" of seconds, "" of anything else."""
  if isinstance(value, float) and not math.isfinite(value):
    return "not finite"
  if form == "%":
    return f"{100 * value:.1f} %"
  if form == "s":
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
      return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
  return charts.number(value)


def swatch(number: int) -> str:
  """A small box in the colour of a run."""
  again = " again" * (number >= charts.COLOURS)
  return f'<i class="swatch c{number % charts.COLOURS}{again}" aria-hidden="true"></i>'


def _e(text) -> str:
  return html.escape(str(text))
