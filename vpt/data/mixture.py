"""Which record comes when: a pure function of the seed, so that a run can start anywhere in it.

Samples are numbered 0, 1, 2, ... over the whole run. Every stretch of `STRETCH` samples holds each source in its share;
within a source, every epoch is a fresh permutation, each record once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vpt.data.sources import Source
from vpt.errors import ConfigError

STRETCH = 1000


@dataclass(frozen=True)
class Place:
    """One record at one time: `number` in the run, `source`, `index` in the source, and the source's `epoch`."""

    number: int
    source: int
    index: int
    epoch: int


@dataclass
class Mixture:
    """Sources mixed by weight, forever."""

    sources: Sequence[Source]
    weights: Sequence[float]
    seed: int
    _orders: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    _stretch: tuple[int, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if not self.sources or min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ConfigError("data.train needs a source with a weight above 0")
        shares = np.array(self.weights) / sum(self.weights) * STRETCH
        counts = np.floor(shares).astype(int)
        short = STRETCH - counts.sum()
        counts[np.argsort(counts - shares)[:short]] += 1  # the largest remainders get what flooring left over
        self.counts: list[int] = counts.tolist()

    def place(self, number: int) -> Place:
        """What sample `number` of the run is."""
        stretch, within = divmod(number, STRETCH)
        picks = self._picks(stretch)
        source = int(picks[within])
        ordinal = stretch * self.counts[source] + int((picks[:within] == source).sum())
        epoch, position = divmod(ordinal, len(self.sources[source]))
        return Place(number, source, int(self._order(source, epoch)[position]), epoch)

    def _picks(self, stretch: int) -> np.ndarray:
        if self._stretch is None or self._stretch[0] != stretch:
            picks = np.repeat(np.arange(len(self.counts)), self.counts)
            np.random.default_rng((self.seed, 1, stretch)).shuffle(picks)
            self._stretch = (stretch, picks)
        return self._stretch[1]

    def _order(self, source: int, epoch: int) -> np.ndarray:
        if (source, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != source}
            generator = np.random.default_rng((self.seed, 2, source, epoch))
            self._orders[source, epoch] = generator.permutation(len(self.sources[source]))
        return self._orders[source, epoch]
