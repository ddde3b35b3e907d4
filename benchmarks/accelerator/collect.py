"""From lines to pages: docs/results/accelerator.md, its figures, and the README's section.

Only what was measured on an accelerator is published, each item by its latest line that is done.
"""

import json
import pathlib
import statistics

from benchmarks.accelerator import records
from protojax import files

RESULTS = records.ROOT / "docs" / "results"
_BEGIN, _END = "<!-- accelerator: written by --collect -->", "<!-- accelerator: end -->"
_NOTHING = """\
Nothing has been measured on a GPU or TPU yet. `python -m benchmarks.accelerator --out=FOLDER` is
the list for whoever has one for half an hour; `--collect FOLDER` puts what it finds here.
"""
_UNIQUE = ("0.025", "0.05", "0.1", "0.25", "0.5")
_THRESHOLDS = ("collapse/unique_0.5", "collapse/used", "probe/knn")


def latest(lines: list[dict], *, rehearsal: bool = False) -> dict[str, dict]:
  """{item: its last line that is done}, in the order of the list.

  Args:
    lines: of lines.jsonl.
    rehearsal: those of rehearsals; else those of an accelerator.
  """
  from benchmarks.accelerator import items

  done = {
    line["item"]: line
    for line in lines
    if line["status"] == "done"
    and line["rehearsal"] == rehearsal
    and (rehearsal or _on_accelerator(line))
  }
  return {item.name: done[item.name] for item in items.ITEMS if item.name in done}


def _on_accelerator(line: dict) -> bool:
  backend = line["result"].get("backend")  # a card that is there need not be used
  return backend != "cpu" if backend else bool(line["card"])


def write(folder: pathlib.Path, *, rehearsal: bool = False) -> str:
  """Publishes the lines of `folder`, with those published before; says what was written.

  Args:
    folder: holds lines.jsonl, the --out of one call or several.
    rehearsal: take the lines of rehearsals instead, and write beside them, not into docs/.

  Raises:
    SystemExit: if there is nothing to publish.
  """
  lines = records.read(folder / "lines.jsonl")
  results = folder if rehearsal else RESULTS
  kept = results / "accelerator" / "lines.jsonl"
  if not rehearsal:
    lines = [*records.read(kept), *(line for line in lines if not line["rehearsal"])]
  found = latest(lines, rehearsal=rehearsal)
  if not found:
    raise SystemExit(
      f"{folder / 'lines.jsonl'} holds no item that is done"
      + ("" if rehearsal else " on an accelerator, outside of a rehearsal")
    )
  kept.parent.mkdir(parents=True, exist_ok=True)
  failed = {line["item"]: line for line in lines if line["status"] == "failed"}
  failed = {name: line for name, line in failed.items() if name not in found}
  files.write(kept, "".join(json.dumps(x) + "\n" for x in (*found.values(), *failed.values())))
  figures(found, kept.parent)
  page_path = results / "accelerator.md"
  files.write(page_path, page(found, failed))
  if not rehearsal:
    write_section(records.ROOT / "README.md", found)
  return f"{page_path}: {len(found)} items, {len(failed)} failed"


def section(found: dict[str, dict]) -> str:
  """What the README says of accelerators."""
  if not found:
    return _NOTHING
  speeds = {k: v for k, v in found.items() if k.startswith("speed/")}
  cards = ", ".join(dict.fromkeys(_card(line) for line in found.values()))
  parts = [
    f"Measured on {cards}; all of it, with versions and commits, in\n"
    "[docs/results/accelerator.md](docs/results/accelerator.md).\n"
  ]
  if speeds:
    parts.append(speed_table(speeds))
    parts.append("![Images a second](docs/results/accelerator/speed.png)\n")
  if any("curves" in line["result"] for line in found.values()):
    parts.append("![Uniqueness, use and k-NN over training](docs/results/accelerator/curves.png)\n")
  return "\n".join(parts)


def published_section(readme: str) -> str:
  """What stands between the two marks of a README, with them."""
  return readme[readme.index(_BEGIN) : readme.index(_END) + len(_END)]


def write_section(readme: pathlib.Path, found: dict[str, dict]) -> None:
  """Replaces what stands between the two marks of the README."""
  text = readme.read_text()
  new = f"{_BEGIN}\n{section(found)}{_END}"
  files.write(readme, text.replace(published_section(text), new))


def _card(line: dict) -> str:
  return line["card"] or line["result"].get("device") or line["result"].get("backend", "unknown")


def page(found: dict[str, dict], failed: dict[str, dict]) -> str:
  """The whole of docs/results/accelerator.md."""
  groups = {}
  for name, line in found.items():
    groups.setdefault(name.partition("/")[0], {})[name] = line
  parts = [
    "# Measured on accelerators\n",
    "Written by `python -m benchmarks.accelerator --collect FOLDER` from "
    "[accelerator/lines.jsonl](accelerator/lines.jsonl), a line an item; each says card, driver, "
    "versions, commit and command.\n",
    _conditions(found),
  ]
  groups.pop("machine", None)  # which it is has been said
  for group, lines in groups.items():
    if group == "parity":
      parts += ["## The same numbers as on a CPU\n", _PARITY, parity_table(lines)]
    elif group == "speed":
      parts += ["## Speed\n", _SPEED, speed_table(lines), "![](accelerator/speed.png)\n"]
    else:
      parts += [f"## {_TITLES.get(group, group)}\n", _ROWS, row_table(lines)]
      if any("clustering" in line["result"] for line in lines.values()):
        parts.append(clustering_table(lines))
      if any("long_tail" in line["result"] for line in lines.values()):
        parts.append(long_tail_table(lines))
  if several := seed_table(found):
    parts += ["## Mean and standard deviation over seeds\n", several]
  if any("curves" in line["result"] for line in found.values()):
    parts += ["## Curves\n", "![](accelerator/curves.png)\n"]
  if failed:
    parts += ["## Failed\n", *(f"- {name}: {_error(line)}" for name, line in failed.items()), ""]
  return "\n".join(parts)


_PARITY = (
  "Largest difference from numbers that a CPU has stored, over three steps, and in brackets what "
  "is allowed: losses and gradient norms relative, coordinates of prototypes and their usage "
  "absolute.\n"
)
_SPEED = (
  "ViT-S/16, bfloat16, images in memory; the median of repeated steps. Parts are programs of their "
  "own, fused otherwise than inside the step. `peak` is a matrix product of 8,192 x 8,192 measured "
  "in the same process, `MiB` what XLA plans for a step or PyTorch had in use at most. PyTorch's "
  "steps get views that are ready, and so does ours in the columns that say so; they have fused "
  "attention, and TF32 in the float32 products of the loss, where ours has XLA's attention unless "
  "the row says cudnn, and full float32.\n"
)
_ROWS = (
  "float32 products of the encoder take TF32 on cards that have it. `best tenth` is the best k-NN "
  "of ten over training, chosen on the test images, at the k and T of the run.\n"
)
_TITLES = {
  "patch8": "CIFAR-10 (JPEG copy), small ViT, 512 images a step, 100 epochs",
  "patch4": "The same with patches of 4 pixels",
  "resnet18": "ResNet-18 with the CIFAR stem, 512 images a step, 200 epochs (its k 200, T .1)",
  "table1": "FALCON's Table 1: ResNet-8, 200 epochs",
  "adapt": "A head for the backbone that VICReg left (patch8/vicreg), 2,000 steps",
  "long_tail": "CIFAR-10 (JPEG copy) with 5,000 images of one class down to 50 of another",
}


def _conditions(found) -> str:
  """A line for each card, driver, commit and set of versions that there is."""
  seen = {}
  for line in found.values():
    versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items())
    said = f"{_card(line)}, driver {line['driver']}, commit {line['commit']}: {versions}"
    seen[said] = seen.get(said, 0) + 1
  return "\n".join(f"- {said} ({count} items)" for said, count in seen.items()) + "\n"


def _error(line: dict) -> str:
  """What was wrong; of a process that died the last line of its log that speaks of an error."""
  log = [text for text in line.get("log", ()) if "Error" in text or "error" in text]
  died = line["error"].startswith("the process ended") and log
  return " ".join((log[-1] if died else line["error"]).split())[:300]


def _table(head: list[str], rows: list[list]) -> str:
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  return "\n".join([*lines, *(f"| {' | '.join(_cell(x) for x in row)} |" for row in rows)]) + "\n"


def _cell(value) -> str:
  return "–" if value is None else str(value)


def _show(value, form: str, scale: float = 1.0):
  return None if value is None else format(scale * value, form)


def parity_table(lines: dict[str, dict]) -> str:
  quantities = ("loss", "grad_norm", "rows", "usage")
  rows = []
  for name, line in lines.items():
    allowed = line["result"]["tolerances"]
    for precision in ("float32", "bfloat16"):
      if precision in line["result"]:
        differences = line["result"][precision]["differences"]
        rows.append(
          [
            name.partition("/")[2],
            precision,
            *(
              _compared(differences[q], allowed[precision][q]) if q in differences else None
              for q in quantities
            ),
          ]
        )
  return _table(["method", "precision", "loss", "gradient norm", "prototypes", "usage"], rows)


def _compared(difference: float, allowed: float) -> str:
  shown = f"{difference:.1e} ({allowed:.0e})"
  return shown if difference <= allowed else f"**{shown}**"


def speed_table(lines: dict[str, dict]) -> str:
  """A row a step; where there are several cards each row says which."""
  cards = dict.fromkeys(_card(line) for line in lines.values())
  rows = []
  for name, line in lines.items():
    found = line["result"]
    ms = found["milliseconds"]
    rows.append(
      [
        name.partition("/")[2],
        *([_card(line)] if len(cards) > 1 else []),
        found["batch_size"],
        _show(found.get("img_per_s"), ".0f"),
        _show(found.get("img_per_s_ready"), ".0f"),
        *(_show(ms.get(k), ".1f") for k in ("step", "ready", "augment", "forward", "update")),
        _show(ms.get("backward_and_optimizer"), ".1f"),
        _show(ms.get("prototypes"), ".1f"),
        f"{found['flops_without_augmentation'] / 1e12:.2f}",
        f"{found['matrix_peak'] / 1e12:.0f}",
        _show(found.get("share_of_peak"), ".1f", 100),
        _show(found.get("share_of_peak_ready"), ".1f", 100),
        _show(found.get("peak_mib"), ",.0f"),
      ]
    )
  head = [
    "step",
    *(["card"] if len(cards) > 1 else []),
    "batch",
    "img/s",
    "img/s, views ready",
    "ms",
    "ms, views ready",
    "augment",
    "forward",
    "update",
    "backward, optimizer",
    "EM alone",
    "TFLOP, views ready",
    "peak TFLOP/s",
    "share of peak %",
    "views ready",
    "MiB",
  ]
  return _table(head, rows)


def row_table(lines: dict[str, dict]) -> str:
  rows = []
  for name, line in lines.items():
    found = line["result"]
    measures, knn = found["measures"], found["knn"]
    best = max((v for _, v in found["curves"].get("probe/knn", [])), default=None)
    published = found.get("published")
    rows.append(
      [
        name.partition("/")[2],
        *(_show(measures.get(f"collapse/unique_{t}"), ".1f", 100) for t in _UNIQUE),
        _show(measures.get("collapse/used"), ".1f", 100),
        _show(measures.get("collapse/perplexity"), ".0f"),
        _show(measures.get("collapse/drift"), ".3f"),
        _show(measures.get("collapse/rankme"), ".1f"),
        _show(knn.get("top1_k20_T0.07"), ".1f", 100),
        _show(best, ".1f", 100),
        _show(knn.get("top1_k200_T0.1"), ".1f", 100),
        _show(published if isinstance(published, float) else None, ".1f", 100),
        _show(measures.get("probe/linear_fitted"), ".1f", 100),
        found["verdict"],
        _show(measures.get("time/img_per_s"), ".0f"),
        _show(measures.get("seconds"), ".0f"),
      ]
    )
  head = [
    "row",
    *(f"unique {t}" for t in _UNIQUE),
    "used %",
    "perplexity",
    "drift",
    "RankMe",
    "k-NN %",
    "best tenth",
    "k-NN k 200, T .1",
    "published",
    "linear %",
    "verdict",
    "img/s",
    "s",
  ]
  return _table(head, rows)


_CLUSTERING = {
  "test_prototypes_nmi": "NMI",
  "test_prototypes_nmi_permuted": "NMI of permuted labels",
  "test_prototypes_ami": "AMI",
  "test_prototypes_used": "codes used",
  "test_kmeans_nmi": "NMI, k-means of 10",
  "test_kmeans_ami": "AMI, k-means of 10",
}


def clustering_table(lines: dict[str, dict]) -> str:
  """Clusters of the test images against classes, beside chance and what the paper says."""
  rows = []
  for name, line in lines.items():
    found, published = line["result"].get("clustering", {}), line["result"].get("published") or {}
    rows.append(
      [
        name.partition("/")[2],
        *(_show(found.get(key), "g" if key.endswith("used") else ".3f") for key in _CLUSTERING),
        _show(published.get("nmi"), ".2f"),
        _show(published.get("accuracy"), ".2f"),
      ]
    )
  return _table(["row", *_CLUSTERING.values(), "published NMI", "published accuracy"], rows)


_LONG_TAIL = {
  "knn_balanced": "k-NN %, balanced",
  "knn_medium": "medium",
  "linear_balanced": "linear %, balanced",
  "linear_medium": "medium",
  "even_knn_balanced": "even bank: k-NN %, balanced",
  "even_knn_medium": "medium",
  "even_linear_balanced": "even bank: linear %, balanced",
  "even_linear_medium": "medium",
  "prototypes_used_medium": "used prototypes of medium",
}


def long_tail_table(lines: dict[str, dict]) -> str:
  """Accuracies of frequent and rare classes, and how many of the used prototypes the rare have."""
  rows = []
  for name, line in lines.items():
    found = line["result"].get("long_tail", {})
    cells = (_show(100 * found[key] if key in found else None, ".1f") for key in _LONG_TAIL)
    rows.append([name.partition("/")[2], *cells])
  return _table(["row", *_LONG_TAIL.values()], rows)


def seed_table(found: dict[str, dict]) -> str:
  """Mean and standard deviation of the rows of which several seeds are done; "" without any."""
  seeds = {}
  for name, line in found.items():
    group, _, row = name.partition("/")
    if group.partition(",")[0] == "patch8":
      seeds.setdefault(row, []).append(line["result"]["measures"])
  columns = {
    "collapse/unique_0.5": "unique 0.5",
    "collapse/used": "used %",
    "probe/knn": "k-NN %",
    "probe/linear_fitted": "linear %",
  }
  rows = []
  for row, several in seeds.items():
    if len(several) > 1:
      cells = [
        [100 * m[key] for m in several] if all(key in m for m in several) else None
        for key in columns
      ]
      rows.append(
        [
          row,
          len(several),
          *(c and f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in cells),
        ]
      )
  return _table(["row", "seeds", *columns.values()], rows) if rows else ""


def figures(found: dict[str, dict], folder: pathlib.Path) -> None:
  """speed.png and curves.png, where there is something to draw."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  speeds = {k.partition("/")[2]: v["result"] for k, v in found.items() if k.startswith("speed/")}
  if speeds:
    drawn = []  # name, images a second, color
    for name, result in speeds.items():
      if "img_per_s" in result:
        drawn.append((name, result["img_per_s"], "tab:blue"))
      if "img_per_s_ready" in result:
        color = "tab:orange" if "torch" in result else "tab:cyan"
        drawn.append((f"{name}, views ready", result["img_per_s_ready"], color))
    names, values, colors = zip(*drawn, strict=True)
    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.4 * len(drawn)), layout="constrained")
    bars = axes.barh(names, values, color=colors)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("images a second")
    figure.savefig(folder / "speed.png", dpi=120)
    pyplot.close(figure)
  groups = {}
  for name, line in found.items():
    if "curves" in line["result"]:
      groups.setdefault(name.partition("/")[0], {})[name.partition("/")[2]] = line["result"]
  if groups:
    figure, grid = pyplot.subplots(
      len(groups), 3, figsize=(13, 3.4 * len(groups)), squeeze=False, layout="constrained"
    )
    for axes, (group, rows) in zip(grid, groups.items(), strict=True):
      for ax, measure in zip(axes, _THRESHOLDS, strict=True):
        for i, (name, result) in enumerate(rows.items()):
          points = result["curves"].get(measure)
          if points:
            steps, values = zip(*points, strict=True)
            style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
            ax.plot(steps, values, label=name, marker=".", **style)
        ax.set_title(f"{group}: {measure.partition('/')[2]}")
        ax.set_xlabel("step")
      if axes[-1].lines:
        axes[-1].legend(fontsize=7)
    figure.savefig(folder / "curves.png", dpi=100)
    pyplot.close(figure)
