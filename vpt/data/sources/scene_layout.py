"""Laying out a scene around the question that will be asked about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vpt.data.records import Pixels
from vpt.data.sources.scene_boxes import enclosing, grown, overlap, within
from vpt.data.sources.scene_cells import CELLS, COLUMNS, ROWS
from vpt.data.sources.scene_outlines import MOST_GAPS, Outline, outline_frame
from vpt.data.sources.scene_rendering import COLOURS, TILE, TILES, Background, Frame, Glyph, Scene

PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
BESIDE = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OUTERMOST = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "lowest": (1, 1)}  # axis, sign
MAX_COUNT = 3  # the highest count that is asked for
_TRIES = 50


@dataclass(frozen=True)
class SceneConfig:
    """Settings of scenes: sizes and numbers of what they hold.

    Attributes:
        canvas: smallest and largest side of the canvas, in pixels.
        digit: smallest and largest side of a digit, as a share of the canvas.
        frame: side of a frame, as a share of the canvas.
        line: width of a frame's line, as a share of the frame.
        frames: framed digits in a scene, each of another colour.
        others: digits without a frame that nobody asks about.
        crowd: digits among which some are counted.
        cluster: side of the square in which they stand, as a share of the canvas.
        dark: share of digits that are darker than the canvas; the others are lighter.
        grid: digits stand in the middle of the cells of so many by so many; 0 lets them stand anywhere.
        large: share of scenes in which all but the canvas is `enlarged` times as large: digits, their frames, cells.
    """

    canvas: tuple[int, int]
    digit: tuple[float, float]
    frame: float
    line: float
    frames: int
    others: int
    crowd: int
    cluster: float
    dark: float
    grid: int
    large: float = 0.0
    enlarged: float = 2.0


@dataclass(frozen=True)
class SceneQuestion:
    """A scene, a question about it, its answer, the box (x0, y0, x1, y1) that holds the evidence, and whether it
    is an enlarged one."""

    scene: Scene
    kind: str
    question: str
    answer: str
    box: Pixels
    large: bool = False


class SceneBuilder:
    """Composes one scene; every draw comes from `generator`, so that the same generator makes the same scene."""

    def __init__(self, generator: np.random.Generator, values: np.ndarray, layout: SceneConfig) -> None:
        """Args:
        generator: of this scene.
        values: [n] what each handwritten digit says.
        layout: how hard it is.
        """
        self.generator, self.values, self.layout = generator, values, layout
        self.side = int(generator.integers(layout.canvas[0], layout.canvas[1] + 1))
        self.large = bool(layout.large) and bool(generator.random() < layout.large)
        scale = layout.enlarged if self.large else 1.0
        self.size = round(self.side * generator.uniform(*layout.digit) * scale)
        self.frame = self.side * layout.frame * scale
        self.margin = round((self.frame - self.size) / 2)  # from a digit to its frame's outer edge
        self.grid = round(layout.grid / scale)
        self.colours = [str(colour) for colour in generator.permutation(list(COLOURS))]
        self.taken: list[Pixels] = []
        self.glyphs: list[Glyph] = []
        self.frames: list[Frame] = []

    def build(self, kind: str) -> SceneQuestion:
        """A scene for one kind of question, a name in `QUESTIONS`."""
        question, answer, box = QUESTIONS[kind](self)
        for _ in range(self.layout.others if kind != "count" else 0):
            self._try_glyph(self._window())
        tile, turn = self._below(TILES), self._below(8)
        ground = Background(tile, self._below(TILE - self.side + 1), self._below(TILE - self.side + 1), turn)
        return SceneQuestion(
            Scene(self.side, ground, tuple(self.glyphs), tuple(self.frames)), kind, question, answer, box, self.large
        )

    def read(self) -> tuple[str, str, Pixels]:
        """Which digit is in the red frame?"""
        glyph = self._framed(self.layout.frames)
        return f"Which digit is in the {self.colours[0]} frame?", str(glyph.value), glyph.box

    def compare(self) -> tuple[str, str, Pixels]:
        """Is the digit left of the blue frame larger than 4? The digit stands outside the frame; half are."""
        where = list(BESIDE)[self._below(4)]
        limit, larger = self._below(9), bool(self._below(2))
        value = int(self.generator.integers(limit + 1, 10) if larger else self.generator.integers(limit + 1))
        glyph = self._beside_a_frame(BESIDE[where], value)
        self._framed(self.layout.frames - 1, first=1)
        question = f"Is the digit {where} the {self.colours[0]} frame larger than {limit}?"
        return question, "yes" if larger else "no", glyph.box

    def count(self) -> tuple[str, str, Pixels]:
        """How many sevens? The box holds all digits of the scene."""
        asked, count = self._below(10), self._below(min(MAX_COUNT, self.layout.crowd) + 1)
        others = [int(value) for value in self.generator.choice(np.delete(np.arange(10), asked), self.layout.crowd)]
        extent = round(self.side * self.layout.cluster)
        left, top = self._below(self.side - extent + 1), self._below(self.side - extent + 1)
        for value in [asked] * count + others[count:]:
            self._try_glyph((left, top, left + extent, top + extent), value)
        shown = sum(glyph.value == asked for glyph in self.glyphs)
        return f"How many {PLURALS[asked]}?", str(shown), enclosing([glyph.box for glyph in self.glyphs])

    def exists(self) -> tuple[str, str, Pixels]:
        """Is there a red frame? Half are; low resolution tells."""
        self._framed(self.layout.frames)
        there = bool(self._below(2))
        colour = self.colours[0 if there else self.layout.frames]
        return f"Is there a {colour} frame?", "yes" if there else "no", (0, 0, self.side, self.side)

    def colour(self) -> tuple[str, str, Pixels]:
        """Asks for the colour of the leftmost frame, which low resolution tells."""
        self._framed(min(self.layout.frames, 3))  # of three frames one at least is alone at its edge
        edges = [side for side in OUTERMOST if len(self._outermost(side)) == 1]
        side = edges[self._below(len(edges))]
        return f"What colour is the {side} frame?", self._outermost(side)[0].colour, (0, 0, self.side, self.side)

    def gaps(self) -> tuple[str, str, Pixels]:
        """How many gaps has the red frame? 0 to 4, of empty frames (`scene_outlines`)."""
        outlines = self._outlines([self._below(MOST_GAPS + 1) for _ in range(self.layout.frames)])
        return f"How many gaps has the {outlines[0].colour} frame?", str(outlines[0].gaps), self.frames[0].box

    def closed(self) -> tuple[str, str, Pixels]:
        """Which frame is closed? One is, the others have gaps."""
        outlines = self._outlines([0, *(1 + self._below(MOST_GAPS) for _ in range(self.layout.frames - 1))])
        return "Which frame is closed?", outlines[0].colour, self.frames[0].box

    def place(self) -> tuple[str, str, Pixels]:
        """Where is the red frame? DX, the column and row of its cell, which low resolution tells."""
        glyph = self._framed(self.layout.frames)
        column, row = ((glyph.box[axis] + glyph.box[axis + 2]) * CELLS // (2 * self.side) for axis in (0, 1))
        return f"Where is the {self.colours[0]} frame?", COLUMNS[column] + ROWS[row], glyph.box

    def _outlines(self, gaps: Sequence[int]) -> list[Outline]:
        """Empty frames of the first colours, each with so many gaps."""
        places = [divmod(int(place), CELLS) for place in self.generator.permutation(CELLS**2)[: len(gaps)]]
        outlines = [Outline(*place, colour, count) for place, colour, count in zip(places, self.colours, gaps)]
        self.frames = [outline_frame(self.generator, outline, self.side) for outline in outlines]
        self.taken = [frame.box for frame in self.frames]
        return outlines

    def _outermost(self, side: str) -> list[Frame]:
        """The frames that lie furthest to one side; more than one where they are level."""
        axis, sign = OUTERMOST[side]
        furthest = max(sign * frame.box[axis] for frame in self.frames)
        return [frame for frame in self.frames if sign * frame.box[axis] == furthest]

    def _framed(self, count: int, *, first: int = 0) -> Glyph:
        """Digits in frames of the next colours; returns the first one."""
        for colour in self.colours[first : first + count]:
            glyph = self._try_glyph(self._window(), margin=self.margin)
            if glyph is not None:
                self._frame(colour, glyph.box)
        return self.glyphs[0]

    def _beside_a_frame(self, step: tuple[int, int], value: int) -> Glyph:
        """A frame with a digit in it, and the digit asked for beside it; returns that one."""
        reach = self.margin + round(self.size * 1.5)  # from box to box
        if self.grid:
            reach = round(self.side / self.grid)
        x0, y0, x1, y1 = self._window()
        room = (x0 + reach * (step[0] < 0), y0 + reach * (step[1] < 0),
                x1 - reach * (step[0] > 0), y1 - reach * (step[1] > 0))  # fmt: skip
        framed = self._try_glyph(room, margin=self.margin)
        assert framed is not None  # the first one always fits
        self._frame(self.colours[0], framed.box)
        x, y = framed.box[0] + reach * step[0], framed.box[1] + reach * step[1]
        self.taken.append(grown(framed.box, reach + self.size))  # nothing else is beside this frame
        return self._glyph((x, y, x + self.size, y + self.size), value)

    def _frame(self, colour: str, box: Pixels) -> None:
        self.frames.append(Frame(colour, grown(box, self.margin), round(self.frame * self.layout.line)))

    def _try_glyph(self, window: Pixels, value: int | None = None, *, margin: int = 1) -> Glyph | None:
        """A digit somewhere inside `window`, `margin` pixels around it free; None where no place was found."""
        for _ in range(_TRIES):
            x = self._settled(window[0] + margin, window[2] - margin)
            y = self._settled(window[1] + margin, window[3] - margin)
            box = (x, y, x + self.size, y + self.size)
            if within(box, window) == box and not any(overlap(grown(box, margin), taken) for taken in self.taken):
                return self._glyph(box, self._below(10) if value is None else value, margin=margin)
        return None

    def _settled(self, start: int, stop: int) -> int:
        """Where a digit between two edges begins, along one axis."""
        if not self.grid:
            return start + self._below(stop - start - self.size + 1)
        pitch = self.side / self.grid
        first, last = math.ceil((start + self.size / 2) / pitch - 0.5), int((stop - self.size / 2) / pitch - 0.5)
        cell = first + self._below(max(last - first, 0) + 1)
        return round((cell + 0.5) * pitch - self.size / 2)

    def _glyph(self, box: Pixels, value: int, *, margin: int = 1) -> Glyph:
        images = np.nonzero(self.values == value)[0]
        dark = bool(self.generator.random() < self.layout.dark)
        glyph = Glyph(int(images[self._below(len(images))]), value, box, dark)
        self.glyphs.append(glyph)
        self.taken.append(grown(box, margin))
        return glyph

    def _window(self) -> Pixels:
        return 0, 0, self.side, self.side

    def _below(self, limit: int) -> int:
        return int(self.generator.integers(limit))


# kind of question -> lays it out; `there`, `colour` and `place` are answered at low resolution
QUESTIONS = {
    "read": SceneBuilder.read, "compare": SceneBuilder.compare, "count": SceneBuilder.count,
    "there": SceneBuilder.exists, "colour": SceneBuilder.colour,
    "gaps": SceneBuilder.gaps, "closed": SceneBuilder.closed, "place": SceneBuilder.place,
}  # fmt: skip
