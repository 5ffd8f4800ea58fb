"""Packing samples into a batch: rows one after the other, equal images once."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vpt.data.image_cache import ImageKey
from vpt.data.processor import Sample
from vpt.data.transforms import ProcessedImage
from vpt.perception.batch import VISION_TOWER, Batch, ImageInputs, Span

_Interned = dict[ImageKey, tuple[int, ProcessedImage]]  # image -> (its number in the batch, as prepared)


def collate(samples: Sequence[Sample], *, masked: Sequence[tuple[Span, ...]] | None = None) -> Batch:
    """Pack rows of any kind.

    Args:
        samples: the rows.
        masked: for each row the spans hidden between the inner passes (`vpt.perception.masking`); none by default.
    """
    shelves: dict[str, _Interned] = {}
    rows, start = [], 0
    for sample, spans in zip(samples, masked or [()] * len(samples), strict=True):
        numbers = {
            source: [_intern(shelves.setdefault(sample.transforms[source], {}), *entry) for entry in entries]
            for source, entries in sample.images.items()
        }
        blocks = tuple(replace(block, image=numbers[block.source][block.image]) for block in sample.row.blocks)
        rows.append(replace(sample.row, start=start, blocks=blocks, masked=spans))
        start += sample.row.length
    return Batch(
        input_ids=torch.cat([sample.ids for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        positions=torch.cat([sample.positions for sample in samples], dim=1),
        rows=rows,
        images={view: stack_images(view, [look for _, look in shelf.values()]) for view, shelf in shelves.items()},
        ids=[sample.record.where for sample in samples],
    )


def _intern(shelf: _Interned, key: ImageKey, look: ProcessedImage) -> int:
    return shelf.setdefault(key, (len(shelf), look))[0]


def stack_images(view: str, looks: Sequence[ProcessedImage]) -> ImageInputs:
    """Prepared images of one view, together."""
    fresh = [look for look in looks if look.features is None]
    pixels = [look.pixels for look in fresh]
    together = torch.cat if view == VISION_TOWER else torch.stack
    return ImageInputs(
        together(pixels) if pixels else torch.empty(0),
        tokens=[look.tokens for look in looks],
        grids=[look.grid for look in fresh if look.grid],
        cached={number: look.features for number, look in enumerate(looks) if look.features is not None},
        cache_keys=[look.cache_key for look in fresh],
    )
