"""Exact match of short answers, normalised as SQuAD does where that leaves the meaning alone."""

from collections.abc import Iterable

import regex

from vpt.evaluation.metrics.base import MeanScore
from vpt.evaluation.metrics.text import canonical
from vpt.evaluation.predictions import Prediction

# An article is followed by a word; the `a` of `A, B`, `A B` and `vitamin A` is none.
_ARTICLES = regex.compile(r"""(?<![\w'-])(?:the|an|a(?!\s\p{L}(?![\w'-])))\s(?=["'(\[$#<-]*\w)""")
_THOUSANDS = regex.compile(r"(?<![\d.,])\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,])")
_BARE_POINT = regex.compile(r"(?<![\w.])\.(?=\d)")
_PUNCTUATION = regex.compile(
    r"""(?: (?<=\d)[^\w\s](?=\d)              # 3.5, 10:30, 5-10, 1/2
        | (?<!\w)-(?=\p{Sc}?\d)               # a sign
        | [<>](?=[=\s]*-?\p{Sc}?\d)           # below and above a number
        | (?<=\w)[-+\#]+(?!\w)                # O-, C++, C#
        )(*SKIP)(*FAIL)
    | [\p{P}\p{Sc}+<=>^`|~]""",
    regex.VERBOSE,
)
_UNITS = regex.compile(r"[\p{Sc}%]")


def normalise(text: str) -> str:
    """Lower case, single spaces, without articles and punctuation; numbers keep sign, decimal point and what else makes
    them another number. What would vanish altogether stays.
    """
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), canonical(text))
    text = _BARE_POINT.sub("0.", _ARTICLES.sub("", text))
    return " ".join(_PUNCTUATION.sub("", text).split()) or text


def exact_match(answer: str, accepted: Iterable[str]) -> bool:
    """Whether an answer is one of the accepted ones, once all are normalised; `$5` is 5, as for SQuAD, but not `€5`."""
    said, units = normalise(answer), _UNITS.findall(canonical(answer))
    others = [(normalise(text), _UNITS.findall(canonical(text))) for text in accepted]
    return any(said == text and (units == theirs or not units or not theirs) for text, theirs in others)


class ExactMatch(MeanScore):
    """Whether the answer is one that the record accepts, both normalised."""

    name = "exact_match"

    def score(self, item: Prediction) -> float:
        return float(exact_match(item.answer, item.accepted))
