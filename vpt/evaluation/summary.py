"""Summaries of predictions: scores, intervals, perception."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vpt.config.schema import DataConfig
from vpt.evaluation.metrics import Metric, build_metrics
from vpt.evaluation.metrics.perception import PERCEPTION, action_label, confusion
from vpt.evaluation.predictions import Prediction, answered, by_source, without_repeat
from vpt.evaluation.statistics import Ratio, estimates
from vpt.generation.row_state import IGNORED, REPAIRED
from vpt.perception.batch import VISION_TOWER
from vpt.utils.table import Range, Table

Metrics = dict[str, list[Metric]]  # of each data set, the first of them gives the score


def metrics_of(data: DataConfig) -> Metrics:
    """The metrics of every test set. Raises ConfigError where one cannot be."""
    usual = build_metrics(data.metrics, key="data.metrics")
    return {
        name: usual if node.metrics is None else build_metrics(node.metrics, key=f"data.test.{name}.metrics")
        for name, node in data.test.items()
    }


def compute(items: Sequence[Prediction], metrics: Iterable[Metric]) -> dict[str, Ratio]:
    """Compute every ratio of some metrics over the same questions."""
    return {name: ratio for metric in metrics for name, ratio in metric.measure(items).items()}


def score(items: Sequence[Prediction], metrics: Metrics) -> Ratio:
    """The score of every question, each by the first metric of its own data set."""
    part, whole = np.zeros(len(items)), np.zeros(len(items))
    for source, places in by_source(items):
        ratio = next(iter(metrics[source][0].measure([items[place] for place in places]).values()))
        part[places], whole[places] = ratio.numerator, ratio.denominator
    return Ratio(part, whole)


def summarise(items: Sequence[Prediction], metrics: Metrics) -> dict[str, Any]:
    """Accuracy in all, by question type and by what the model did; every metric of every data set with its interval;
    how it perceived; which were skipped, and why. Of no answers, their number alone.
    """
    skipped = {item.record: item.skipped for item in items if item.skipped}
    items, told = answered(items), {"skipped_questions": len(skipped), "skipped": skipped} if skipped else {}
    count = len(items)
    if not count:
        return {"questions": 0} | told
    statuses = Counter(step.status for item in items for step in item.trace)
    return {
        "questions": len(items),
        "accuracy": sum(item.correct for item in items) / count,
        "accuracy_by_type": mean_by((item.type, item.correct) for item in items),
        "accuracy_by_perception": mean_by((action_label(item.actions), item.correct) for item in items),
        "look_rate_by_type": mean_by((item.type, bool(item.actions)) for item in items),
        "perceptions": dict(Counter(action_label(item.actions) for item in items)),
        "requests_repaired": statuses[REPAIRED],
        "requests_ignored": statuses[IGNORED],
        "truncated": sum(not item.complete for item in items),
        "perceived_tokens_per_question": sum(step.visual_tokens for item in items for step in item.perceived) / count,
        "seconds_per_question": sum(item.seconds for item in items) / count,
        "metrics": {
            source: _chosen([items[place] for place in places], metrics[source]) for source, places in by_source(items)
        },
        "perception": _intervals(compute(items, PERCEPTION), items) | {"confusion": confusion(items)},
    } | told


def headline(summary: Mapping[str, Any]) -> str:
    """What is said of a summary in one line."""
    count = summary["questions"]
    said = f"accuracy {summary['accuracy']:.4f} on {count} questions" if count else "no test question was asked"
    skipped = summary.get("skipped_questions", 0)
    return said + (f"; {skipped} left out, which cannot be used" if skipped else "")


def image_clusters(items: Sequence[Prediction]) -> np.ndarray:
    """[items] equal numbers for questions about the same image of a data set; without one, for the same question."""
    keys = [(item.source, str(item.images.get(VISION_TOWER) or without_repeat(item.record))) for item in items]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=int)


def _chosen(items: Sequence[Prediction], metrics: Iterable[Metric]) -> dict[str, Any]:
    """Every number that was asked for; where no question counts, the reason."""
    ratios = compute(items, metrics)
    missing = {
        name: {"value": None, "low": None, "high": None, "questions": 0, "reason": f"there are no {ratio.counts}"}
        for name, ratio in ratios.items()
    }
    return missing | _intervals(ratios, items)


def _intervals(ratios: Mapping[str, Ratio], items: Sequence[Prediction]) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in estimates(ratios, image_clusters(items)).items()}


def mean_by(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of the values of each key, keys in order."""
    groups: dict[str, list[float]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return {key: sum(values) / len(values) for key, values in sorted(groups.items())}


def metrics_table(summary: Mapping[str, Any]) -> Table:
    """Every metric of every data set, and of perceiving, with its interval."""
    named = [((source, name), e) for source, found in summary.get("metrics", {}).items() for name, e in found.items()]
    named += [(("all", name), e) for name, e in summary.get("perception", {}).items() if name != "confusion"]
    return estimates_table(("data", "metric"), named)


def estimates_table(columns: Sequence[str], named: Iterable[tuple[Sequence[str], Mapping[str, Any]]]) -> Table:
    """A row for each estimate (its fields): its names under `columns`, and its value with its interval, or the reason
    why there is none.
    """
    rows = [(*names, e["value"], e.get("reason") or Range(e["low"], e["high"]), e["questions"]) for names, e in named]
    form = dict.fromkeys(("value", "95% interval"), ".4f")
    return Table([*columns, "value", "95% interval", "questions"], rows, form)
