"""Scenes laid out cell by cell, as full as one likes: pictures to learn to see by.

Sizes are those of conf/data/scenes.yaml: a cell is an eighth of the canvas, a digit stands in the middle of its cell,
a frame fills it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vpt.data.records import Pixels
from vpt.data.sources.scene_boxes import grown
from vpt.data.sources.scene_cells import CELLS
from vpt.data.sources.scene_outlines import MOST_GAPS, Outline, outline_frame
from vpt.data.sources.scene_rendering import COLOURS, TILE, TILES, Background, Frame, Glyph, Scene

CELL_PIXELS = 28  # of a cell, in which a digit can be read
GLANCE, GLANCE_PIXELS = 28, 112  # pixels of a whole canvas at a glance, and what they are enlarged to
CANVAS = (336, 672)  # pixels along its side
DIGIT = (0.05, 0.054)  # side of a digit, as a share of the canvas
FRAME, LINE = 0.12, 0.03  # side of a frame and width of its line, likewise
TEXTURE, BRIGHTNESS = 16.0, (20.0, 45.0)  # of the canvas, in grey levels


@dataclass(frozen=True)
class Cell:
    """A digit in the cell at `row`, `column`; `colour` is its frame's, None where it has none."""

    row: int
    column: int
    value: int
    colour: str | None


def at_a_glance(image: Image.Image) -> Image.Image:
    """A square image as a first look shows it: no more than `GLANCE` pixels along a side, however many it spends."""
    small = image.resize((GLANCE, GLANCE), Image.Resampling.BICUBIC)
    return small.resize((GLANCE_PIXELS, GLANCE_PIXELS), Image.Resampling.BICUBIC)


def crowded_cells(
    generator: np.random.Generator, *, filled: float, framed: float, across: int = CELLS
) -> list[Cell]:  # fmt: skip
    """Of `across` x `across` cells a share is `filled`, and of these a share `framed`, in any colours."""
    cells = []
    for place in range(across * across):
        if generator.random() < filled:
            colour = str(generator.choice([*COLOURS])) if generator.random() < framed else None
            cells.append(Cell(*divmod(place, across), int(generator.integers(10)), colour))
    return cells


def crowded_outlines(
    generator: np.random.Generator, *, filled: float, framed: float
) -> tuple[list[Cell], list[Outline]]:  # fmt: skip
    """Of the cells of a canvas a share is `filled`: a share `framed` of these with empty frames, others with digits."""
    cells = crowded_cells(generator, filled=filled, framed=0.0)
    hold = [generator.random() < framed for _ in cells]
    outlines = [
        Outline(cell.row, cell.column, str(generator.choice([*COLOURS])), int(generator.integers(MOST_GAPS + 1)))
        for cell, empty in zip(cells, hold) if empty
    ]  # fmt: skip
    return [cell for cell, empty in zip(cells, hold) if not empty], outlines


def grid_scene(
    generator: np.random.Generator, values: np.ndarray, cells: Sequence[Cell], *, across: int = CELLS,
    outlines: Sequence[Outline] = (),
) -> Scene:  # fmt: skip
    """A scene of `across` x `across` cells with these digits.

    Args:
        generator: draws the size, the handwriting and the background.
        values: [n] what each handwritten digit says.
        cells: what is to be seen.
        across: fewer than `CELLS` make a smaller canvas, not larger digits.
        outlines: empty frames beside them; of a whole canvas only.
    """
    whole = int(generator.integers(CANVAS[0], CANVAS[1] + 1))
    pitch, size = whole / CELLS, round(whole * generator.uniform(*DIGIT))
    glyphs, frames = [], []
    for cell in cells:
        images = np.nonzero(values == cell.value)[0]
        box = _box(cell, pitch, size)
        glyphs.append(Glyph(int(images[generator.integers(len(images))]), cell.value, box, dark=False))
        if cell.colour is not None:
            outer = grown(box, round((whole * FRAME - size) / 2))
            frames.append(Frame(cell.colour, outer, round(whole * LINE)))
    frames += [outline_frame(generator, outline, whole) for outline in outlines]
    side = round(across * pitch)
    left, top = (int(place) for place in generator.integers(TILE - side + 1, size=2))
    ground = Background(int(generator.integers(TILES)), left, top, int(generator.integers(8)))
    return Scene(side, ground, tuple(glyphs), tuple(frames))


def _box(cell: Cell, pitch: float, size: int) -> Pixels:
    x, y = (round((place + 0.5) * pitch - size / 2) for place in (cell.column, cell.row))
    return x, y, x + size, y + size
