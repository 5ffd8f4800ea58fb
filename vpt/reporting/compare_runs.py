"""Runs side by side: group those that differ in the seed alone, tabulate and draw what each group reached."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vpt.errors import ConfigError, did_you_mean
from vpt.reporting.runs import ABSENT, RunSummary, config_diff
from vpt.utils.drawing import save
from vpt.utils.table import Table


def format_value(value: object) -> str:
    """A setting as tables and pictures have it; `compare.json` has all digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in the seed alone: their `label` (what sets them apart) and the values of each metric."""

    label: Mapping[str, Any]
    runs: Sequence[RunSummary]
    values: Mapping[str, list[float]]

    @property
    def name(self) -> str:
        """Name of the group: the settings that set it apart, or the run's own name."""
        words = [
            f"{key.rpartition('.')[2]}={format_value(value)}" for key, value in self.label.items() if value != ABSENT
        ]
        return ", ".join(words) or group_label(self)

    def cell(self, metric: str) -> str:
        """`0.962`, or `0.962 ± 0.004` over several seeds."""
        values = self.values[metric]
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"


def compare_runs(runs: Sequence[RunSummary], metrics: Sequence[str]) -> list[RunGroup]:
    """One line for each group of runs that differ in the seed alone, the best by the first metric on top.

    Raises:
        ConfigError: for a metric that no run has.
    """
    known = sorted({key for run in runs for key in run.results or ()})
    for metric in metrics if known else ():
        if metric not in known:
            raise ConfigError(
                f"no run has the metric {metric}{did_you_mean(metric, known)}; there is {', '.join(known)}"
            )
    columns = dict(config_diff([run.settings for run in runs]))
    groups: dict[str, tuple[dict[str, Any], list[RunSummary]]] = {}
    for number, run in enumerate(runs):
        label = {key: values[number] for key, values in columns.items()}
        groups.setdefault(repr(label), (label, []))[1].append(run)
    lines = [
        RunGroup(
            label, group, {m: [run.results[m] for run in group if run.results and m in run.results] for m in metrics}
        )
        for label, group in groups.values()
    ]
    return sorted(lines, key=lambda line: -statistics.mean(line.values[metrics[0]] or [-1.0]))


def group_label(line: RunGroup) -> str:
    """The run's name; of several, what their names share (`lr=0.1,seed=0` and `lr=0.1,seed=1`: `lr=0.1`), or all."""
    names = [run.folder.name for run in line.runs]
    first, *others = [name.split(",") for name in names]
    shared = [word for word in first if all(word in other for other in others)]
    more = [f"and {len(names) - 3} more"] if len(names) > 4 else []
    return ",".join(shared) or ", ".join([*names[: 3 if more else 4], *more])


def runs_table(lines: Sequence[RunGroup], metrics: Sequence[str]) -> Table:
    """A row for each group: its differing keys, number of runs, metrics."""
    rows = []
    for line in lines:
        label = [group_label(line), *map(format_value, line.label.values())]
        done = sum(run.results is not None for run in line.runs)
        count = str(done) if done == len(line.runs) else f"{done} of {len(line.runs)}"
        rows.append([*label, count, *(line.cell(metric) for metric in metrics)])
    return Table(["run", *lines[0].label, "runs", *metrics], rows)


def draw_runs(lines: Sequence[RunGroup], metrics: Sequence[str], path: Path) -> Path:
    """Bars for every line and metric, whiskers one standard deviation, dots single runs."""
    names = [textwrap.fill(line.name, 60) for line in lines]
    height = 1.2 + 0.25 * sum(name.count("\n") + 3 for name in names)
    figure = Figure(figsize=(4.5 * len(metrics) + 2, height), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        values = [line.values[metric] for line in lines]
        means = [statistics.mean(group) if group else 0.0 for group in values]
        spread = [statistics.stdev(group) if len(group) > 1 else math.nan for group in values]
        axis.barh(range(len(lines)), means, xerr=spread, height=0.6, color="#7aa6c2", capsize=3)
        for row, group in enumerate(values):
            axis.plot(group, [row] * len(group), "o", color="#1d3b53", markersize=4, clip_on=False)
        axis.set(title=metric, yticks=range(len(lines)), yticklabels=names)
        axis.grid(axis="x", alpha=0.3)
        if min((value for group in values for value in group), default=0) >= 0:
            axis.set_xlim(0, None if max(means) > 0 else 1)
    axes[0][0].invert_yaxis()
    save(figure, path)
    return path
