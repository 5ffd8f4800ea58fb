"""ANLS, the metric of DocVQA and DUDE."""

from typing import ClassVar

from vpt.errors import require
from vpt.evaluation.metrics.base import MeanScore
from vpt.evaluation.metrics.text import canonical
from vpt.evaluation.predictions import Prediction


class ANLS(MeanScore):
    """Average normalised Levenshtein similarity (Biten et al., arXiv 1905.13648, eq. 1).

    1 - edit distance / length of the longer text, against the nearest accepted answer, and 0 where that is one half or
    less. Case and spelling do not count (`canonical`).
    """

    name, needs = "anls", ("rapidfuzz",)
    threshold: ClassVar[float] = 0.5

    def score(self, item: Prediction) -> float:
        distance = require("rapidfuzz.distance", "metrics", "ANLS").Levenshtein
        said = canonical(item.answer)
        best = max(distance.normalized_similarity(said, canonical(answer)) for answer in item.accepted)
        return best if best > self.threshold else 0.0
