"""Ablation of asking for perception, and the split of what perception gains into harm and help."""

from collections.abc import Mapping, Sequence

import numpy as np

from vpt.evaluation.ablations.base import Ablation
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.statistics import Estimate, Ratio, estimates
from vpt.evaluation.summary import Metrics, estimates_table, image_clusters, score
from vpt.utils.table import Table


class NoPerception(Ablation):
    """Requests for perception are forbidden: the question is answered from the first look."""

    description = "no perception: requests for it are forbidden"
    may_request = False

    def details(
        self, plain: Sequence[Prediction], changed: Sequence[Prediction], metrics: Metrics
    ) -> dict[str, Estimate]:
        acted = np.array([bool(item.actions) for item in plain])
        return perception_gain(score(plain, metrics), score(changed, metrics), acted, image_clusters(plain))


def perception_gain(
    with_it: Ratio, without: Ratio, acted: np.ndarray, clusters: np.ndarray | None = None
) -> dict[str, Estimate]:  # fmt: skip
    """What perception gains, split as MED splits what tools gain (arXiv 2602.01334).

    Over the steps of training, what `without_perception` gains is intrinsic; what `gain` gains is owed to perception.

    Args:
        with_it, without: scores of the same questions, from 0 to 1, with and without perception.
        acted: whether the answer perceived something, [questions].
        clusters: as in `vpt.evaluation.statistics`.

    Returns:
        with_perception, without_perception: the mean scores, and `gain`, their difference, which is
        call_gain - call_harm + schema_gain - schema_harm: where the answer perceived, and where it did not.
        trigger_rate: the share of questions on which it perceived; among those that are wrong without
        perception (`_where_needed`) and right without it (`_where_needless`).
    """
    one = with_it.denominator * without.denominator  # 0 where a question does not count
    right, before, acted = with_it.numerator * one, without.numerator * one, acted * one
    better, worse = np.maximum(right - before, 0.0), np.maximum(before - right, 0.0)
    return estimates({
        "with_perception": Ratio(right, one),
        "without_perception": Ratio(before, one),
        "gain": Ratio(right - before, one),
        "call_gain": Ratio(better * acted, one),
        "call_harm": Ratio(worse * acted, one),
        "schema_gain": Ratio(better * (1 - acted), one),
        "schema_harm": Ratio(worse * (1 - acted), one),
        "trigger_rate": Ratio(acted, one),
        "trigger_rate_where_needed": Ratio(acted * (one - before), one - before),
        "trigger_rate_where_needless": Ratio(acted * before, before),
    }, clusters)  # fmt: skip


def gain_table(gain: Mapping[str, Estimate]) -> Table:
    """The split with its intervals."""
    return estimates_table(["what perception gains"], [([name.replace("_", " ")], vars(e)) for name, e in gain.items()])
