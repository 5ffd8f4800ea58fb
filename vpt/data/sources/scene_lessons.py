"""Lessons about scenes: several questions on one image, dense answers first, for a base model that learns to read.

    Which frames are there?                    red7 green2 cyan5     every frame, and the digit in it
    Which digit is in the green frame?         2
    What colour is the frame around the 7?     red
    Is there a pink frame?                     no

and at a glance, where no digit can be read:

    Where are the frames?                      redDX greenAT         column A to H and row S to Z of the 8 x 8 cells
    Where is the green frame?                  AT
    What colour is the leftmost frame?         green
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vpt.data.records import ImageRef, Message, Record
from vpt.data.sources.base import Source, SourceContext, draw_kinds, perceiving_record
from vpt.data.sources.scene_cells import CELLS, COLUMNS, ROWS
from vpt.data.sources.scene_grid import (
    BRIGHTNESS,
    CELL_PIXELS,
    GLANCE_PIXELS,
    TEXTURE,
    Cell,
    at_a_glance,
    grid_scene,
)
from vpt.data.sources.scene_layout import OUTERMOST
from vpt.data.sources.scene_rendering import COLOURS, render_scene, texture_bank
from vpt.data.sources.scenes import SPLITS, Scenes, load_digits
from vpt.errors import DataError

Lesson = tuple[str, str]  # a question and its answer


class SceneLessons(Source):
    """One split: `count` scenes, each with one dense answer and some short ones."""

    def __init__(
        self, context: SourceContext, *, split: Literal["train", "test"], count: int, seed: int = 0,
        across: int = CELLS, glance: bool = False, frames: tuple[int, int] = (1, 6), others: float = 0.1,
        questions: int = 2,
    ) -> None:  # fmt: skip
        """Args:
        context: settings of the run.
        split: which digits and textures.
        count: scenes.
        seed: of the scenes.
        across: cells along a side; few are easier.
        glance: show the whole scene at a glance, and ask where frames are.
        frames: the fewest and the most of a scene, each of another colour.
        others: share of the other cells that hold a digit without a frame.
        questions: short ones, after the dense one.

        Raises:
            DataError: without scikit-learn, or where the frames do not fit.
        """
        self.check(context.root)
        if not 1 <= frames[0] <= frames[1] <= min(len(COLOURS), across * across):
            raise DataError(
                f"scene lessons: frames={list(frames)} must lie between 1 and the colours and cells there are"
            )
        self.split, self.count, self.seed, self.across, self.glance = split, count, seed, across, glance
        self.side = GLANCE_PIXELS if glance else CELL_PIXELS * across  # of a picture, in pixels
        self.frames, self.others, self.questions = frames, others, questions
        self.context, self._kinds = context, draw_kinds(context.actions, count, seed=context.seed)
        self.digits, self.values = load_digits(split)
        self.tiles = texture_bank(seed, SPLITS.index(split), contrast=TEXTURE, brightness=BRIGHTNESS)
        self.root = Path(f"lessons-{seed}-{across}-{glance}-{frames[0]}-{frames[1]}-{others}")  # no such folder exists

    @classmethod
    def check(cls, root: Path | None, **options: Any) -> None:
        Scenes.check(root)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        generator = self._generator(index)
        cells = self.cells(generator)
        dense, *short = self._lessons([cell for cell in cells if cell.colour is not None], generator)
        record = perceiving_record(
            self.context, self._kinds[index], question=dense[0], answer=dense[1],
            image=ImageRef(f"{self.split}/{index}"), box=(0, 0, self.side, self.side), size=(self.side, self.side),
            where=f"scene lessons {self.split} {index}", question_type="glance" if self.glance else "lessons",
        )  # fmt: skip
        turns = [Message(role, text) for lesson in short for role, text in zip(("user", "assistant"), lesson)]
        return replace(record, messages=(*record.messages, *turns))

    def render(self, path: str) -> Image.Image:
        """The picture of lesson SPLIT/NUMBER, as it is shown."""
        scene = self.scene_of(int(path.partition("/")[2]))
        return at_a_glance(scene) if self.glance else scene.resize((self.side, self.side), Image.Resampling.BICUBIC)

    def scene_of(self, index: int) -> Image.Image:
        """The whole canvas of a lesson."""
        generator = self._generator(index)
        scene = grid_scene(generator, self.values, self.cells(generator), across=self.across)
        return render_scene(scene, self.digits, self.tiles)

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, SPLITS.index(self.split), index))

    def cells(self, generator: np.random.Generator) -> list[Cell]:
        """Framed digits in the order of `COLOURS`, then others."""
        count = int(generator.integers(self.frames[0], self.frames[1] + 1))
        chosen = {str(colour) for colour in generator.permutation([*COLOURS])[:count]}
        places = [divmod(int(place), self.across) for place in generator.permutation(self.across**2)]
        framed = list(zip(places, (colour for colour in COLOURS if colour in chosen)))
        plain = [(place, None) for place in places[count:] if generator.random() < self.others]
        return [Cell(*place, int(generator.integers(10)), colour) for place, colour in [*framed, *plain]]

    def _lessons(self, framed: Sequence[Cell], generator: np.random.Generator) -> list[Lesson]:
        dense, short = self.told(framed)
        absent = [colour for colour in COLOURS if colour not in {cell.colour for cell in framed}]
        pool = [*absent, *(str(cell.colour) for cell in framed)] if absent else []
        for colour in generator.permutation(pool)[:1]:
            short.append((f"Is there a {colour} frame?", "no" if colour in absent else "yes"))
        return [dense, *(short[number] for number in generator.permutation(len(short))[: self.questions])]

    def told(self, framed: Sequence[Cell]) -> tuple[Lesson, list[Lesson]]:
        """The dense lesson about frames, and the short ones."""
        return (_places if self.glance else _readings)(framed)


def _readings(framed: Sequence[Cell]) -> tuple[Lesson, list[Lesson]]:
    """What digits say and frames are around them: all at once, and one by one."""
    values = [cell.value for cell in framed]
    read = [(f"Which digit is in the {cell.colour} frame?", str(cell.value)) for cell in framed]
    around = [
        (f"What colour is the frame around the {cell.value}?", str(cell.colour))
        for cell in framed if values.count(cell.value) == 1
    ]  # fmt: skip
    dense = " ".join(f"{cell.colour}{cell.value}" for cell in framed)
    return ("Which frames are there?", dense), [*read, *around]


def _places(framed: Sequence[Cell]) -> tuple[Lesson, list[Lesson]]:
    """Where frames are: all at once, and one by one."""
    places = {str(cell.colour): COLUMNS[cell.column] + ROWS[cell.row] for cell in framed}
    short = [(f"Where is the {colour} frame?", place) for colour, place in places.items()]
    for name, (axis, sign) in OUTERMOST.items():
        along = [sign * (cell.column, cell.row)[axis] for cell in framed]
        if along.count(max(along)) == 1:
            short.append((f"What colour is the {name} frame?", str(framed[along.index(max(along))].colour)))
    return ("Where are the frames?", " ".join(f"{colour}{place}" for colour, place in places.items())), short
