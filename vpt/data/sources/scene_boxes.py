"""Boxes (x0, y0, x1, y1) in whole pixels."""

from collections.abc import Sequence

from vpt.data.records import Pixels


def grown(box: Pixels, margin: int) -> Pixels:
    """The box with `margin` pixels more on each side."""
    return box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin


def within(box: Pixels, window: Pixels) -> Pixels:
    """The part of the box that lies in `window`."""
    return max(box[0], window[0]), max(box[1], window[1]), min(box[2], window[2]), min(box[3], window[3])


def overlap(a: Pixels, b: Pixels) -> bool:
    """Whether two boxes share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def enclosing(boxes: Sequence[Pixels]) -> Pixels:
    """The smallest box around all of them."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)
