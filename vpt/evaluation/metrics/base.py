"""`Metric`, the contract of metrics."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from vpt.evaluation.predictions import Prediction
from vpt.evaluation.statistics import Ratio


class Metric(ABC):
    """Something measured of answers. `needs` are modules of the extra `metrics`."""

    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def measure(self, items: Sequence[Prediction]) -> dict[str, Ratio]:
        """One ratio for each number it gives, the chief one first; each over all `items`, in their order."""


class MeanScore(Metric):
    """The mean over questions of a score of each. `name` is what it is called in a summary."""

    name: ClassVar[str]

    def measure(self, items: Sequence[Prediction]) -> dict[str, Ratio]:
        return {self.name: Ratio.mean([self.score(item) for item in items])}

    @abstractmethod
    def score(self, item: Prediction) -> float | None:
        """The score of one question; None where the metric does not apply to it."""
