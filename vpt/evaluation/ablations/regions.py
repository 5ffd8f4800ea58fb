"""Ablations of where is looked."""

from vpt.data.records import Record
from vpt.errors import DataError
from vpt.evaluation.ablations.base import Ablation
from vpt.evaluation.predictions import Prediction
from vpt.perception.regions import Region
from vpt.perception.requests import REGION


class RegionAblation(Ablation):
    """Shows other cells than the ones that were named; what was said stays."""

    def applies_to(self, plain: Prediction) -> bool:
        return REGION in plain.actions


class RegionRandom(RegionAblation):
    """A region of the same width and height in another place, if there is one."""

    description = "region replaced by a random one of the same area"

    def region(self, region: Region, size: tuple[int, int], *, bins: int, record: Record) -> Region:
        right, down = region.x1 - region.x0, region.y1 - region.y0
        places = [
            place
            for place in (Region(x, y, x + right, y + down) for x in range(bins - right) for y in range(bins - down))
            if place != region
        ]
        return self.rng(record.where, region).choice(places) if places else region


class RegionWhole(RegionAblation):
    """Every selected region is replaced by the whole image."""

    description = "region replaced by the whole image"

    def region(self, region: Region, size: tuple[int, int], *, bins: int, record: Record) -> Region:
        return Region(0, 0, bins - 1, bins - 1)


class RegionOracle(RegionAblation):
    """The cells of the true box, where the record knows it."""

    description = "region replaced by the true box"

    def applies_to(self, plain: Prediction) -> bool:
        return REGION in plain.actions and plain.box is not None

    def region(self, region: Region, size: tuple[int, int], *, bins: int, record: Record) -> Region:
        if record.box is None:
            return region
        try:
            return Region.from_box(record.box, size, bins=bins)
        except ValueError as error:
            raise DataError(f"{record.where}: {error}") from None
