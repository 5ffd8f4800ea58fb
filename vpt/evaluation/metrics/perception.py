"""Metrics of perception itself: region quality, action choice, extra visual tokens, latency."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vpt.evaluation.metrics.base import MeanScore, Metric
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.statistics import Ratio
from vpt.perception.regions import Box


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    shared = _shared(a, b)
    return shared / (_area(a) + _area(b) - shared)


def iogt(seen: Box, true: Box) -> float:
    """Intersection over the true box: the share of it that is seen."""
    return _shared(seen, true) / _area(true)


def _shared(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


class RegionQuality(Metric):
    """IoU and IoGT (the share of the true box that is seen; paper, table S2) of the first region that an answer looked
    at, margin included, where the record knows its box.
    """

    def measure(self, items: Sequence[Prediction]) -> dict[str, Ratio]:
        pairs = [(item.region, item.box) for item in items]
        return {
            "region_iou": Ratio.mean([iou(seen, true) if seen and true else None for seen, true in pairs]),
            "region_iogt": Ratio.mean([iogt(seen, true) if seen and true else None for seen, true in pairs]),
        }


class ActionChoice(Metric):
    """Free Choice: whether the model acts where the record does (precision and recall of acting at all), and whether it
    then does the same (`action_accuracy`: of all questions).
    """

    def measure(self, items: Sequence[Prediction]) -> dict[str, Ratio]:
        asked = np.array([bool(item.expected_actions) for item in items], dtype=float)
        acted = np.array([bool(item.actions) for item in items], dtype=float)
        same = np.array([item.expected_actions == item.actions for item in items], dtype=float)
        return {
            "action_precision": Ratio(asked * acted, acted),
            "action_recall": Ratio(asked * acted, asked),
            "action_accuracy": Ratio(same, np.ones(len(items))),
        }


class ExtraVisualTokens(MeanScore):
    """Visual tokens besides those of the question's own image."""

    name = "extra_visual_tokens"

    def score(self, item: Prediction) -> float:
        return sum(step.visual_tokens for step in item.perceived)


class Latency(MeanScore):
    """Seconds of a question: its share of its batch's time.

    Questions of one batch have the same, so the interval tells how batches differ, and nothing where there was one.
    """

    name = "latency_seconds"

    def score(self, item: Prediction) -> float:
        return item.seconds


PERCEPTION: tuple[Metric, ...] = (RegionQuality(), ActionChoice(), ExtraVisualTokens(), Latency())


def action_label(kinds: Sequence[str]) -> str:
    """Kinds of perception in a row as one name."""
    return " + ".join(kinds) or "none"


def confusion(items: Sequence[Prediction]) -> dict[str, dict[str, int]]:
    """Confusion matrix of actions: expected actions -> chosen actions -> number of questions."""
    counts = Counter((action_label(item.expected_actions), action_label(item.actions)) for item in items)
    table: dict[str, dict[str, int]] = {}
    for (asked, chosen), count in sorted(counts.items()):
        table.setdefault(asked, {})[chosen] = count
    return table
