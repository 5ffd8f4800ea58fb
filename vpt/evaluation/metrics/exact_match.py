"""Short answers compared with the ones that are right."""

import re
import string
from collections.abc import Iterable
from typing import ClassVar

from vpt.errors import require
from vpt.evaluation.metrics.base import MeanScore
from vpt.evaluation.predictions import Prediction

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (as SQuAD's exact match has it)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Iterable[str]) -> bool:
    """Whether an answer is one of the accepted ones, once all are normalised."""
    return normalise(answer) in map(normalise, accepted)


class ExactMatch(MeanScore):
    """Whether the answer is one that the record accepts, both normalised."""

    name = "exact_match"

    def score(self, item: Prediction) -> float:
        return float(exact_match(item.answer, item.accepted))


class NormalisedEditSimilarity(MeanScore):
    """ANLS (Biten et al., arXiv 1905.13648, eq. 1): 1 - edit distance / length of the longer text, against the nearest
    accepted answer, and 0 where that is one half or less. Case and outer space do not count.
    """

    name, needs = "anls", ("rapidfuzz",)
    threshold: ClassVar[float] = 0.5

    def score(self, item: Prediction) -> float:
        distance = require("rapidfuzz.distance", "metrics", "ANLS").Levenshtein
        said = _plain(item.answer)
        best = max(distance.normalized_similarity(said, _plain(answer)) for answer in item.accepted)
        return best if best > self.threshold else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
