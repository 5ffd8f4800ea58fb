"""Curves of runs: figures of each panel, one self-contained page, or a workspace at W&B."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from vpt.config.former_names import present_metric
from vpt.errors import CheckpointError, ConfigError
from vpt.reporting import html
from vpt.reporting.panels import SECTIONS, Panel
from vpt.utils.table import Table

DASHES: list[Any] = ["-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)), (0, (8, 2, 1, 2))]
MOST_LABELS = 12  # more would be no help
LEGEND_WIDTH = 96  # characters beside each other below a plot
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


def draw_panel(panel: Panel, runs: Mapping[str, Curves]) -> "Figure | None":
    """One panel over all runs: a colour for each run, a dash for each metric. None where no run has any of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = dict.fromkeys(name for curves in runs.values() for name in curves)
    metrics = panel.shown(known)
    if not metrics:
        return None
    with matplotlib.rc_context(html.theme()):
        figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
        _plot(axis, panel, metrics, runs)
    return figure


def _plot(axis: "Axes", panel: Panel, metrics: Sequence[str], runs: Mapping[str, Curves]) -> None:
    for number, curves in enumerate(runs.values()):
        for style, name in zip(DASHES * len(metrics), metrics):
            if name in curves:
                steps, values = zip(*curves[name])
                if panel.log:  # what has no logarithm is a gap, not a line to the bottom
                    values = tuple(value if value > 0 else math.nan for value in values)
                colour = f"C{number if len(runs) > 1 else metrics.index(name)}"
                axis.plot(steps, values, ls=style, lw=1.2, color=colour, marker="." if len(steps) < 40 else None)
    axis.set(title=panel.title, xlabel="step", yscale="log" if panel.log else "linear")
    if panel.log:  # plain numbers: texts of a page are not set as formulas
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    _legend(axis, _keys(metrics, [*runs]))


def _keys(metrics: Sequence[str], runs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Label -> how its lines look: a colour for each run, a dash for each metric; of one run, both for each metric."""
    shared = os.path.commonpath([name.rpartition("/")[0] for name in metrics])
    keys: dict[str, dict[str, Any]] = {run: {"color": f"C{n}"} for n, run in enumerate(runs)} if len(runs) > 1 else {}
    if len(metrics) > 1:
        for number, (style, name) in enumerate(zip(DASHES * len(metrics), metrics)):
            colour = f"C{number}" if len(runs) == 1 else html.INK
            keys[name.removeprefix(f"{shared}/")] = {"color": colour, "ls": style}
    return keys


def _legend(axis: "Axes", keys: Mapping[str, Mapping[str, Any]]) -> None:
    """Below the plot, where it hides no curve; the figure grows by it."""
    from matplotlib.lines import Line2D

    if not 1 < len(keys) <= MOST_LABELS:
        return
    columns = max(1, min(len(keys), LEGEND_WIDTH // (max(map(len, keys)) + 8)))
    figure = axis.figure.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.17 * -(-len(keys) // columns))
    lines = [Line2D([], [], lw=1.2, **style) for style in keys.values()]
    figure.legend(lines, [*keys], loc="outside lower center", fontsize=7, ncols=columns, handlelength=3)


def write_page(folders: Sequence[Path]) -> Path:
    """All panels of some runs as one self-contained page in the first of them."""
    runs = {folder.name: read_curves(folder) for folder in folders}
    sections = []
    for name, panels in SECTIONS.items():
        drawn = [figure for panel in panels if (figure := draw_panel(panel, runs)) is not None]
        if drawn:
            sections.append((name, html.fragments.panels([html.figure(figure) for figure in drawn])))
    sections.append(("results", _results(folders)))
    page = folders[0] / "dashboard.html"
    page.write_text(html.page(", ".join(runs), sections, lead="Metrics of each run over its steps."), encoding="utf-8")
    return page


def _results(folders: Sequence[Path]) -> Markup:
    """A table of what the runs reached; a run that has not ended has none."""
    rows: list[list[Any]] = []
    for folder in folders:
        summary = folder / "summary.json"
        reached = json.loads(summary.read_text()) if summary.is_file() else {}
        rows.append([folder.name, *(reached.get(key, "-") for key in ("accuracy", "questions", "steps"))])
    return Table(["run", "accuracy", "questions", "steps"], rows).as_html()


def workspace(project: str, entity: str, name: str = "vpt") -> Any:
    """The panels as a W&B workspace, not saved yet. Raises ConfigError where the package is missing."""
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2 as reports
    except ImportError:
        raise ConfigError("--wandb needs a package; type: pip install wandb-workspaces") from None
    sections = [
        workspaces.Section(
            name=section,
            is_open=section in ("train", "eval"),
            panels=[
                reports.LinePlot(
                    title=panel.title, x="Step", log_y=panel.log,
                    y=[m for m in panel.metrics if "*" not in m],
                    metric_regex=_regex(panel) or None,
                )
                for panel in panels
            ],
        )
        for section, panels in SECTIONS.items()
    ]  # fmt: skip
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


def _regex(panel: Panel) -> str:
    """W&B finds metrics by one regular expression; only patterns need it."""
    if not any("*" in metric for metric in panel.metrics):
        return ""
    return "|".join(f"^{metric.replace('*', '.*')}$" for metric in panel.metrics)
