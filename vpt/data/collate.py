"""Packing samples into a batch: rows one after the other, equal images once."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vpt.data.image_cache import ImageKey
from vpt.data.processor import Sample
from vpt.data.transforms import ProcessedImage
from vpt.perception.batch import Batch, ImageInputs, Span

_Interned = dict[ImageKey, tuple[int, ProcessedImage]]  # image -> (its number in the batch, as prepared)


def collate(
    samples: Sequence[Sample], *, masked: Sequence[tuple[Span, ...]] | None = None,
    prefixes: Sequence[int | None] | None = None,
) -> Batch:  # fmt: skip
    """Pack rows of any kind.

    Args:
        samples: the rows.
        masked: for each row the spans hidden between the inner passes (`vpt.perception.masking`); none by default.
        prefixes: for each row the number of the row that it goes on from (`Row.prefix`); none by default.
    """
    interned: dict[str, _Interned] = {}
    rows, start = [], 0
    none = [None] * len(samples)
    for sample, spans, prefix in zip(samples, masked or none, prefixes or none, strict=True):
        numbers = {
            source: [_intern(interned.setdefault(sample.transforms[source], {}), *entry) for entry in entries]
            for source, entries in sample.images.items()
        }
        blocks = tuple(replace(block, image=numbers[block.source][block.image]) for block in sample.row.blocks)
        rows.append(replace(sample.row, start=start, blocks=blocks, masked=spans or (), prefix=prefix))
        start += sample.row.length
    return Batch(
        input_ids=torch.cat([sample.ids for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        positions=torch.cat([sample.positions for sample in samples], dim=1),
        rows=rows,
        images={
            transform: stack_images(transform, [image for _, image in entries.values()])
            for transform, entries in interned.items()
        },
        ids=[sample.record.where for sample in samples],
    )


def _intern(images: _Interned, key: ImageKey, image: ProcessedImage) -> int:
    return images.setdefault(key, (len(images), image))[0]


def stack_images(transform: str, images: Sequence[ProcessedImage]) -> ImageInputs:
    """The processed images of one transform, together."""
    uncached = [image for image in images if image.features is None]
    pixels = [image.pixels[None] if image.pixels.ndim == 3 else image.pixels for image in uncached]
    return ImageInputs(
        torch.cat(pixels) if pixels else torch.empty(0),
        tokens=[image.tokens for image in images],
        grids=[image.grid for image in uncached if image.grid],
        cached={number: image.features for number, image in enumerate(images) if image.features is not None},
        cache_keys=[image.cache_key for image in uncached],
    )
