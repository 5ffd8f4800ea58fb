"""Regions of a record in the cells of another grid, so that one file serves models with any `model.region_bins`."""

from collections.abc import Mapping
from dataclasses import replace

from vpt.data.images import MediaStore
from vpt.data.records import Message, Record
from vpt.data.references import ImageRef
from vpt.data.turns import Turn, perception_turns, read_turns, write_turns
from vpt.errors import DataError
from vpt.perception.batch import VISION_TOWER
from vpt.perception.regions import Region


def rebin(
    record: Record, encoder_tokens: Mapping[str, str], media: MediaStore, *, source_bins: int, bins: int
) -> Record:
    """The record with its regions, and the crops that they ask for, in a grid of `bins` x `bins` cells.

    A region is read from the record's box where it has one (files of `vpt.data.visual_cot.files` do). Without it, cells
    can only be joined: 8 x 8 become 4 x 4 exactly, and never 16 x 16.

    Args:
        record: as it was written.
        encoder_tokens: the re-encoders that it may name, and how they are spelt.
        media: where its images lie; opened for their sizes.
        source_bins: cells along a side of the grid that it was written for.
        bins: cells along a side of the model's grid.

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
        if max(region.x1, region.y1) >= source_bins:
            raise DataError(
                f"{record.where}: message {number} names {region}, the grid has {source_bins}x{source_bins} cells"
            )
        (source, shown), *_ = turns[number + 1].images
        if not isinstance(shown, ImageRef):
            raise DataError(f"{record.where}: message {number} names a region, and a video follows, not its crop")
        crop = shown.crop
        if source_bins != bins:
            size = media.original(record.images[VISION_TOWER][0].frame, where=record.where).size
            region = _moved(record, region, size, source_bins=source_bins, bins=bins, alone=len(named) == 1)
            crop = region.to_box(size, bins=bins)
        turns[number] = replace(turns[number], message=Message("assistant", region.to_text()))
        turns[number + 1] = replace(turns[number + 1], images=((source, replace(shown, crop=crop)),))
    return write_turns(record, turns)


def _moved(
    record: Record, region: Region, size: tuple[int, int], *, source_bins: int, bins: int, alone: bool
) -> Region:
    """The cells of one region in the model's grid."""
    width, height = size
    if record.box is not None and alone:
        x0, y0, x1, y1 = record.box
        return Region.from_box((x0, y0, min(x1, width), min(y1, height)), size, bins=bins)
    if source_bins % bins:
        raise DataError(
            f"{record.where}: its regions are cells of {source_bins}x{source_bins}, the model's of {bins}x{bins}, and "
            f"cells cannot be split; convert from boxes (vpt convert), or type model.region_bins={source_bins}"
        )
    joined = source_bins // bins
    return Region(region.x0 // joined, region.y0 // joined, region.x1 // joined, region.y1 // joined)
