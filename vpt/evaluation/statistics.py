"""Bootstrap confidence intervals over questions, paired differences of two runs, and McNemar's exact test.

Every score here is a ratio of two sums over questions. A mean is the sum of scores over the number of questions,
precision is what was right over what was said, and so on; so one resampling serves them all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vpt.errors import require

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Ratio:
    """The sum of `numerator` over the sum of `denominator`; both [questions]. The latter is 0 where a question does not
    count; `counts` says what does.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    counts: str = "questions"

    @classmethod
    def mean(cls, scores: Sequence[float | None]) -> "Ratio":
        """The mean of the scores that are not None."""
        counts = np.array([score is not None for score in scores], dtype=float)
        return cls(np.array([score or 0.0 for score in scores], dtype=float), counts)

    @property
    def value(self) -> float:
        """The ratio; NaN where no question counts."""
        total = self.denominator.sum()
        return float(self.numerator.sum() / total) if total else math.nan

    @property
    def questions(self) -> int:
        """Number of questions with a denominator other than 0."""
        return int((self.denominator != 0).sum())

    @property
    def scores(self) -> np.ndarray:
        """[questions that count] the score of each, where the ratio is a mean."""
        return self.numerator[self.denominator != 0]

    def select(self, index: Sequence[int]) -> "Ratio":
        """The ratio over the questions at these indices."""
        return Ratio(self.numerator[list(index)], self.denominator[list(index)])


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% bootstrap interval (percentiles), and how many questions it rests on."""

    value: float
    low: float
    high: float
    questions: int


def estimates(ratios: Mapping[str, Ratio], *, seed: int = 0) -> dict[str, Estimate]:
    """Each ratio that counts a question at all, with its interval. Questions are drawn anew, all ratios together."""
    counted = {name: ratio for name, ratio in ratios.items() if ratio.questions}
    if not counted:
        return {}
    columns = [column for ratio in counted.values() for column in (ratio.numerator, ratio.denominator)]
    sums = _resampled_sums(np.stack(columns, axis=1), seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = sums[:, 0::2] / sums[:, 1::2]
    return {
        name: Estimate(ratio.value, *_percentiles(values[:, number]), ratio.questions)
        for number, (name, ratio) in enumerate(counted.items())
    }


def difference(one: Ratio, two: Ratio, *, seed: int = 0) -> Estimate:
    """`two` less `one`, paired: the same questions in the same order, and drawn together."""
    sums = _resampled_sums(
        np.stack([one.numerator, one.denominator, two.numerator, two.denominator], axis=1), seed=seed
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        values = sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
    return Estimate(two.value - one.value, *_percentiles(values), one.questions)


def mcnemar(one: Ratio, two: Ratio) -> float | None:
    """McNemar's exact test of two runs: the probability of so uneven a split among the questions that only one of them
    has right, were they equally good. None where a score is not 0 or 1, or where the two count other questions.

    Raises:
        ConfigError: without scipy.
    """
    counted = np.concatenate([one.numerator, two.numerator, one.denominator])
    if not np.array_equal(one.denominator, two.denominator) or not np.isin(counted, (0.0, 1.0)).all():
        return None
    a, b = one.numerator, two.numerator
    lost, won = int((a > b).sum()), int((b > a).sum())
    if lost + won == 0:
        return 1.0
    stats = require("scipy.stats", "metrics", "McNemar's test")
    return float(stats.binomtest(won, lost + won).pvalue)


def _resampled_sums(columns: np.ndarray, *, seed: int) -> np.ndarray:
    """Sums of [n, k] over n questions drawn with replacement, `RESAMPLES` times."""
    generator, count = np.random.default_rng(seed), len(columns)
    draws = (np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([draw @ columns for draw in draws])


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)
