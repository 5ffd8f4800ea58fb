"""Curves of runs over their steps: the panels of a page, and `curves.png`."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from vpt.config.former_names import present_metric
from vpt.errors import CheckpointError
from vpt.reporting import html
from vpt.reporting.panels import SECTIONS, Panel
from vpt.utils.drawing import save

DASHES: list[Any] = ["-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)), (0, (8, 2, 1, 2))]
MOST_LABELS = 12  # more would be no help
LEGEND_WIDTH = 96  # characters beside each other below a plot
SMOOTHED_FROM, WINDOWS = 20, 40  # points of a curve; how many times the width of a mean fits in it
Curves = dict[str, list[tuple[int, float]]]  # metric -> (step, value)


def read_curves(folder: Path) -> Curves:
    """The metrics of a run over its steps. Raises CheckpointError where there are none."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no metrics.jsonl; give a run (outputs/RUN_NAME)")
    curves: Curves = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            curves.setdefault(present_metric(name), []).append((step, value))
    return curves


def draw_curves(folder: Path) -> Path:
    """`curves.png` of a run: losses, rewards, rates, accuracies with the right tokens given, and speed."""
    runs = {folder.name: read_curves(folder)}
    panels = [*SECTIONS["train"], *SECTIONS["rl"], *SECTIONS["eval"], *SECTIONS["perf"][:1]]
    shown = [panel for panel in panels if panel.metrics_of(runs)]
    columns = 3
    rows = max(1, -(-len(shown) // columns))
    with matplotlib.rc_context(html.theme()):
        figure = Figure(figsize=(5 * columns, 3.7 * rows), layout="constrained")
        for panel, place in zip(shown, figure.subfigures(rows, columns, squeeze=False).flat):
            _plot(place, panel, panel.metrics_of(runs), runs, mean=panel.mean)
        figure.suptitle(folder.name, weight="bold")
        save(figure, folder / "curves.png", dpi=90)
    return folder / "curves.png"


def panel_sections(runs: Mapping[str, Curves]) -> dict[str, list[Markup]]:
    """The panels of a page, by section; those that no run has anything of are left out."""
    found = {name: [drawn for p in panels if (drawn := _panel(p, runs))] for name, panels in SECTIONS.items()}
    return {name: drawn for name, drawn in found.items() if drawn}


def _panel(panel: Panel, runs: Mapping[str, Curves]) -> Markup:
    """The panel; of one that shows a mean, what it is the mean of folded below."""
    figure = draw_panel(panel, runs)
    if figure is None:
        return Markup()
    each = draw_panel(panel, runs, mean=False) if panel.mean else None
    folded = html.fragments.folded("each one", html.figure(each)) if each else ""
    return Markup("<div>{}{}</div>").format(html.figure(figure), folded)


def draw_panel(panel: Panel, runs: Mapping[str, Curves], *, mean: bool | None = None) -> Figure | None:
    """One panel over all runs: a colour for each run, a dash for each metric. None where no run has any of it."""
    metrics = panel.metrics_of(runs)
    if not metrics:
        return None
    with matplotlib.rc_context(html.theme()):
        figure = Figure(figsize=(5.2, 3.4))
        _plot(figure, panel, metrics, runs, mean=panel.mean if mean is None else mean)
    return figure


def _plot(
    figure: Figure | SubFigure, panel: Panel, metrics: Sequence[str], runs: Mapping[str, Curves], *, mean: bool
) -> None:  # fmt: skip
    axis = figure.subplots()
    names = ["mean"] if mean else metrics
    if any(value < 0 for curves in runs.values() for name in metrics for _, value in curves.get(name, ())):
        panel = replace(panel, log=False)  # the loss of a policy: on a logarithmic axis half of it would be gaps
    for number, curves in enumerate(runs.values()):
        curves = {"mean": mean_curve(curves, metrics)} if mean else curves
        for place, (style, name) in enumerate(zip(DASHES * len(names), names)):
            if curves.get(name):
                _curve(axis, panel, curves[name], ls=style, color=f"C{number if len(runs) > 1 else place}")
    title = f"{panel.title} (mean of {len(metrics)})" if mean else panel.title
    axis.set(title=title, xlabel="step", yscale="log" if panel.log else "linear")
    if panel.log:  # plain numbers: texts of a page are not set as formulas
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    _legend(figure, _keys(names, [*runs]))


def mean_curve(curves: Curves, names: Sequence[str]) -> list[tuple[int, float]]:
    """The mean of some metrics at each step, over those that it has."""
    at: dict[int, list[float]] = {}
    for name in names:
        for step, value in curves.get(name, ()):
            at.setdefault(step, []).append(value)
    return [(step, float(np.mean(values))) for step, values in sorted(at.items())]


def _curve(axis: Axes, panel: Panel, points: Sequence[tuple[int, float]], **look: Any) -> None:
    """A line; where it is to be smooth, its running mean over a faint one."""
    steps, values = np.array(points, dtype=float).T
    if panel.log:  # what has no logarithm is a gap, not a line to the bottom
        values = np.where(values > 0, values, math.nan)
    smooth = panel.smooth and len(steps) >= SMOOTHED_FROM
    axis.plot(steps, values, lw=1.2, alpha=0.25 if smooth else 1, marker="." if len(steps) < 40 else None, **look)
    if smooth:
        width = max(len(values) // WINDOWS, 3) // 2 * 2 + 1
        means = np.convolve(np.pad(values, width // 2, mode="edge"), np.full(width, 1 / width), "valid")
        axis.plot(steps, means, lw=1.4, **look)


def _keys(metrics: Sequence[str], runs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Label -> how its lines look: a colour for each run, a dash for each metric; of one run, both for each metric."""
    shared = os.path.commonpath([name.rpartition("/")[0] for name in metrics])
    keys: dict[str, dict[str, Any]] = {run: {"color": f"C{n}"} for n, run in enumerate(runs)} if len(runs) > 1 else {}
    if len(metrics) > 1:
        for number, (style, name) in enumerate(zip(DASHES * len(metrics), metrics)):
            colour = f"C{number}" if len(runs) == 1 else html.INK
            keys[name.removeprefix(f"{shared}/")] = {"color": colour, "ls": style}
    return keys


def _legend(figure: Figure | SubFigure, keys: Mapping[str, Mapping[str, Any]]) -> None:
    """Below the plot, where it hides no curve; a figure of its own grows by it.

    Such figures have fixed margins: pages have many, and a layout that is solved for takes as long as all the rest.
    """
    shown = 1 < len(keys) <= MOST_LABELS
    columns = max(1, min(len(keys), LEGEND_WIDTH // (max(map(len, keys), default=0) + 8)))
    if isinstance(figure, Figure):
        (width, height), below = figure.get_size_inches(), 0.17 * -(-len(keys) // columns) * shown
        figure.set_size_inches(width, height + below)
        figure.subplots_adjust(
            left=0.75 / width, right=1 - 0.1 / width, top=1 - 0.35 / (height + below),
            bottom=(0.5 + below) / (height + below),
        )  # fmt: skip
    if shown:
        lines = [Line2D([], [], lw=1.2, **look) for look in keys.values()]
        figure.legend(
            lines, [*keys], loc="lower center" if isinstance(figure, Figure) else "outside lower center",
            fontsize=7, ncols=columns, handlelength=3,
        )  # fmt: skip
