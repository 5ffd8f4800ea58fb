"""Regions of a record in the cells of another grid, so that one file serves models with any `model.region_bins`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vpt.data.crops import check_region, clip_to_image
from vpt.data.images import MediaStore
from vpt.data.records import Message, Record
from vpt.data.references import ImageRef, Size
from vpt.data.turns import Turn, TurnRequest, read_turns, remove_spans, requests_in, write_turns
from vpt.errors import DataError
from vpt.perception.regions import Box, Region

_PART = re.compile(r"<\|(?:[xy]_\d+|region_token_(?:start|end))\|>")


def rebin(
    record: Record, encoder_tokens: Mapping[str, str], media: MediaStore, *, source_bins: int, bins: int,
    crop_margin: int = 0,
) -> Record:  # fmt: skip
    """The record with its regions, wherever they stand, and the crops that show them in a grid of `bins` x `bins`.

    A region is made of the record's box where it has one (files of `vpt convert` do). Without it, cells can only be
    joined: 8 x 8 become 4 x 4 exactly, and never 16 x 16. Words beside a region stay.

    Args:
        record: as it was written.
        encoder_tokens: the re-encoders that it may name, and how they are spelt.
        media: where its images lie; opened for their sizes where the record does not say them.
        source_bins, bins: cells along a side of the grid that it was written for, and of the model's.
        crop_margin: cells of the model's grid by which new crops are widened on each side.

    Raises:
        DataError: for a model without regions, cells outside the grid, or cells that would have to be split.
    """
    said = [message.content for message in record.messages if message.role == "assistant"]
    if not any(_PART.search(text) or Region.find(text, numbers=True) for text in said):
        return record
    turns = read_turns(record, encoder_tokens)
    named = [[each for each in requests_in(turns, number) if each.region] for number in range(len(turns))]
    grids = _Grids(record, media, source_bins, bins, crop_margin, alone=sum(map(len, named)) == 1)
    for number, requests in enumerate(named):
        grids.check(turns[number : number + 2], requests, f"{record.where}: message {number}")
        for request in reversed(requests):  # what is rewritten moves what follows
            grids.rewrite(turns, number, request)
    return write_turns(record, turns)


@dataclass(frozen=True)
class _Grids:
    """The grids that a record was written for and that it is wanted in; `alone`: it names a single region."""

    record: Record
    media: MediaStore
    source_bins: int
    bins: int
    crop_margin: int
    alone: bool

    def check(self, turns: Sequence[Turn], requests: Sequence[TurnRequest], where: str) -> None:
        """Raise DataError where the regions of a turn cannot be named, or shown by the turn after it."""
        if requests and not self.bins:
            raise DataError(
                f"{where} names a region, model.region_bins=0 knows none; type model.region_bins={self.source_bins}, "
                "or data.perception=false"
            )
        for region in (request.region for request in requests if request.region):
            if max(region.x1, region.y1) >= self.source_bins:
                raise DataError(f"{where} names {region}, the grid has {self.source_bins}x{self.source_bins} cells")
        crops = turns[1].crops(beside_text=bool(turns[1].text)) if len(turns) > 1 and requests else []
        if not all(isinstance(turns[1].images[crop][1], ImageRef) for crop in crops):
            raise DataError(f"{where} names a region, and a video follows, not its crop")
        if self.source_bins == self.bins:
            return
        if crops and len(crops) != len(requests):
            raise DataError(f"{where} names {len(requests)} region(s), the next shows {len(crops)}; show each of them")
        rest = remove_spans(turns[0].message.content, [(request.start, request.stop) for request in requests])
        if turns[0].message.role == "assistant" and (part := _PART.search(rest)):
            raise DataError(
                f"{where} holds {part[0]} outside a whole region, which has no place in another grid; mend it, or type "
                f"model.region_bins={self.source_bins}"
            )

    def rewrite(self, turns: list[Turn], number: int, request: TurnRequest) -> None:
        """Name a region of turn `number` in the wanted cells, and show them in the next turn if that shows it."""
        region, record = request.region, self.record
        assert region is not None
        shown = None if request.image is None else turns[number + 1].images[request.image][1].frame
        image = shown or record.image
        box = record.box if self.alone and image and record.image and image.path == record.image.path else None
        if image and (shown or self.source_bins != self.bins):
            size = image.size or self.media.size(image, where=record.where)
            if shown and shown.crop and not shown.size:
                check_region(region, shown.crop, box, size, bins=self.source_bins, where=record.where)
        if self.source_bins != self.bins:
            region = self._moved(region, box, size if image else None)
            if shown and request.image is not None:
                crop = region.to_box(size, bins=self.bins, margin=self.crop_margin)
                turns[number + 1] = turns[number + 1].with_image(request.image, replace(shown, crop=crop))
        content = turns[number].message.content
        content = content[: request.start] + region.to_text() + content[request.stop :]
        turns[number] = replace(turns[number], message=Message("assistant", content))

    def _moved(self, region: Region, box: Box | None, size: Size | None) -> Region:
        """A region in the wanted cells, made of its box where that is known."""
        where = self.record.where
        if box is not None and size is not None:
            return Region.from_box(clip_to_image(box, size, where=f"{where}: box"), size, bins=self.bins)
        if self.source_bins % self.bins:
            written, wanted = f"{self.source_bins}x{self.source_bins}", f"{self.bins}x{self.bins}"
            raise DataError(
                f"{where}: its regions are cells of {written}, the model's of {wanted}, and cells cannot be split; "
                f"convert from boxes (vpt convert), or type model.region_bins={self.source_bins}"
            )
        joined = self.source_bins // self.bins
        return Region(region.x0 // joined, region.y0 // joined, region.x1 // joined, region.y1 // joined)
