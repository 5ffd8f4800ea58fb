"""Empty frames whose outlines have gaps, which only a second look can count.

A gap is 3 pixels wide where a canvas is shown in 256 pixels along its side, and a third of one pixel in 28, as a first
look shows it. What a gap takes away of the line stands in two thicker ends beside it: a coarse picture, in which a
paler spot would tell, is left with nearly the same everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vpt.data.records import Pixels
from vpt.data.sources.scene_cells import CELLS
from vpt.data.sources.scene_rendering import Frame

MOST_GAPS = 4  # one to a side
_SIDE, _LINE, _GAP = 0.104, 0.010, 0.012  # side of a frame, width of its line and of a gap, as shares of the canvas
_JITTER, _SHIFT, _SLIDE = 0.004, 0.002, 0.015  # of a side's length, of a frame's middle, of a gap's middle, likewise


@dataclass(frozen=True)
class Outline:
    """An empty frame in the cell at `row`, `column`, so many of whose sides have a gap."""

    row: int
    column: int
    colour: str
    gaps: int


def outline_frame(generator: np.random.Generator, outline: Outline, canvas: int) -> Frame:
    """The frame on a canvas of `canvas` pixels; `generator` draws which sides are open, and where."""
    side, line = round(canvas * (_SIDE + generator.uniform(-_JITTER, _JITTER))), round(canvas * _LINE)
    x, y = (
        round(canvas * ((place + 0.5) / CELLS + generator.uniform(-_SHIFT, _SHIFT)) - side / 2)
        for place in (outline.column, outline.row)
    )
    middles = [round(side / 2 + canvas * slide) for slide in generator.uniform(-_SLIDE, _SLIDE, size=4)]
    opened = {int(number) for number in generator.permutation(4)[: outline.gaps]}
    strokes = []
    for number, (across, far) in enumerate(((False, 0), (True, side - line), (False, side - line), (True, 0))):
        middle = middles[number] if number in opened else None
        for start, stop, near, beyond in _side(side, line, round(canvas * _GAP), middle):
            along, depth = (start, stop), (far + near, far + beyond)
            (x0, x1), (y0, y1) = (depth, along) if across else (along, depth)
            strokes.append((x + x0, y + y0, x + x1, y + y1))
    edge = round(line / 2)
    return Frame(outline.colour, (x - edge, y - edge, x + side + edge, y + side + edge), line, tuple(strokes))


def _side(length: int, line: int, gap: int, middle: int | None) -> Iterator[Pixels]:
    """Strokes of one side: from, to along it, from, to across it. With a gap around `middle` where that is given."""
    if middle is None:
        yield 0, length, 0, line
        return
    start, edge = middle - gap // 2, round(line / 2)
    stop, end = start + gap, round(gap * line / (4 * edge))  # of the line that is gone, half goes to either end
    yield from ((0, start, 0, line), (stop, length, 0, line))
    yield from ((start - end, start, -edge, line + edge), (stop, stop + end, -edge, line + edge))
