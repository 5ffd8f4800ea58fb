"""easy-VQA (PyPI package `easy-vqa`): questions about one shape on a 64x64 canvas, as records of every kind."""

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vpt.data.images import transposed
from vpt.data.records import ImageRef, Pixels, Record
from vpt.data.sources.base import Source, SourceContext, draw_kinds, perceiving_record
from vpt.errors import DataError

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
QUESTION_TYPES = ("colour", "shape", "yes/no")


class EasyVQA(Source):
    """One split of easy-VQA. Every question gets one kind of perception, drawn from `actions` by seed and number."""

    def __init__(
        self, context: SourceContext, *, split: Literal["train", "test"], turns: int = 1,
        types: Sequence[str] = QUESTION_TYPES,
    ) -> None:  # fmt: skip
        """Args:
        context: settings of the run.
        split: train or test.
        turns: 1 to 8; each question comes with its image in that many flips and rotations, which change no answer.
        types: which questions: `colour`, `shape`, `yes/no`.

        Raises:
            DataError: without the package, or with an unknown type.
        """
        self.check(context.root)
        if not 1 <= turns <= 8:
            raise ValueError(f"turns={turns} must be from 1 to 8")
        if unknown := set(types) - set(QUESTION_TYPES):
            raise DataError(f"easy-VQA has no questions of type {', '.join(sorted(unknown))}; types: {QUESTION_TYPES}")
        self.context, self.split = context, split
        self.root = Path(str(files("easy_vqa") / "data" / split / "images"))
        questions = (self.root.parent / "questions.json").read_text(encoding="utf-8")
        rows: list[tuple[str, str, int]] = json.loads(questions)
        self.questions = [row for row in rows if question_type(row[1]) in types]
        self.turns = turns
        self._kinds = draw_kinds(context.actions, len(self), seed=context.seed)

    @classmethod
    def check(cls, root: Path | None, **options: Any) -> None:
        if find_spec("easy_vqa") is None:
            raise DataError("data=easy_vqa needs the package easy-vqa; type: pip install easy-vqa")

    def __len__(self) -> int:
        return len(self.questions) * self.turns

    def __getitem__(self, index: int) -> Record:
        turn, number = divmod(index, len(self.questions))
        question, answer, image = self.questions[number]
        whole = ImageRef(f"{image}.png", transpose=turn)
        box = shape_extent(self.root / whole.path, turn)
        return perceiving_record(
            self.context, self._kinds[index], question=question, answer=answer, image=whole, box=box, size=(64, 64),
            where=f"easy-vqa {self.split} question {index}", question_type=question_type(answer),
        )  # fmt: skip


def question_type(answer: str) -> str:
    """`colour`, `shape` or `yes/no`."""
    return "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes/no"


@lru_cache(maxsize=65536)
def shape_extent(path: Path, turn: int = 0) -> Pixels:
    """The smallest box around all pixels that differ from the background, the commonest colour."""
    pixels = np.asarray(transposed(Image.open(path).convert("RGB"), turn)).astype(np.int32)
    flat = pixels @ np.array([65536, 256, 1])
    values, counts = np.unique(flat, return_counts=True)
    rows, columns = np.nonzero(flat != values[counts.argmax()])
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
