"""Crops and boxes against the image that they are cut out of: one tolerance for the converter and for the reader."""

from math import ceil

from vpt.data.references import Pixels, Size
from vpt.errors import DataError
from vpt.perception.regions import Box, Region

OVERHANG = 2  # pixels by which a box or crop may leave its image; what leaves it is cut off


def clipped(box: Box, size: Size) -> tuple[Box, float]:
    """The part of a box inside an image of `size`, and by how many pixels the box left it."""
    (x0, y0, x1, y1), (width, height) = box, size
    inside = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    return inside, max(abs(end - kept) for end, kept in zip(box, inside, strict=True))


def clip_to_image(box: Box, size: Size, *, where: str) -> Box:
    """The part of a box inside an image of `size`. Raises DataError beyond OVERHANG, or where no area is left."""
    inside, over = clipped(box, size)
    if over > OVERHANG or inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise DataError(
            f"{where} {','.join(map(str, box))} does not lie inside the image of {size[0]}x{size[1]} pixels "
            f"(x0,y0,x1,y1 with x0 < x1 and y0 < y1; up to {OVERHANG} pixels beyond it are cut off)"
        )
    return inside


def check_region(region: Region, crop: Pixels, box: Box | None, size: Size, *, bins: int, where: str) -> None:
    """Raise DataError where region and crop of a record were made for an image of another size.

    Args:
        region: the cells that the record names, of `bins` x `bins`.
        crop: what it shows for them. How it was made is not known, so that it need only meet the cells.
        box: the evidence that the cells were made of, where it is known: they then agree, but for what rounding and
            OVERHANG move.
        size: of the image, width and height.
    """
    if box is None:
        cells = region.to_box(size, bins=bins)
        agree = all(cells[i] < crop[i + 2] and crop[i] < cells[i + 2] for i in (0, 1))
    else:
        inside, over = clipped(box, size)
        agree = over <= OVERHANG and inside[0] < inside[2] and inside[1] < inside[3]
        if agree:
            made, slack = Region.from_box(inside, size, bins=bins), 1 + ceil(OVERHANG * bins / min(size))
            agree = all(abs(one - other) <= slack for one, other in zip(vars(made).values(), vars(region).values()))
    if not agree:
        width, height = round(crop[2] * bins / (region.x1 + 1)), round(crop[3] * bins / (region.y1 + 1))
        raise DataError(
            f"{where}: its image has {size[0]}x{size[1]} pixels, but region {region.to_numbers()} and crop "
            f"{','.join(map(str, crop))} were made for about {width}x{height}; bring the image of that size, or "
            "convert the record again (vpt convert --images)"
        )
