"""Permutations that can be read anywhere."""

from collections.abc import Sequence

import numpy as np

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
