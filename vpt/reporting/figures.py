"""Pictures of a run: its curves, and a sheet of test questions with what the model did."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vpt.config.schema import TrainConfig
from vpt.data.build import build_sources
from vpt.errors import DataError
from vpt.evaluation.predictions import Prediction
from vpt.generation.answer_images import CaptionedImage, answer_images, draw_grid, step_note
from vpt.generation.row_state import IGNORED
from vpt.reporting.curves import draw_curves
from vpt.reporting.runs import read_answers

RIGHT, WRONG = "#1b7f3b", "#c0392b"


def question_images(config: TrainConfig) -> Callable[[Prediction], Image.Image | str]:
    """A function that opens the image of a test question at full resolution, or says why there is none.

    Raises UserError where the test sets themselves cannot be opened.
    """
    _, folders = build_sources(config.data.test, config, split="test")
    by_source = dict(zip(config.data.test, folders, strict=True))

    def opened(item: Prediction) -> Image.Image | str:
        reference = item.image
        if reference is None:
            return "a question without an image"
        if item.source not in by_source:
            return f"no picture: {item.record}: its data set {item.source} is none of data.test"
        try:
            return by_source[item.source].full_resolution(reference, where=item.record)
        except DataError as error:
            return f"no picture: {error}"

    return opened


def draw_run(folder: Path, *, config: TrainConfig) -> list[Path]:
    """The pictures of a finished run: `curves.png`, and `samples.png` where questions were asked."""
    sheet = draw_sheet(folder / "predictions", config, to=folder / "samples.png")
    return [draw_curves(folder), *([sheet] if sheet else [])]


def draw_sheet(
    folder: Path, config: TrainConfig, *, to: Path | None = None, columns: int = 6, rows: int = 4
) -> Path | None:  # fmt: skip
    """Questions, what was perceived, answers: spread evenly over right and wrong ones of a folder's answers; None
    where there are none.
    """
    items = read_answers(folder)
    if not items:
        return None
    opened, right = question_images(config), sum(item.correct for item in items)
    shown = [_shown(item, opened(item)) for item in _choose(items, columns * rows)]
    title = f"{right:,} of {len(items):,} test questions right ({right / len(items):.1%})"
    return draw_grid(to or folder / "samples.png", shown, columns=columns, width=2.7, title=title)


def _choose(items: Sequence[Prediction], count: int) -> list[Prediction]:
    """A third wrong ones where there are that many, the rest right ones, evenly spaced over the split."""
    wrong, right = ([item for item in items if item.correct == correct] for correct in (False, True))
    few = min(len(wrong), max(count // 3, count - len(right)))
    return [*_spaced(right, count - few), *_spaced(wrong, few)]


def _spaced(items: Sequence[Prediction], count: int) -> list[Prediction]:
    if not items or count <= 0:
        return []
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))]


def _shown(item: Prediction, image: Image.Image | str) -> CaptionedImage:
    """The question, its image with the regions, what was perceived, and the answer in its colour."""
    notes = [step_note(s) if s.status == IGNORED else f"{s.kind}: {step_note(s)}" for s in item.trace]
    caption = f"{_short(item.question, 90)}\n{_short('; '.join(notes) or 'answered at once', 60)}"
    answer = item.answer or "(nothing)"
    verdict = answer if item.correct else f"{answer} (is: {item.target})"
    blank = Image.new("RGB", (8, 8), "white")
    drawn = blank if isinstance(image, str) else answer_images(image, item.trace, [], evidence=item.box)[0].image
    return CaptionedImage(caption, drawn, _short(verdict, 60), RIGHT if item.correct else WRONG)


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[:letters]} ..."
