"""Yes or no, as POPE reports it (Li et al., arXiv 2305.10355)."""

import re
from collections.abc import Sequence

import numpy as np

from vpt.evaluation.metrics.base import Metric
from vpt.evaluation.metrics.text import canonical
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.statistics import Ratio

_WORDS = re.compile(r"[a-z]+")


def parse_yes_no(text: str) -> str | None:
    """`yes`, `no`, or None where the first sentence says neither. POPE's own script takes the last for a yes."""
    words = _WORDS.findall(canonical(text).partition(".")[0])
    if "no" in words or "not" in words:
        return "no"
    return "yes" if "yes" in words else None


class YesNo(Metric):
    """Accuracy, precision, recall and F1 of `yes`, and how often it is said, over the questions so answered."""

    def measure(self, items: Sequence[Prediction]) -> dict[str, Ratio]:
        asked = np.array([parse_yes_no(item.target) is not None for item in items], dtype=float)
        wanted = np.array([parse_yes_no(item.target) == "yes" for item in items], dtype=float)
        said = np.array([parse_yes_no(item.answer) == "yes" for item in items], dtype=float) * asked
        right = (
            np.array([parse_yes_no(item.answer) == parse_yes_no(item.target) for item in items], dtype=float) * asked
        )
        both = said * wanted
        targets = "targets that are yes or no"
        return {
            "yes_no_accuracy": Ratio(right, asked, targets),
            "yes_precision": Ratio(both, said, "answers yes to a question of yes or no"),
            "yes_recall": Ratio(both, wanted, "targets that are yes"),
            "yes_f1": Ratio(2 * both, said + wanted, "targets or answers that are yes"),
            "yes_rate": Ratio(said, asked, targets),
        }
