"""Line charts as inline SVG: one metric a chart, one colour a run, colours left to the page's CSS.

A chart is readable without scripts; the values that a script may show on hover are in the attribute
data-lines. Every text is escaped.

Matplotlib's SVG was tried for axes and lines (3.10.8): 16 lines of this file less, since scales,
hover values and the line in words stay, but three times the markup (108 kB, not 36, for eight
charts), fonts and colours within the elements instead of the CSS, and ids that charts of one page
share.
"""

import html
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import ticker

COLOURS = 6  # --c0 to --c5 of the page; further runs take them again, dashed
_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 362, 10, 194
_POINTS = 300  # a line has no more; of longer ones the extremes are kept


class Line(NamedTuple):
  """One line of a chart.

  Attributes:
    label: what it is, for legend and hover.
    x: float [n], ascending.
    y: float [n]; NaN leaves a gap.
    colour: number of the run; None for a neutral one.
    reference: dashed and thin, what the others are measured by.
    steps: a histogram; y[i] holds from x[i] to x[i + 1], the last y is not drawn.
  """

  label: str
  x: np.ndarray
  y: np.ndarray
  colour: int | None = 0
  reference: bool = False
  steps: bool = False


class Scale(NamedTuple):
  """How a y axis is laid out.

  Attributes:
    place: monotone map from values to heights.
    ticks: (lowest, highest value) -> where a tick may stand.
    write: how a value is written.
  """

  place: Callable[[np.ndarray], np.ndarray]
  ticks: Callable[[float, float], Sequence[float]]
  write: Callable[[float], str]


def number(value: float) -> str:
  """Writes a number short, without trailing zeros.

  >>> number(6.93147), number(1024.0), number(3e-7)
  ('6.931', '1,024', '3e-07')
  """
  if not math.isfinite(value):
    return "not finite"
  if value == 0 or 1e-4 <= abs(value) < 1e5:
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
  return f"{value:.3g}"


def _tick(value: float) -> str:
  """The number at a tick, shorter still where it is large: 250k, 1.5M."""
  if not 1e5 <= abs(value) < 1e9:
    return number(value)
  return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"


def _power(value: float) -> str:
  """0 or a power of ten: 1, 10, 100, 10⁻³."""
  if value == 0 or 0.01 <= value <= 1000:
    return f"{value:g}"
  raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
  return "10" + f"{math.log10(value):.0f}".translate(raised)


def _even(low: float, high: float) -> np.ndarray:
  ticks = ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
  return np.round(ticks, 12)


def _powers(low: float, high: float) -> list[float]:
  first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
  stride = max(1, math.ceil((last - first) / 5))
  return [10.0**n for n in range(first, last + 1, stride)]


LINEAR = Scale(lambda v: v, _even, _tick)
PERCENT = Scale(lambda v: v, _even, lambda v: f"{number(round(100 * v, 6))} %")
LOG = Scale(np.log10, _powers, _power)  # values above 0
COUNT = Scale(np.log1p, lambda low, high: [0.0, *_powers(1, max(high, 1))], _power)  # 0 has a place


def figure(
  title: str,
  lines: Sequence[Line],
  *,
  x_label: str,
  caption: str,
  scale: Scale = LINEAR,
  y_range: tuple[float, float] | None = None,
  x_range: tuple[float, float] | None = None,
) -> str:
  """Draws one chart: a <figure> element, or "" if no line has a finite point.

  Args:
    title: plain text.
    lines: drawn in this order.
    x_label: with its unit.
    caption: what y is, in which unit.
    scale: LINEAR, PERCENT (of values 0 to 1), LOG or COUNT.
    y_range, x_range: ends of the axes; None fits them to the lines.
  """
  lines = [line for line in lines if np.isfinite(line.y).any()]
  if not lines:
    return ""
  finite = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
  low, high = y_range or _fitted(finite, scale)
  xs = np.concatenate([line.x for line in lines])
  left, right = x_range or (float(xs.min()), float(xs.max()))
  if left == right:
    left, right = left - 1, right + 1
  bottom, top = (float(scale.place(np.float64(v))) for v in (low, high))

  def at_x(x):
    return _LEFT + (np.asarray(x, float) - left) / (right - left) * (_RIGHT - _LEFT)

  def at_y(y):
    share = (scale.place(np.clip(np.asarray(y, float), low, high)) - bottom) / (top - bottom)
    return _BOTTOM - share * (_BOTTOM - _TOP)

  parts = _axes(x_label, at_x, at_y, _even(left, right), scale, (left, right), (low, high))
  parts += [_drawn(line, at_x, at_y) for line in lines]
  axis = {"left": left, "right": right, "x": x_label.split(",")[0]}
  hover = [
    {"n": line.label, "c": line.colour, "x": _short(line.x), "y": _texts(line, scale)}
    for line in (_thinned(line) for line in lines)
  ]
  data = html.escape(json.dumps({**axis, "lines": hover}, separators=(",", ":")))
  spoken = html.escape(f"{title}. " + "; ".join(_spoken(line, scale, x_label) for line in lines))
  return (
    f'<figure class="chart"><figcaption><h3>{html.escape(title)}</h3>'
    f"<p>{html.escape(caption)}</p></figcaption>"
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{spoken}" data-lines="{data}">'
    f"{''.join(parts)}</svg></figure>"
  )


def _fitted(values: np.ndarray, scale: Scale) -> tuple[float, float]:
  low, high = float(values.min()), float(values.max())
  if scale is LOG:
    return low / 1.5, high * 1.5
  if scale is COUNT:
    return 0.0, max(high, 1.0) * 1.3
  margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
  return low - margin, high + margin


def _axes(x_label, at_x, at_y, x_ticks, scale, x_range, y_range) -> list[str]:
  parts = []
  for value in scale.ticks(*y_range):
    if y_range[0] <= value <= y_range[1]:
      y = float(at_y(value))
      parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
      parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y + 3.5:.1f}">{scale.write(value)}</text>')
  parts.append(f'<path class="axis" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>')
  for value in x_ticks:
    if x_range[0] <= value <= x_range[1]:
      x = float(at_x(value))
      parts.append(f'<path class="axis" d="M{x:.1f} {_BOTTOM}v4"/>')
      parts.append(f'<text class="x" x="{x:.1f}" y="{_BOTTOM + 16}">{_tick(value)}</text>')
  middle = (_LEFT + _RIGHT) / 2
  parts.append(f'<text class="x" x="{middle}" y="{_HEIGHT - 4}">{html.escape(x_label)}</text>')
  return parts


def _drawn(line: Line, at_x, at_y) -> str:
  """A path with a gap, marked, wherever a value is not finite; dots where points are few."""
  few = len(line.x) <= 12 and not line.reference and not line.steps
  line = _thinned(line)
  x, y, path, parts, pen = at_x(line.x), at_y(line.y), "", [], False
  for i, finite in enumerate(np.isfinite(line.y)):
    if not finite:
      pen = False
      parts.append(
        f'<path class="gap" d="M{x[i] - 3:.1f} {_TOP}l6 6m0 -6l-6 6"><title>{number(line.x[i])}: '
        "not finite</title></path>"
      )
      continue
    if line.steps:
      end = f"H{x[i + 1]:.1f}" if i + 1 < len(x) else ""
      path += (f"V{y[i]:.1f}" if pen else f"M{x[i]:.1f} {_BOTTOM}V{y[i]:.1f}") + end
    else:
      path += f"{'L' if pen else 'M'}{x[i]:.1f} {y[i]:.1f}"
    if few:
      parts.append(f'<circle cx="{x[i]:.1f}" cy="{y[i]:.1f}" r="3"/>')
    pen = True
  kind = " ".join(
    name
    for name, on in (
      ("line", True),
      ("reference", line.reference),
      ("area", line.steps and not line.reference),
      ("again", line.colour is not None and line.colour >= COLOURS),
    )
    if on
  )
  colour = "muted" if line.colour is None else f"c{line.colour % COLOURS}"
  return f'<g class="{kind} {colour}"><path d="{path}"/>{"".join(parts)}</g>'


def _thinned(line: Line) -> Line:
  """The line with about `_POINTS` points: of each stretch lowest, highest and what is missing."""
  if len(line.x) <= _POINTS or line.steps:
    return line
  keep = {0, len(line.x) - 1}
  for part in np.array_split(np.arange(len(line.x)), _POINTS // 2):
    y, finite = line.y[part], np.isfinite(line.y[part])
    if not finite.all():
      keep.add(int(part[~finite][0]))
    if finite.any():
      keep |= {int(part[np.nanargmin(y)]), int(part[np.nanargmax(y)])}
  chosen = np.array(sorted(keep))
  return line._replace(x=line.x[chosen], y=line.y[chosen])


def _short(values: np.ndarray) -> list[float]:
  return [float(f"{v:.6g}") for v in values]


def _texts(line: Line, scale: Scale) -> list[str]:
  return [scale.write(v) if scale is PERCENT else number(v) for v in line.y.tolist()]


def _spoken(line: Line, scale: Scale, x_label: str) -> str:
  """The line in words, for those who cannot see it."""
  if line.reference or line.steps:
    return line.label
  first, last = np.flatnonzero(np.isfinite(line.y))[[0, -1]]
  y = _texts(line, scale)
  where = x_label.split(",")[0]
  return (
    f"{line.label}: {y[first]} at {where} {number(line.x[first])}, {y[last]} at {where} "
    f"{number(line.x[last])}"
  )
