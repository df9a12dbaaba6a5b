"""A picture of one user's interests over time: the planted ones above, what a model infers below."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

SHOWN = 7  # topics with a colour of their own, at most; the others are drawn together
LEAST = 0.08  # share that a topic must reach at some time to have a colour of its own
# Okabe & Ito (2008), told apart with any colour vision, without the black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
REST_COLOUR = "#D9D9D9"
INK = "#333333"


def draw_interests(
    path: Path,
    times: Sequence[int] | NDArray[np.int64],
    planted: ArrayLike | None,
    inferred: ArrayLike,
    topic_names: Sequence[str],
    title: str,
) -> None:
    """Writes a PNG with stacked areas, one panel above the other, over the same time in the same colours.

    Args:
      path: of the PNG; its folder exists. A file that is there is replaced.
      times: P moments in ascending order, seconds since 1970.
      planted: [P, K], the true share of each topic; rows sum to 1. None, where nobody knows: one panel is drawn.
      inferred: [P, K], a model's share of each topic; rows sum to 1.
      topic_names: K names.
      title: above the panels.

    Raises:
      ValueError: the shapes do not belong together, or there are fewer than two moments.
    """
    panels = {"interests the model infers from the history": np.asarray(inferred, np.float64)}
    if planted is not None:
        panels = {"planted interests": np.asarray(planted, np.float64), **panels}
    shape = (len(times), len(topic_names))
    for heading, shares in panels.items():
        if shares.shape != shape or len(times) < 2:
            raise ValueError(f"{heading}: shape {shares.shape}; expected {shape}, with two times or more")
    shown = _most_present(np.stack(list(panels.values())))
    moments = np.asarray(times, np.int64).astype("datetime64[s]")
    # A figure of its own canvas: pyplot would hold on to it, and look for a display.
    figure = Figure(figsize=(10, 1 + 2.5 * len(panels)), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    labels = [topic_names[topic] for topic in shown] + ["all others"]
    for axes, (heading, shares) in zip(rows, panels.items(), strict=True):
        _stack(axes, moments, shares, shown, labels)
        axes.set_title(heading, loc="left", fontsize=11, color=INK)
    handles, _ = rows[0].get_legend_handles_labels()
    # From top to bottom, as the areas lie.
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, labelcolor=INK)
    locator = AutoDateLocator(minticks=4, maxticks=9)
    rows[-1].xaxis.set_major_locator(locator)
    rows[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))
    figure.savefig(path, format="png")


def _most_present(panels: NDArray[np.float64]) -> list[int]:
    """The topics with most of all panels [panels, P, K], most first."""
    most = np.argsort(-panels.sum(axis=(0, 1)), kind="stable")[:SHOWN]
    reached = panels.max(axis=(0, 1))
    return [int(topic) for topic in most if reached[topic] >= LEAST]


def _stack(
    axes: Axes,
    moments: NDArray[np.datetime64],
    shares: NDArray[np.float64],
    shown: list[int],
    labels: list[str],
) -> None:
    others = np.setdiff1d(np.arange(shares.shape[1]), shown)
    layers = [*shares[:, shown].T, shares[:, others].sum(axis=1)]
    colours = [*COLOURS[: len(shown)], REST_COLOUR]
    axes.stackplot(moments, layers, labels=labels, colors=colours, linewidth=0.0)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.tick_params(colors=INK, length=3)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
