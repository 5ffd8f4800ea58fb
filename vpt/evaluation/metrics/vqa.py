"""VQA accuracy with its normalisation of answers (Antol et al., arXiv 1505.00468; rules: visualqa.org/evaluation)."""

import re
from itertools import combinations

from vpt.evaluation.metrics.base import MeanScore
from vpt.evaluation.metrics.text import canonical
from vpt.evaluation.predictions import Prediction

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll you'd you'd've you'll you're you've
"""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def _misspellings(word: str) -> list[str]:
    """A contraction with some of its apostrophes left out, at least one."""
    places = [place for place, letter in enumerate(word) if letter == "'"]
    chosen = (set(some) for count in range(1, len(places) + 1) for some in combinations(places, count))
    return ["".join(letter for place, letter in enumerate(word) if place not in left_out) for left_out in chosen]


_SPELLING = {wrong: word for word in _CONTRACTED.split() for wrong in _misspellings(word)}


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, numbers as digits, apostrophes where they belong.

    Punctuation between two letters parts them, elsewhere it goes; full stops and commas within numbers stay or go so
    that `1,000` is `1000` and `1.5` stays. What would vanish altogether stays, which VQA's own script has as empty.
    """
    text = canonical(text)
    joins = _COMMA_IN_NUMBER.search(text) is not None
    original = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if joins or beside_space else " ")
    words = (_DIGITS.get(word, word) for word in _FULL_STOP.sub("", text).split())
    spelt = [_SPELLING.get(word, word) for word in words]
    return " ".join([word for word in spelt if word not in _ARTICLES] or spelt) or original


class VQAAccuracy(MeanScore):
    """min(1, people who said so / 3), the mean over leaving each of the people out in turn.

    Of ten answers, as VQA has them, that is its official score. Of fewer, as many as are left (at most three) must
    agree for a 1; where a record accepts a single answer, that one.
    """

    name = "vqa_accuracy"

    def score(self, item: Prediction) -> float:
        said, people = normalise(item.answer), [normalise(answer) for answer in item.accepted]
        if len(people) == 1:
            return float(said == people[0])
        enough = min(3, len(people) - 1)
        same = [person == said for person in people]
        left = [sum(same) - out for out in same]  # who agrees when one person is left out
        return sum(min(1.0, agreeing / enough) for agreeing in left) / len(people)
