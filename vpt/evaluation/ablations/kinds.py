"""Scores apart for each kind of perception: what a region is worth, and what DINOv2 is, in one table."""

from collections.abc import Mapping, Sequence

import numpy as np

from vpt.evaluation.predictions import Prediction
from vpt.evaluation.statistics import Estimate, Ratio, estimates
from vpt.evaluation.summary import Metrics, image_clusters, score
from vpt.utils.table import Table


def scores_by_kind(
    plain: Sequence[Prediction], answers: Sequence[Prediction], metrics: Metrics
) -> dict[str, Estimate]:  # fmt: skip
    """Scores of answers by what the plain answers to the same questions perceived, of those that perceived anything."""
    kinds = np.array([" and ".join(dict.fromkeys(item.actions)) for item in plain])
    scores = score(answers, metrics)
    apart = {
        str(kind): Ratio(scores.numerator * (kinds == kind), scores.denominator * (kinds == kind))
        for kind in np.unique(kinds[kinds != ""])
    }
    return estimates(apart, image_clusters(plain))


def kinds_table(plain: Mapping[str, Estimate], changed: Mapping[str, Mapping[str, Estimate]]) -> Table:
    """A row for each change, by what it is; a column for each kind of perception, with scores and their intervals."""
    cells = [
        [about, *(f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" if (e := found.get(kind)) else None for kind in plain)]
        for about, found in (("looking again, as it is", plain), *changed.items())
    ]
    return Table(["what is perceived", *(f"{kind} ({e.questions:,} questions)" for kind, e in plain.items())], cells)
