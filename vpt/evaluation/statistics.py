"""Bootstrap confidence intervals, paired differences of two runs, and tests of such differences.

Every score here is a ratio of two sums over questions. A mean is the sum of scores over the number of questions,
precision is what was right over what was said, and so on; so one resampling serves them all.

Questions about one image, and several answers to one question, are not independent of each other: they are a cluster,
which is drawn, and whose sign is flipped, as a whole. `clusters` numbers each question's, [questions]; without it every
question is one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vpt.errors import require

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0  # of all that is drawn here, so that the same answers have the same intervals
POWER = 1.96 + 0.84  # standard errors: two-sided, at 5 %, found in 80 of 100 comparisons
FLIPS = 10_000  # random draws of signs, where all of them would be more
_FEWEST = 6  # questions answered otherwise, all for the better, that an exact test at 5 % takes for a difference


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


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% bootstrap interval (percentiles), and how many questions it rests on."""

    value: float
    low: float
    high: float
    questions: int


def estimates(ratios: Mapping[str, Ratio], clusters: np.ndarray | None = None) -> dict[str, Estimate]:
    """Each ratio that counts a question at all, with its interval. Clusters are drawn anew, all ratios together."""
    counted = {name: ratio for name, ratio in ratios.items() if ratio.questions}
    if not counted:
        return {}
    columns = [column for ratio in counted.values() for column in (ratio.numerator, ratio.denominator)]
    sums = _resampled_sums(_cluster_sums(np.stack(columns, axis=1), clusters))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = sums[:, 0::2] / sums[:, 1::2]
    return {
        name: Estimate(ratio.value, *_percentiles(values[:, number]), ratio.questions)
        for number, (name, ratio) in enumerate(counted.items())
    }


def difference(one: Ratio, two: Ratio, clusters: np.ndarray | None = None) -> Estimate:
    """`two` less `one`, paired: the same questions in the same order, and drawn together."""
    columns = np.stack([one.numerator, one.denominator, two.numerator, two.denominator], axis=1)
    sums = _resampled_sums(_cluster_sums(columns, clusters))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
    return Estimate(two.value - one.value, *_percentiles(values), one.questions)


def paired_p(one: Ratio, two: Ratio, clusters: np.ndarray | None = None) -> float | None:
    """The probability of so large a difference, were the two equally good. None where the two count other questions.

    McNemar's exact test where scores are 0 or 1 and every question is a cluster of its own; else a test that flips the
    signs of the clusters' differences, which for such scores is the same.

    Raises:
        ConfigError: without scipy.
    """
    if not np.array_equal(one.denominator, two.denominator):
        return None
    change = _cluster_sums((two.numerator - one.numerator)[:, None], clusters)[:, 0]
    change = change[change != 0]
    if not len(change):
        return 1.0
    if np.isin(change, (-1.0, 1.0)).all():
        stats = require("scipy.stats", "metrics", "McNemar's test")
        return float(stats.binomtest(int((change > 0).sum()), len(change)).pvalue)
    return _sign_flip_p(change)


def _sign_flip_p(change: np.ndarray) -> float:
    """Share of the assignments of signs whose sum is as far from 0 as the one that was found; of a sample of them where
    there are many, in which that one counts, too.
    """
    found, count = abs(change.sum()) - 1e-9, len(change)
    if 2**count <= FLIPS:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float((abs(signs @ change) >= found).mean())
    generator = np.random.default_rng(SEED)
    sums = [generator.choice((-1.0, 1.0), (FLIPS // 20, count)) @ change for _ in range(20)]
    return float(((abs(np.concatenate(sums)) >= found).sum() + 1) / (FLIPS + 1))


def holm(probabilities: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for as many tests as there are: each may be compared with 5 % as if it were the only one."""
    order = sorted((p, place) for place, p in enumerate(probabilities) if p is not None)
    corrected, largest = list(probabilities), 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(p * (len(order) - rank), 1.0))
        corrected[place] = largest
    return corrected


def smallest_difference(one: Ratio, two: Ratio, clusters: np.ndarray | None = None) -> float:
    """The smallest paired difference of means that so many questions can show, if as many answers change as here: found
    in 80 of 100 comparisons at a level of 5 %. Never less than six questions.
    """
    change = _cluster_sums((two.numerator - one.numerator)[:, None], clusters)[:, 0]
    error = math.sqrt(len(change) * change.var(ddof=1)) if len(change) > 1 else math.inf
    return min(max(POWER * error, _FEWEST) / one.questions, 1.0)


def smallest_difference_unpaired(scores: Sequence[float], clusters: np.ndarray | None = None) -> float:
    """As `smallest_difference`, of two models of about this accuracy whose answers are independent of each other.

    A cluster that is all right and one that is all wrong are added, so that of a few questions that are all right it is
    not 0.
    """
    sums, sizes = _cluster_sums(np.stack([np.array(scores, dtype=float), np.ones(len(scores))], axis=1), clusters).T
    count, size = len(sizes), sizes.mean()
    sums, sizes = np.append(sums, [size, 0.0]), np.append(sizes, [size, size])
    variance = np.square(sums - sums.sum() / sizes.sum() * sizes).mean() / size**2
    return POWER * math.sqrt(2 * variance / count)


def _cluster_sums(columns: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """[questions, k] -> [clusters, k]."""
    if clusters is None:
        return columns
    found, numbers = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(found), columns.shape[1]))
    np.add.at(sums, numbers, columns)
    return sums


def _resampled_sums(columns: np.ndarray) -> np.ndarray:
    """Sums of [n, k] over n clusters drawn with replacement, `RESAMPLES` times."""
    generator, count = np.random.default_rng(SEED), len(columns)
    draws = (np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([draw @ columns for draw in draws])


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)
