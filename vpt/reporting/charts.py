"""Charts of a report besides curves: intervals, shares as shades, distributions."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from vpt.evaluation.metrics.perception import iogt, iou
from vpt.evaluation.predictions import Prediction

_WIDTH, _HEIGHT = 150, 16  # of an interval's drawing


def interval(value: float, low: float, high: float, *, span: tuple[float, float], mark: float | None = None) -> Markup:
    """A dot and its interval on a line from one end of `span` to the other, with a tick at `mark`."""

    def x(at: float) -> float:
        share = (min(max(at, span[0]), span[1]) - span[0]) / (span[1] - span[0])
        return 4 + share * (_WIDTH - 8)

    middle = _HEIGHT / 2
    colour = "var(--accent)"
    if mark is not None:
        colour = "var(--bad)" if high < mark else "var(--good)" if low > mark else "var(--soft)"
    tick = f'<path d="M{x(mark):.1f} 0V{_HEIGHT}" stroke="var(--soft)"/>' if mark is not None else ""
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" style="width:{_WIDTH}px" role="img" aria-hidden="true">'
        f'<path d="M4 {middle}H{_WIDTH - 4}" stroke="var(--line)"/>{tick}'
        f'<path d="M{x(low):.1f} {middle}H{x(high):.1f}" stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
        f'<circle cx="{x(value):.1f}" cy="{middle}" r="4" fill="{colour}"/></svg>'
    )


def confusion_table(table: Mapping[str, Mapping[str, int]]) -> str:
    """Counts, shaded by their share of the row; what agrees is framed."""
    kinds = sorted({*table, *(kind for row in table.values() for kind in row)}, key=lambda kind: (kind != "none", kind))
    head = "".join(f'<th class="number">{escape(kind)}</th>' for kind in kinds)
    rows = [_confused(asked, table[asked], kinds) for asked in kinds if asked in table]
    return (
        '<div class="wide"><table class="shares"><tr><th>the record perceives by ↓, the model by →</th>'
        f"{head}</tr>{''.join(rows)}</table></div>"
    )


def _confused(asked: str, counts: Mapping[str, int], kinds: Sequence[str]) -> str:
    total = sum(counts.values())
    cells = []
    for kind in kinds:
        count = counts.get(kind, 0)
        shade = f"background: color-mix(in srgb, var(--accent) {70 * count / total:.0f}%, transparent)"
        frame = "; outline: 1px solid var(--ink); outline-offset: -1px" if kind == asked else ""
        cells.append(f'<td class="number" style="{shade}{frame}" title="{count / total:.1%}">{count:,}</td>')
    return f"<tr><th>{escape(asked)}</th>{''.join(cells)}</tr>"


def overlaps(items: Sequence[Prediction]) -> list[tuple[float, float, bool]]:
    """IoU and IoGT of the first region of each answer, and whether that is right; where there is one and the record
    knows its box.
    """
    pairs = [(item.region, item.box, item.correct) for item in items]
    return [(iou(seen, true), iogt(seen, true), right) for seen, true, right in pairs if seen and true]


def draw_overlaps(found: Sequence[tuple[float, float, bool]], theme: dict[Any, Any]) -> "Figure":
    """How IoU and IoGT are distributed, right and wrong answers stacked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    right = np.array([good for _, _, good in found])
    with matplotlib.rc_context(theme):
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.9), layout="constrained", sharey=True)
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
