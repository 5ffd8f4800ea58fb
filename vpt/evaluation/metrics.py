"""Scores of answers."""

import re
import string
from collections import defaultdict
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (as SQuAD's exact match has it)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, target: str) -> bool:
    """Whether two answers are the same once normalised."""
    return normalise(answer) == normalise(target)


def mean_by(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of the values of each key, keys in order."""
    groups: dict[str, list[float]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return {key: sum(values) / len(values) for key, values in sorted(groups.items())}
