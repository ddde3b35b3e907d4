"""report.png, a run on one picture: curves, prototypes against random ones, usage, spectrum."""

import pathlib

import matplotlib.figure
import numpy as np
from matplotlib import ticker

from protojax import files
from protojax.reports import record

_INK, _MUTED = "#1f4e79", "#b0b0b0"


def draw(run: record.Record) -> pathlib.Path:
  """Draws a finished run and writes the picture as report.png into its workdir.

  Args:
    run: from `record.read`; its curves and its arrays are drawn.

  Returns:
    The path of the picture.
  """
  arrays = run.arrays
  figure = matplotlib.figure.Figure(figsize=(13, 7.5), layout="constrained")
  axes = figure.subplots(2, 3)
  figure.suptitle(run.name)

  axis = axes[0, 0]
  axis.plot(*run.curve("train/loss"), color=_INK, label="loss")
  if "train/cross_entropy" in run.curves:  # the loss has several terms
    axis.plot(*run.curve("train/cross_entropy"), ":", color=_INK, label="cross entropy")
  axis.plot(*run.curve("train/ln_k"), color=_MUTED, linestyle="--", label="chance")
  axis.set(title="Loss", xlabel="step")
  axis.legend(frameon=False)

  axis = axes[0, 1]
  for key, label, style, point in (
    ("collapse/unique_0.025", "unique at .025", "-", "o"),
    ("collapse/unique_0.25", "unique at .25", "--", "s"),
    ("collapse/unique_0.5", "unique at .5", ":", "^"),
    ("collapse/used_sample", "used by the sample", "-.", "x"),
  ):
    step, value = run.curve(key)
    marker = point if len(step) == 1 else ""  # a line of one point is none
    axis.plot(step, 100 * value, style, marker=marker, color=_INK, label=label)
  axis.set(title="Prototypes, % of K", xlabel="step", ylim=(-3, 103))
  axis.legend(frameon=False, fontsize="small")

  axis = axes[0, 2]
  for key, label, style in (
    ("probe/knn", "k-NN", "o-"),
    ("probe/linear", "linear, online", "s--"),
  ):
    step, value = run.curve(key)
    axis.plot(step, 100 * value, style, color=_INK, label=label)
  for key, label, style in (
    ("floor/knn_pixels", "k-NN, raw pixels", "--"),
    ("floor/knn_untrained", "k-NN, untrained", ":"),
    ("floor/knn_start", "k-NN, at the start", ":"),
    ("floor/linear_pixels", "linear, raw pixels", "-."),
  ):
    for value in run.curve(key)[1][-1:]:
      axis.axhline(100 * value, color=_MUTED, linestyle=style, label=label)
  axis.set(title="Accuracy on the test images, %", xlabel="step")
  if any(len(line.get_xdata()) for line in axis.lines):
    axis.legend(frameon=False)
  else:
    axis.text(0.5, 0.5, "no labelled images", transform=axis.transAxes, ha="center", color=_MUTED)

  for axis in axes[0]:  # the same steps, whole ones, however few
    axis.set_xlim(0, 1.03 * max(run.step, 1))
    axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))

  axis = axes[1, 0]
  if "nearest" in arrays:
    bins = np.linspace(0, max(1.0, float(arrays["nearest_random"].max())), 60)
    axis.hist(arrays["nearest_random"], bins, color=_MUTED, label="random, same K and D")
    axis.hist(arrays["nearest"], bins, color=_INK, alpha=0.7, label="this run")
    axis.legend(frameon=False)
  axis.set(title="Cosine distance to the nearest prototype", ylabel="prototypes")

  axis = axes[1, 1]
  if "usage" in arrays:
    usage = np.sort(arrays["usage"])[::-1]
    axis.plot(np.arange(1, len(usage) + 1), usage, color=_INK)
    axis.axhline(usage.mean(), color=_MUTED, linestyle="--", label="balanced")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
  axis.set(title="Images per prototype", xlabel="prototype, by rank")

  axis = axes[1, 2]
  spectrum = np.sort(arrays["spectrum"])[::-1]
  axis.semilogy(np.arange(1, len(spectrum) + 1), spectrum, color=_INK)
  # A layer norm leaves one direction empty: noise of float32, not worth half the axis.
  axis.set_ylim(bottom=max(spectrum[spectrum > 1e-7 * spectrum[0]].min(initial=spectrum[0]), 1e-30))
  axis.set(title="Feature covariance, eigenvalues", xlabel="rank")

  for axis in axes.flat:
    axis.spines[["top", "right"]].set_visible(False)
  path = run.folder / "report.png"
  files.write(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
  return path
