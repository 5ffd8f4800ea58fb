"""Exact match of short answers, normalised as SQuAD does."""

import re
import string
from collections.abc import Iterable

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
