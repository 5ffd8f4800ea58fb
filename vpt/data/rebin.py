"""Regions of a record in the cells of another grid, so that one file serves models with any `model.region_bins`."""

from collections.abc import Mapping
from dataclasses import replace

from vpt.data.crops import check_region, clip_to_image
from vpt.data.images import MediaStore
from vpt.data.records import Message, Record
from vpt.data.references import ImageRef, Reference, Size
from vpt.data.turns import Turn, perception_turns, read_turns, write_turns
from vpt.errors import DataError
from vpt.perception.regions import Box, Region


def rebin(
    record: Record, encoder_tokens: Mapping[str, str], media: MediaStore, *, source_bins: int, bins: int,
    crop_margin: int = 0,
) -> Record:  # fmt: skip
    """The record with its regions, and the crops that they ask for, in a grid of `bins` x `bins` cells.

    A region is made of the record's box where it has one (files of `vpt convert` do). Without it, cells can only be
    joined: 8 x 8 become 4 x 4 exactly, and never 16 x 16.

    Args:
        record: as it was written.
        encoder_tokens: the re-encoders that it may name, and how they are spelt.
        media: where its images lie; opened for their sizes where the record does not say them.
        source_bins, bins: cells along a side of the grid that it was written for, and of the model's.
        crop_margin: cells of the model's grid by which new crops are widened on each side.

    Raises:
        DataError: for a model without regions, or for cells that would have to be split.
    """
    if all(not Turn(message).region() for message in record.messages):
        return record
    turns = read_turns(record, encoder_tokens)
    named = {number: region for number in perception_turns(turns) if (region := turns[number].region()) is not None}
    if not named:
        return record
    if not bins:
        raise DataError(
            f"{record.where}: it names a region, model.region_bins=0 knows none; type "
            f"model.region_bins={source_bins}, or data.perception=false"
        )
    for number, region in named.items():
        (source, shown), *_ = turns[number + 1].images
        shown = _checked(shown, region, source_bins, f"{record.where}: message {number}")
        box = record.box if len(named) == 1 else None
        size = shown.size or media.size(shown, where=record.where)
        if shown.crop is not None and shown.size is None:
            check_region(region, shown.crop, box, size, bins=source_bins, where=record.where)
        if source_bins != bins:
            region = _moved(record.where, region, box, size, source_bins=source_bins, bins=bins)
            shown = replace(shown, crop=region.to_box(size, bins=bins, margin=crop_margin))
        turns[number] = replace(turns[number], message=Message("assistant", region.to_text()))
        turns[number + 1] = replace(turns[number + 1], images=((source, shown),))
    return write_turns(record, turns)


def _checked(shown: Reference, region: Region, bins: int, where: str) -> ImageRef:
    """The crop that a region is shown as."""
    if max(region.x1, region.y1) >= bins:
        raise DataError(f"{where} names {region}, the grid has {bins}x{bins} cells")
    if not isinstance(shown, ImageRef):
        raise DataError(f"{where} names a region, and a video follows, not its crop")
    return shown


def _moved(where: str, region: Region, box: Box | None, size: Size, *, source_bins: int, bins: int) -> Region:
    """The cells of one region in the model's grid, made of its box where that is known."""
    if box is not None:
        return Region.from_box(clip_to_image(box, size, where=f"{where}: box"), size, bins=bins)
    if source_bins % bins:
        raise DataError(
            f"{where}: its regions are cells of {source_bins}x{source_bins}, the model's of {bins}x{bins}, and "
            f"cells cannot be split; convert from boxes (vpt convert), or type model.region_bins={source_bins}"
        )
    joined = source_bins // bins
    return Region(region.x0 // joined, region.y0 // joined, region.x1 // joined, region.y1 // joined)
