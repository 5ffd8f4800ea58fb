"""Lessons about empty frames, dense answers first: they teach a projector what an encoder tells of outlines.

How many gaps have the frames?              red2 green0           every frame, and how many gaps it has
How many gaps has the green frame?          0
Which frame is closed?                      green
Is there a pink frame?                      no
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from vpt.data.sources.base import SourceContext
from vpt.data.sources.scene_grid import Cell, grid_scene
from vpt.data.sources.scene_lessons import Lesson, SceneLessons
from vpt.data.sources.scene_outlines import MOST_GAPS, Outline
from vpt.data.sources.scene_rendering import render_scene


class OutlineLessons(SceneLessons):
    """One split: `count` scenes as large as those of `Scenes`. The value of a framed cell is how many gaps it has."""

    def __init__(
        self, context: SourceContext, *, split: Literal["train", "test"], count: int, seed: int = 0,
        frames: tuple[int, int] = (1, 6), others: float = 0.1, questions: int = 2,
    ) -> None:  # fmt: skip
        """See `SceneLessons`."""
        super().__init__(
            context, split=split, count=count, seed=seed, frames=frames, others=others, questions=questions
        )
        self.root = Path(f"outline-{self.root}")

    def render(self, path: str) -> Image.Image:
        """The whole canvas: a smaller picture would show an encoder no gaps."""
        return self.scene_of(int(path.partition("/")[2]))

    def scene_of(self, index: int) -> Image.Image:
        generator = self._generator(index)
        cells = self.cells(generator)
        plain = [cell for cell in cells if cell.colour is None]
        outlines = [Outline(cell.row, cell.column, cell.colour, cell.value) for cell in cells if cell.colour]
        return render_scene(grid_scene(generator, self.values, plain, outlines=outlines), self.digits, self.tiles)

    def cells(self, generator: np.random.Generator) -> list[Cell]:
        cells = super().cells(generator)
        gaps = generator.integers(MOST_GAPS + 1, size=len(cells))
        return [replace(cell, value=int(count)) if cell.colour else cell for cell, count in zip(cells, gaps)]

    def told(self, framed: Sequence[Cell]) -> tuple[Lesson, list[Lesson]]:
        short = [(f"How many gaps has the {cell.colour} frame?", str(cell.value)) for cell in framed]
        closed = [str(cell.colour) for cell in framed if cell.value == 0]
        if len(closed) == 1:
            short.append(("Which frame is closed?", closed[0]))
        return ("How many gaps have the frames?", " ".join(f"{cell.colour}{cell.value}" for cell in framed)), short
