"""The table of controls as a picture."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import matplotlib

from vpt.evaluation.controls.run import Comparison

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WORSE, BETTER, EVEN = "#c0392b", "#1b7f3b", "#7f8c8d"


def draw_ablations(compared: Mapping[str, Comparison], path: Path, *, title: str) -> Path:
    """One line a control that could change an answer: the difference that it makes to the score, with its interval."""
    items = [item for item in compared.values() if item.difference is not None]
    figure, axis = plt.subplots(figsize=(11, 1.6 + 0.45 * len(items)), layout="constrained")
    for place, item in enumerate(items):
        d = item.difference
        assert d is not None
        colour = WORSE if d.high < 0 else BETTER if d.low > 0 else EVEN
        axis.plot([d.low, d.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
        axis.plot(d.value, place, "o", color=colour, markersize=6)
        axis.annotate(
            f"{d.value:+.3f}   {item.reference:.3f} → {item.ablated:.3f}", (1.01, place), va="center", fontsize=9,
            color=colour, xycoords=axis.get_yaxis_transform(), annotation_clip=False,
        )  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.8)
    labels = [f"{textwrap.fill(item.description, 48)}\n{item.questions:,} questions" for item in items]
    axis.set_yticks(range(len(items)), labels, fontsize=8)
    axis.set_ylim(len(items) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("difference of the score, with its paired 95% bootstrap interval")
    axis.set_title(title, fontsize=10, weight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
