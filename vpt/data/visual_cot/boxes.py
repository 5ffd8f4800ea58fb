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

from vpt.errors import DataError
from vpt.perception.regions import Box

OVERHANG = 2  # pixels by which a box may leave its image
ROUNDING = 0.0005  # of fractions with three decimals
LONGEST_SIDE = 65_535  # pixels; a JPEG can have no more
Size = tuple[int, int]  # (width, height) in pixels
BoxCandidate = tuple[Box, Size]  # a box and the size of its image, in pixels
_Axis = tuple[tuple[float, float], tuple[float, float]]  # near and far end of a box: in pixels, as fractions


def united_box(boxes: Sequence[Box], size: Size, where: str, notes: Counter[str]) -> BoxCandidate:
    """The union of boxes (at least one) in an image of a known size; all in pixels."""
    x0, y0, x1, y1 = zip(*(_clip(box, size, where, notes) for box in boxes), strict=True)
    return (min(x0), min(y0), max(x1), max(y1)), size


def infer_box(pixels: Box, fractions: Box, where: str, notes: Counter[str]) -> list[BoxCandidate]:
    """A box, written in pixels and in fractions, under every size that its image may have, the best guess first."""
    pixels = int(pixels[0]), int(pixels[1]), int(pixels[2]), int(pixels[3])
    sizes, padded = image_sizes(pixels, fractions)
    if not sizes:
        raise DataError(
            f"{where}: box {list(fractions)} in fractions, {list(pixels)} in pixels: no image size agrees with both or "
            "too many do; mend one of them, or use --on-error skip"
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
    x, y = [((pixels[i], pixels[i + 2]), (fractions[i], fractions[i + 2])) for i in (0, 1)]
    widths, heights = ([side for side in _sides(axis) if 0 in _paddings(axis, side)] for axis in (x, y))
    wide = {(w, w - 2 * pad - odd) for w in widths for pad in _paddings(y, w) for odd in (0, 1)}
    tall = {(h - 2 * pad - odd, h) for h in heights for pad in _paddings(x, h) for odd in (0, 1)}
    sizes = [size for size in wide | tall if min(size) > 0]
    padded = bool(sizes)
    if not padded:  # the two sides are independent: smallest, middle and largest of each will do
        some_widths, some_heights = ({s[0], s[len(s) // 2], s[-1]} if s else set() for s in (widths, heights))
        sizes = [(w, h) for w in some_widths for h in some_heights]
    over = [max(pixels[2] - size[0], pixels[3] - size[1], 0) for size in sizes]
    least = min(over, default=0)
    sizes = [size for size, beyond in zip(sizes, over, strict=True) if beyond == least]
    centre = [sum(extents) / len(sizes) for extents in zip(*sizes, strict=True)]
    return sorted(sizes, key=lambda s: ((s[0] - centre[0]) ** 2 + (s[1] - centre[1]) ** 2, s)), padded


def _sides(axis: _Axis) -> range:
    """Sides in pixels that may carry the far end of a box along an axis without padding."""
    pixel, fraction = axis[0][1], axis[1][1]
    longest = min((pixel + 1) / (fraction - ROUNDING), LONGEST_SIDE)
    return range(max(floor(pixel / (fraction + ROUNDING)), 1), floor(longest) + 1)


def _paddings(axis: _Axis, side: int) -> range:
    """Paddings in pixels that bring both ends of a box from their pixel to their fraction of `side`."""
    slack = ROUNDING * side + 1e-6
    ends = list(zip(*axis, strict=True))
    low = max(fraction * side - slack - (pixel + 1) for pixel, fraction in ends)
    high = min(fraction * side + slack - (pixel - (pixel < 0)) for pixel, fraction in ends)  # int(-0.5) is 0
    return range(max(floor(low) + 1, 0), floor(high) + 1)


def _clip(box: Box, size: Size, where: str, notes: Counter[str]) -> Box:
    """The part of a box inside its image; all in pixels. Raises DataError beyond OVERHANG, or where no area is left."""
    (x0, y0, x1, y1), (width, height) = box, size
    inside = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    over = max(abs(end - kept) for end, kept in zip(box, inside, strict=True))
    named = f"{where}: box {list(box)} in an image of {width}x{height} pixels"
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
