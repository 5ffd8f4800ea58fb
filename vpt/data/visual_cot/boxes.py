"""Boxes of Visual-CoT records, and the sizes of their images.

Metadata records give boxes and the image's size in pixels. Benchmark records name no size, but write each coordinate v
of a box twice: int(v), after `###`, and round((v + padding) / side, 3), for the image in the middle of a square of
side = max(width, height) with padding = (side - extent) // 2 before it. `image_sizes` solves the two for the size.
"""

import json
from collections import Counter
from collections.abc import Sequence
from math import floor
from reprlib import repr as short
from typing import Any

from vpt.data.crops import OVERHANG, clipped
from vpt.data.references import Size
from vpt.errors import DataError
from vpt.perception.regions import Box

ROUNDING = 0.0005  # of fractions with three decimals
LONGEST_SIDE = 65_535  # pixels; a JPEG can have no more
BoxCandidate = tuple[Box, Size]  # a box and the size of its image, in pixels
_Axis = tuple[tuple[float, float], tuple[float, float]]  # near and far end of a box: in pixels, as fractions


def united_box(boxes: Sequence[Box], size: Size, where: str, notes: Counter[str]) -> BoxCandidate:
    """The union of boxes (at least one) in an image of a known size; all in pixels."""
    x0, y0, x1, y1 = zip(*(_clip(box, size, where, notes) for box in boxes), strict=True)
    return (min(x0), min(y0), max(x1), max(y1)), size


def infer_box(
    pixels: Box, fractions: Box, where: str, notes: Counter[str], *, size: Size | None = None
) -> list[BoxCandidate]:
    """A box, written in pixels and in fractions, under every size that its image may have, the best guess first.

    `size` is that of the image, where it is known.
    """
    pixels = int(pixels[0]), int(pixels[1]), int(pixels[2]), int(pixels[3])
    if size is None:
        sizes, padded = image_sizes(pixels, fractions)
    else:
        ways = [padded for padded in (True, False) if _agrees(pixels, fractions, size, padded=padded)]
        sizes, padded = [size] if ways else [], True in ways
    if not sizes:
        why = (
            "no image size agrees with both or too many do; mend one of them"
            if size is None
            else (f"they are not of an image of {size[0]}x{size[1]} pixels; bring the one that they were made for")
        )
        raise DataError(
            f"{where}: box {list(fractions)} in fractions, {list(pixels)} in pixels: {why}, or use --on-error skip"
        )
    smallest = min(size[0] for size in sizes), min(size[1] for size in sizes)
    ends = _clip(pixels, smallest, where, notes)

    def exact(size: Size) -> Box:
        """The fractions in pixels: sharper than whole pixels in small images, and at most a pixel away from them."""
        spans = (max(size), max(size)) if padded else size
        values = [
            min(max(fraction * spans[i % 2] - (spans[i % 2] - size[i % 2]) // 2, end), end + 0.999, smallest[i % 2])
            for i, (fraction, end) in enumerate(zip(fractions, ends, strict=True))
        ]
        return values[0], values[1], values[2], values[3]

    return [(exact(size), size) for size in sizes]


def image_sizes(pixels: Box, fractions: Box) -> tuple[list[Size], bool]:
    """Every image size under which both spellings of a box agree, the most central first; empty if it cannot be told.

    The flag says whether fractions are of the padded square; if no size fits that, they are taken as fractions of the
    image itself. Sides come out exact to a pixel or two, but a box of a few pixels leaves tens of sizes open.
    """
    if min(fractions[2:]) <= 2 * ROUNDING:  # nothing but the corner: sizes would be known to a factor of three
        return [], False
    axes = _axes(pixels, fractions)
    sizes, padded = _padded_sizes(axes), True
    if not sizes:  # the two sides are independent: smallest, middle and largest of each will do
        sides = [[side for side in _sides(axis) if 0 in _paddings(axis, side)] for axis in axes]
        some_widths, some_heights = ({s[0], s[len(s) // 2], s[-1]} if s else set() for s in sides)
        sizes, padded = [(w, h) for w in some_widths for h in some_heights], False
    # A box of whole pixels tells the size sharper. If it fits no image but one that it leaves, as boxes that count from
    # 1 do, then that is the best guess; a fractional box may fit it by chance, so that the others remain.
    whole = _central(pixels, _padded_sizes(axes, fraction=0))
    leaving = whole if whole and 0 < _overhang(pixels, whole[0]) <= OVERHANG else []
    return list(dict.fromkeys([*leaving, *_central(pixels, sizes)])), padded


def _axes(pixels: Box, fractions: Box) -> tuple[_Axis, _Axis]:
    x, y = (((pixels[i], pixels[i + 2]), (fractions[i], fractions[i + 2])) for i in (0, 1))
    return x, y


def _agrees(pixels: Box, fractions: Box, size: Size, *, padded: bool) -> bool:
    """Whether an image of `size` brings one spelling of a box to the other."""
    sides = [max(size) if padded else extent for extent in size]
    return all(
        (side - extent) // 2 in _paddings(axis, side)
        for axis, side, extent in zip(_axes(pixels, fractions), sides, size, strict=True)
    )


def _padded_sizes(axes: tuple[_Axis, _Axis], *, fraction: float = 1) -> list[Size]:
    """Sizes of images whose padded square brings a box's pixels to its fractions of the square."""
    x, y = axes
    widths, heights = ([s for s in _sides(axis) if 0 in _paddings(axis, s, fraction=fraction)] for axis in axes)
    wide = {(w, w - 2 * pad - odd) for w in widths for pad in _paddings(y, w, fraction=fraction) for odd in (0, 1)}
    tall = {(h - 2 * pad - odd, h) for h in heights for pad in _paddings(x, h, fraction=fraction) for odd in (0, 1)}
    return [size for size in wide | tall if min(size) > 0]


def _overhang(pixels: Box, size: Size) -> float:
    return max(pixels[2] - size[0], pixels[3] - size[1], 0)


def _central(pixels: Box, sizes: Sequence[Size]) -> list[Size]:
    """The sizes that a box leaves by the fewest pixels, the most central of them first."""
    least = min((_overhang(pixels, size) for size in sizes), default=0)
    sizes = [size for size in sizes if _overhang(pixels, size) == least]
    centre = [sum(extents) / len(sizes) for extents in zip(*sizes, strict=True)]
    return sorted(sizes, key=lambda s: ((s[0] - centre[0]) ** 2 + (s[1] - centre[1]) ** 2, s))


def _sides(axis: _Axis) -> range:
    """Sides in pixels that may carry the far end of a box along an axis without padding."""
    pixel, fraction = axis[0][1], axis[1][1]
    longest = min((pixel + 1) / (fraction - ROUNDING), LONGEST_SIDE)
    return range(max(floor(pixel / (fraction + ROUNDING)), 1), floor(longest) + 1)


def _paddings(axis: _Axis, side: int, *, fraction: float = 1) -> range:
    """Paddings in pixels that bring both ends of a box from their pixel to their fraction of `side`.

    `fraction`: the part of a pixel that was cut off an end is below it.
    """
    slack = ROUNDING * side + 1e-6
    ends = list(zip(*axis, strict=True))
    low = max(share * side - slack - (pixel + fraction) for pixel, share in ends)
    high = min(share * side + slack - (pixel - fraction * (pixel < 0)) for pixel, share in ends)  # int(-0.5) is 0
    return range(max(floor(low) + 1, 0), floor(high) + 1)


def _clip(box: Box, size: Size, where: str, notes: Counter[str]) -> Box:
    """The part of a box inside its image; all in pixels. Raises DataError beyond OVERHANG, or where no area is left."""
    inside, over = clipped(box, size)
    named = f"{where}: box {list(box)} in an image of {size[0]}x{size[1]} pixels"
    if over > OVERHANG:
        raise DataError(f"{named} leaves it by {over:g}, allowed are {OVERHANG}; mend it, or use --on-error skip")
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise DataError(f"{named} has no area (x0,y0,x1,y1 with x0 < x1 and y0 < y1); mend it, or use --on-error skip")
    notes["clipped"] += over > 0
    return inside


def checked_numbers(box: Any, what: str) -> Box:
    """Four finite numbers, from a list or from its JSON."""
    try:
        values = json.loads(box) if isinstance(box, str) else box
    except ValueError:
        values = None
    numeric = isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in values)
    if not numeric or len(values) != 4:
        raise DataError(f"{what} must be four numbers [x0, y0, x1, y1], not {short(box)}")
    return values[0], values[1], values[2], values[3]
