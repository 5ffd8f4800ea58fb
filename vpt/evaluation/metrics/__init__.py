"""Metrics of answers by name. `data.metrics` chooses them, a source's own `metrics` takes its place.

A metric is a small class; a name out of `METRICS` or the dotted name of another class stands for it.
"""

from collections.abc import Sequence

from vpt.config.targets import METRIC, locate
from vpt.errors import ConfigError, did_you_mean, require
from vpt.evaluation.metrics.anls import ANLS
from vpt.evaluation.metrics.base import Metric
from vpt.evaluation.metrics.captions import CiderD, RougeL
from vpt.evaluation.metrics.exact_match import ExactMatch
from vpt.evaluation.metrics.vqa import VQAAccuracy
from vpt.evaluation.metrics.yes_no import YesNo

METRICS: dict[str, type[Metric]] = {
    "exact_match": ExactMatch,
    "anls": ANLS,
    "vqa_accuracy": VQAAccuracy,
    "yes_no": YesNo,
    "rouge_l": RougeL,
    "cider_d": CiderD,
}


def build_metrics(names: Sequence[str], *, key: str) -> list[Metric]:
    """The metrics that a configuration names, in its order.

    Args:
        names: out of `METRICS`, or dotted names of classes.
        key: of the configuration, for messages.

    Raises:
        ConfigError: for an unknown one, one whose package is not installed, or none at all.
    """
    if not names:
        raise ConfigError(f"{key} names no metric; there is {', '.join(METRICS)}")
    return [_build(name, key) for name in names]


def _build(name: str, key: str) -> Metric:
    if name not in METRICS and "." not in name:
        raise ConfigError(
            f"{key}: {name} is not a metric{did_you_mean(name, list(METRICS))}; there is {', '.join(METRICS)}"
        )
    kind: type[Metric] = METRICS.get(name) or locate(name, key, METRIC)
    for module in kind.needs:
        require(module, "metrics", f"the metric {name}")
    return kind()


__all__ = ["METRICS", "Metric", "build_metrics"]
