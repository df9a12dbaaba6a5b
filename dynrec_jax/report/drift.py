"""Plots of the drift protocol: a panel for each way to cut the queries."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dynrec_jax.report.interests import COLOURS, INK

COLUMNS = 2


def draw_drift(path: Path, slices: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Writes a PNG: the metric in each bin with its 95 % interval, a line for each model and baseline.

    Args:
      path: of the PNG; its folder exists.
      slices: as `evaluate.drift.measure_slices` gives them.
      metric: which of the metrics.
    """
    rows = math.ceil(len(slices) / COLUMNS)
    figure = Figure(figsize=(7 * COLUMNS, 3.6 * rows), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, way in zip(panels, slices, strict=False):
        _panel(axes, way, metric)
    for axes in panels[len(slices) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, format="png")


def _panel(axes: Axes, way: Mapping[str, Any], metric: str) -> None:
    bins = [each for each in way["bins"] if each["metrics"]]
    names = list(bins[0]["metrics"]) if bins else []
    for number, name in enumerate(names):
        values = [each["metrics"][name][metric] for each in bins]
        means = [value["mean"] for value in values]
        below = [max(value["mean"] - value["low"], 0.0) for value in values]
        above = [max(value["high"] - value["mean"], 0.0) for value in values]
        places = [place + 0.08 * (number - (len(names) - 1) / 2) for place in range(len(bins))]
        axes.errorbar(places, means, yerr=[below, above], fmt="o-", ms=4, lw=1.2, capsize=2,
                      color=COLOURS[number % len(COLOURS)], label=name)  # fmt: skip
    axes.set_xticks(range(len(bins)), [f"{each['label']}\n{each['queries']:,}" for each in bins], fontsize=7)
    axes.set_title(way["title"], loc="left", fontsize=10, color=INK)
    axes.set_ylabel(metric, fontsize=8)
    axes.set_ylim(bottom=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
