"""Which rows of a global batch go together, so that every process has as much to do as the next.

Under sharding, processes wait for each other at every layer, so it is single micro-batches that must weigh the same,
not whole steps.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpt.data.images import MediaStore
from vpt.data.processor import OnError, Processor, encode_samples
from vpt.data.records import Record
from vpt.data.sources.base import Source
from vpt.perception.batch import VISION_TOWER

_MEASURED = 8  # records of each source that tell how long its texts and images are


@dataclass(frozen=True)
class SampleCost:
    """About how many tokens the language model runs for a record, without opening its images.

    Every process must know the cost of every row of the global batch, also of rows that only another one will load.

    Attributes:
        per_character: text tokens for each character of the messages.
        per_image: source -> tokens of a typical image.
    """

    per_character: float
    per_image: Mapping[str, float]

    @classmethod
    def estimate(
        cls, processor: Processor, sources: Sequence[Source], media: Sequence[MediaStore],
        on_error: OnError = "raise",
    ) -> "SampleCost":  # fmt: skip
        """Learn the averages from a few records of each source."""
        characters = text = 0
        tokens: Counter[str] = Counter()
        images: Counter[str] = Counter()
        for source, store in zip(sources, media, strict=True):
            for index in range(0, len(source), max(len(source) // _MEASURED, 1)):
                [sample], _ = encode_samples([(source, index, store)], processor, on_error)
                if sample is None:
                    continue
                visual = {name: sum(image.tokens for _, image in own) for name, own in sample.images.items()}
                tokens.update(visual)
                images.update({name: len(own) for name, own in sample.images.items()})
                text += len(sample.ids) - sum(visual.values())
                characters += _characters(sample.record)
        typical = {name: tokens[name] / count for name, count in images.items() if count}
        return cls(text / max(characters, 1), typical)

    def __call__(self, record: Record, *, masked: bool) -> float:
        """The cost of one record. `masked`: what follows the masked span runs twice, if the row re-encodes at all."""
        average = sum(self.per_image.values()) / max(len(self.per_image), 1)
        visual = sum(len(images) * self.per_image.get(name, average) for name, images in record.images.items())
        once = self.per_character * _characters(record) + visual
        reencodes = any(images for name, images in record.images.items() if name != VISION_TOWER)
        return 2 * once if masked and reencodes else once


def _characters(record: Record) -> int:
    return sum(len(message.content) for message in record.messages)


def balance(costs: Sequence[float], *, bins: int, capacity: int) -> list[list[int]]:
    """Spread items over bins: the dearest first, each into the cheapest bin that has room.

    Args:
        costs: of each item.
        bins: how many; `bins * capacity` items fit.
        capacity: items that a bin holds at most.

    Returns:
        for each bin the indices of its items in ascending order.
    """
    chosen: list[list[int]] = [[] for _ in range(bins)]
    open_bins = [(0.0, index) for index in range(bins)]
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, index = heapq.heappop(open_bins)
        chosen[index].append(item)
        if len(chosen[index]) < capacity:
            heapq.heappush(open_bins, (load + costs[item], index))
    return [sorted(items) for items in chosen]
