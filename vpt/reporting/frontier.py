"""Accuracy against perceived visual tokens, and what perception gains over the checkpoints of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vpt.evaluation.ablations.runner import from_json, gain_of
from vpt.evaluation.statistics import Estimate
from vpt.reporting.runs import run_summaries

Gain = Mapping[str, Estimate]  # as `gain_of` returns it


@dataclass(frozen=True)
class FrontierPoint:
    """The accuracy of one evaluation and what it costs: perceived visual tokens a question."""

    label: str
    accuracy: Estimate
    visual_tokens: Estimate


def frontier_points(run: Path, *, name: str = "") -> list[FrontierPoint]:
    """A point for each evaluation of a run; those whose answers without perception are known have that one, too.

    `name`: of the run among others (`run_names`); by default its folder's.
    """
    points, name = [], name or run.name
    for folder, summary in run_summaries(run).items():
        label = name if folder == run else f"{name}: {folder.name}"
        tokens = summary.get("perception", {}).get("extra_visual_tokens")
        score: dict[str, Any] = next(
            (found for metrics in summary.get("metrics", {}).values() for found in metrics.values()), {}
        )
        if tokens and score.get("value") is not None and len(summary["metrics"]) == 1:
            points.append(FrontierPoint(label, Estimate(**score), Estimate(**tokens)))
        if gain := _gain(summary):
            without, none = gain["without_perception"], Estimate(0.0, 0.0, 0.0, 0)
            points.append(FrontierPoint(f"{label}, no perception", without, none))
    return points


def gains_by_step(run: Path) -> list[tuple[int, Gain]]:
    """What perception gains at each checkpoint of a run that was asked, in order of steps."""
    found = [(summary.get("step"), _gain(summary)) for summary in run_summaries(run).values()]
    return sorted(((step, gain) for step, gain in found if step is not None and gain), key=lambda pair: pair[0])


def draw_frontier(points: Sequence[FrontierPoint], theme: dict[Any, Any]) -> Figure:
    """Accuracy over perceived visual tokens, with intervals; a line joins those that no other point betters."""
    with matplotlib.rc_context(theme):
        figure = Figure(figsize=(8.4, 1.8 + 0.22 * max(10, len(points))), layout="constrained")
        axis = figure.subplots()
        for point in sorted(points, key=lambda point: point.visual_tokens.value):
            x, y = point.visual_tokens, point.accuracy
            spread = [[y.value - y.low], [y.high - y.value]], [[x.value - x.low], [x.high - x.value]]
            axis.errorbar(x.value, y.value, *spread, fmt="o", capsize=3, label=point.label)
        best = pareto(points)
        axis.plot([p.visual_tokens.value for p in best], [p.accuracy.value for p in best], "--", color="#888888")
        axis.set(xlabel="perceived visual tokens of a question", ylabel="accuracy")
        axis.grid()
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def pareto(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points that are more accurate than every one with as few tokens, in order of tokens."""
    best: list[FrontierPoint] = []
    for point in sorted(points, key=lambda point: (point.visual_tokens.value, -point.accuracy.value)):
        if not best or point.accuracy.value > best[-1].accuracy.value:
            best.append(point)
    return best


def draw_gains(found: Sequence[tuple[int, Gain]], theme: dict[Any, Any]) -> Figure:
    """Left: accuracy with and without perception over the steps; right: what perception helps and harms."""
    steps = [step for step, _ in found]
    with matplotlib.rc_context(theme):
        figure = Figure(figsize=(8.4, 3.0), layout="constrained")
        panels = (("with_perception", "without_perception"), ("call_gain", "call_harm", "trigger_rate"))
        for axis, names in zip(figure.subplots(1, 2), panels, strict=True):
            for name in names:
                axis.plot(steps, [gain[name].value for _, gain in found], "o-", label=name.replace("_", " "))
                low, high = ([getattr(gain[name], end) for _, gain in found] for end in ("low", "high"))
                axis.fill_between(steps, low, high, alpha=0.15)
            axis.set(xlabel="step", ylim=(-0.02, 1.02))
            axis.grid()
            axis.legend(fontsize=8)
    return figure


def _gain(summary: Mapping[str, Any]) -> Gain:
    return gain_of(from_json(summary.get("ablations", {})))
