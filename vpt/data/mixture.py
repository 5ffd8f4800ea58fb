"""Which record comes when: a pure function of the seed, so that a run can start anywhere in it.

Samples are numbered 0, 1, 2, ... over the whole run.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from vpt.data.sources.base import Source
from vpt.errors import ConfigError

CYCLE = 1000
Mixing = Literal["weights", "exhaust"]


@dataclass(frozen=True)
class SampleRef:
    """One record at one time: `number` in the run, `source`, `index` in the source, and the source's `epoch`."""

    number: int
    source: int
    index: int
    epoch: int


class Mixture(ABC):
    """An endless sequence of samples from several sources."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources, self.seed = sources, seed

    @abstractmethod
    def sample_at(self, number: int) -> SampleRef:
        """Sample number `number` of the run."""


def build_mixture(sources: Sequence[Source], weights: Sequence[float], seed: int, by: Mixing = "weights") -> Mixture:
    """Mix sources by their weights, or to exhaustion.

    Raises:
        ConfigError: where no weight is above 0; to exhaustion, where one is neither 0 nor 1.
    """
    if not sources or min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError("data.train needs a source with a weight above 0")
    if by == "weights":
        return WeightedMixture(sources, seed, weights)
    if not {*weights} <= {0, 1}:
        raise ConfigError(
            f"data.mixing=exhaust shows every record once an epoch, the weights of data.train are {list(weights)}; "
            "make them 1, 0 to leave a source out, or type data.mixing=weights"
        )
    return ExhaustiveMixture(sources, seed, [bool(weight) for weight in weights])


class WeightedMixture(Mixture):
    """Every cycle of `CYCLE` samples holds each source in its share, so that short ones come round more often.

    Within a source every epoch is a fresh permutation, each record once.
    """

    def __init__(self, sources: Sequence[Source], seed: int, weights: Sequence[float]) -> None:
        super().__init__(sources, seed)
        shares = np.array(weights) / sum(weights) * CYCLE
        counts = np.floor(shares).astype(int)
        short = CYCLE - counts.sum()
        counts[np.argsort(counts - shares)[:short]] += 1  # the largest remainders get what flooring left over
        if lost := [number for number, share in enumerate(shares) if share and not counts[number]]:
            raise ConfigError(
                f"weight {weights[lost[0]]} of data.train is less than a {CYCLE}th of all weights, {list(weights)}: "
                f"its source would give no sample; make it {sum(weights) / CYCLE:.3g} or more, or type "
                "data.mixing=exhaust with weights of 1"
            )
        self.counts: list[int] = counts.tolist()
        self._orders: dict[int, tuple[int, Sequence[int]]] = {}
        self._cycle: tuple[int, np.ndarray] | None = None

    def sample_at(self, number: int) -> SampleRef:
        cycle, within = divmod(number, CYCLE)
        picks = self._picks(cycle)
        source = int(picks[within])
        ordinal = cycle * self.counts[source] + int((picks[:within] == source).sum())
        epoch, position = divmod(ordinal, len(self.sources[source]))
        return SampleRef(number, source, int(self._order(source, epoch)[position]), epoch)

    def _picks(self, cycle: int) -> np.ndarray:
        if self._cycle is None or self._cycle[0] != cycle:
            picks = np.repeat(np.arange(len(self.counts)), self.counts)
            np.random.default_rng((self.seed, 1, cycle)).shuffle(picks)
            self._cycle = (cycle, picks)
        return self._cycle[1]

    def _order(self, source: int, epoch: int) -> Sequence[int]:
        kept = self._orders.get(source)
        if kept is None or kept[0] != epoch:
            kept = (epoch, permutation(len(self.sources[source]), (self.seed, 2, source, epoch)))
            self._orders[source] = kept
        return kept[1]


class ExhaustiveMixture(Mixture):
    """Every epoch is a fresh permutation of all records of all sources, each of them once."""

    def __init__(self, sources: Sequence[Source], seed: int, chosen: Sequence[bool]) -> None:
        super().__init__(sources, seed)
        self._ends = list(accumulate(len(s) * taken for s, taken in zip(sources, chosen, strict=True)))
        self._order: tuple[int, Sequence[int]] | None = None

    def sample_at(self, number: int) -> SampleRef:
        epoch, position = divmod(number, self._ends[-1])
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self._ends[-1], (self.seed, 6, epoch)))
        at = int(self._order[1][position])
        source = bisect_right(self._ends, at)
        return SampleRef(number, source, at - (self._ends[source - 1] if source else 0), epoch)


WHOLE = 1 << 22  # records up to which a permutation is held as a table, 32 MiB at the most
_ROUNDS = 6  # of the network; four make one that cannot be told from random (Luby and Rackoff, 1988)


def permutation(length: int, key: tuple[int, ...]) -> Sequence[int]:
    """0, 1, ... `length` - 1 in an order that belongs to `key`; it takes no more than 32 MiB, however long it is."""
    if length <= WHOLE:
        order: Sequence[int] = np.random.default_rng(key).permutation(length)  # type: ignore[assignment]
        return order
    return FeistelPermutation(length, key)


class FeistelPermutation(Sequence[int]):
    """A permutation that is computed one place at a time, by a Feistel network.

    The network permutes the numbers of 2k bits, four times `length` of them at the most; where it leads to `length` or
    above, it is applied again until it does not (a cycle returns to where it began, so this ends and stays one-to-one).
    """

    def __init__(self, length: int, key: tuple[int, ...]) -> None:
        self.length = length
        self.half = (max(length - 1, 1).bit_length() + 1) // 2
        self.keys = [int(word) for word in np.random.default_rng(key).integers(0, 1 << 63, _ROUNDS)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> int:  # type: ignore[override]
        value = self._once(place)
        while value >= self.length:
            value = self._once(value)
        return value

    def _once(self, value: int) -> int:
        mask = (1 << self.half) - 1
        left, right = value >> self.half, value & mask
        for key in self.keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << self.half | right


def _mixed(value: int) -> int:
    """64 bits, stirred: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value &= (1 << 64) - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return value ^ value >> 31
