"""Charts of a report besides curves: intervals, shares as shades, distributions, ablations."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from vpt.evaluation.ablations.runner import Comparison
from vpt.evaluation.metrics.perception import iogt, iou
from vpt.evaluation.predictions import Prediction
from vpt.reporting.html import fragments
from vpt.utils.drawing import save

_WIDTH, _HEIGHT = 150, 16  # of an interval's drawing
WORSE, BETTER, EVEN = "#c0392b", "#1b7f3b", "#7f8c8d"


def interval(value: float, low: float, high: float, *, span: tuple[float, float], mark: float | None = None) -> Markup:
    """A dot and its interval on a line from one end of `span` to the other, with a tick at `mark`."""

    def x(at: float) -> float:
        share = (min(max(at, span[0]), span[1]) - span[0]) / (span[1] - span[0])
        return 4 + share * (_WIDTH - 8)

    colour = "var(--accent)"
    if mark is not None:
        colour = "var(--bad)" if high < mark else "var(--good)" if low > mark else "var(--soft)"
    return fragments.interval(_WIDTH, _HEIGHT, x(low), x(value), x(high), None if mark is None else x(mark), colour)


def confusion_table(counts: Mapping[str, Mapping[str, int]]) -> Markup:
    """Counts of expected and chosen actions, shaded by their share of the row; what agrees is framed."""
    kinds = sorted(
        {*counts, *(kind for row in counts.values() for kind in row)}, key=lambda kind: (kind != "none", kind)
    )
    return fragments.shares(kinds, counts)


def overlaps(items: Sequence[Prediction]) -> list[tuple[float, float, bool]]:
    """IoU and IoGT of the first region of each answer, and whether that is right; where there is one and the record
    knows its box.
    """
    pairs = [(item.region, item.box, item.correct) for item in items]
    return [(iou(seen, true), iogt(seen, true), right) for seen, true, right in pairs if seen and true]


def draw_overlaps(found: Sequence[tuple[float, float, bool]], theme: dict[Any, Any]) -> Figure:
    """How IoU and IoGT are distributed, right and wrong answers stacked."""
    right = np.array([good for _, _, good in found])
    with matplotlib.rc_context(theme):
        figure = Figure(figsize=(8.4, 2.9), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        names = ("IoU of the region and the true box", "IoGT: the share of the true box that is seen")
        for axis, title, place in zip(axes, names, (0, 1), strict=True):
            values = np.array([pair[place] for pair in found])
            axis.hist(
                [values[right], values[~right]], bins=np.linspace(0, 1, 21).tolist(), stacked=True,
                color=["#3a9d5d", "#d9604f"], label=["right answers", "wrong answers"],
            )  # fmt: skip
            axis.set(title=title, xlim=(0, 1))
            axis.grid(axis="y")
        axes[0].set_ylabel("answers")
        axes[0].legend(fontsize=8)
    return figure


def draw_ablations(compared: Mapping[str, Comparison], path: Path, *, title: str) -> Path:
    """One line an ablation that could change an answer: the difference to the score, with its interval."""
    items = [(item, item.difference) for item in compared.values() if item.difference is not None]
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(items)), layout="constrained")
    axis = figure.subplots()
    for place, (item, d) in enumerate(items):
        colour = WORSE if d.high < 0 else BETTER if d.low > 0 else EVEN
        axis.plot([d.low, d.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
        axis.plot(d.value, place, "o", color=colour, markersize=6)
        axis.annotate(
            f"{d.value:+.3f}   {item.reference:.3f} → {item.ablated:.3f}", (1.01, place), va="center", fontsize=9,
            color=colour, xycoords=axis.get_yaxis_transform(), annotation_clip=False,
        )  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.8)
    labels = [f"{textwrap.fill(item.description, 48)}\n{item.questions:,} questions" for item, _ in items]
    axis.set_yticks(range(len(items)), labels, fontsize=8)
    axis.set_ylim(len(items) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("difference of the score, with its paired 95% bootstrap interval")
    axis.set_title(title, fontsize=10, weight="bold")
    save(figure, path)
    return path
