"""Scenes of small handwritten digits on large textured canvases: a task where looking again must matter.

Real digits (scikit-learn's `load_digits`, 8x8 pixels, 1,797 of them) stand on canvases many times their size, some in
coloured frames. The image is limited by `data.image.max_pixels` to a resolution at which a frame can be seen but
no digit can be read; a crop of the original shows it. Nothing is stored: a scene is a function of seed and number.
"""

import math
import zlib
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vpt.data.records import ImageRef, Record
from vpt.data.sources.base import Source, SourceContext, draw_kinds, perceiving_record
from vpt.data.sources.scene_layout import QUESTIONS, SceneBuilder, SceneConfig, SceneQuestion
from vpt.data.sources.scene_rendering import COLOURS, TILE, render_scene, texture_bank
from vpt.errors import DataError, did_you_mean

SPLITS = ("train", "test")
TRAIN_DIGITS = 1437  # the first four fifths of load_digits; tests have the rest, mostly by other writers


class Scenes(Source):
    """One split: `count` scenes with one question each."""

    def __init__(
        self, context: SourceContext, *, split: Literal["train", "test"], count: int, seed: int = 0,
        questions: Mapping[str, float] | None = None, kinds: Mapping[str, str] | None = None,
        canvas: tuple[int, int] = (336, 672), digit: tuple[float, float] = (0.024, 0.028),
        frame: float = 0.09, line: float = 0.15, frames: int = 3, others: int = 2,
        crowd: int = 4, cluster: float = 0.15, dark: float = 0.5, grid: int = 0, texture: float = 20.0,
        brightness: tuple[float, float] = (105, 150), large: float = 0.0, enlarged: float = 2.0,
    ) -> None:  # fmt: skip
        """Args:
        context: settings of the run.
        split: which digits and textures.
        count: scenes.
        seed: of the scenes; not the run's, so that runs of several seeds answer the same test.
        questions: kind of question, a name in `QUESTIONS` -> share.
        kinds: kind of question -> the kind of perception that it gets, instead of one drawn from `data.actions`.
        canvas, digit, frame, line, frames, others, crowd, cluster, dark, grid, large, enlarged: difficulty, see
            `SceneConfig`.
        texture: standard deviation of the canvas in grey levels; more hides digits better.
        brightness: mean grey level of a canvas, from and to; frames of every colour are brighter than a dark one.

        Raises:
            DataError: without scikit-learn, or where an option is out of range.
        """
        self.check(context.root)
        self.context, self.split, self.seed, self.count = context, split, seed, count
        self.texture, self.brightness = texture, (brightness[0], brightness[1])
        self.layout = SceneConfig(
            (canvas[0], canvas[1]), (digit[0], digit[1]), frame, line, frames, others, crowd, cluster, dark, grid,
            large, enlarged,
        )  # fmt: skip
        self.questions = dict(questions or {"read": 1.0})
        check_layout(self.layout)
        check_names("questions", self.questions, QUESTIONS)
        if self.questions.get("count"):
            check_crowd(self.layout)
        check_names("kinds", kinds or {}, QUESTIONS)
        check_names("kinds", (kinds or {}).values(), ["none", "region", *context.encoder_tokens])
        self.kinds = dict(kinds or {})
        self._drawn_kinds = draw_kinds(context.actions, count, seed=context.seed)
        description = f"{split} {seed} {self.layout} {self.questions} {texture} {self.brightness}"
        self.root = Path(f"scenes-{zlib.crc32(description.encode()):08x}")  # names the images; no such folder exists
        self.images, self.values = load_digits(split)
        self._last: tuple[str, Image.Image] | None = None  # a record's crop follows its whole image

    @classmethod
    def check(cls, root: Path | None, **options: Any) -> None:
        if find_spec("sklearn") is None:
            raise DataError("data=scenes needs scikit-learn; type: pip install scikit-learn")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        posed = self.question(index)
        kind = self.kinds.get(posed.kind, self._drawn_kinds[index])
        image = ImageRef(f"{self.split}/{index}")
        return perceiving_record(
            self.context, kind, question=posed.question, answer=posed.answer, image=image, box=posed.box,
            size=(posed.scene.side, posed.scene.side), where=f"scenes {self.split} question {index}",
            question_type=f"{posed.kind} large" if posed.large else posed.kind,
        )  # fmt: skip

    def question(self, index: int) -> SceneQuestion:
        """Scene and question number `index`."""
        generator = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        shares = np.cumsum(list(self.questions.values()))
        kind = list(self.questions)[int(np.searchsorted(shares, generator.random() * shares[-1], side="right"))]
        return SceneBuilder(generator, self.values, self.layout).build(kind)

    def render(self, path: str) -> Image.Image:
        """The canvas that an image path of this source names. Raises DataError for any other path."""
        if self._last is None or self._last[0] != path:
            split, _, number = path.partition("/")
            if split != self.split or not number.isdigit() or int(number) >= self.count:
                raise DataError(f"{path} is not one of the {self.count} scenes of split {self.split}")
            tiles = texture_bank(self.seed, SPLITS.index(self.split), contrast=self.texture, brightness=self.brightness)
            self._last = path, render_scene(self.question(int(number)).scene, self.images, tiles)
        return self._last[1]


@lru_cache
def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 8, 8] from 0 to 255, and what they say, [n]; no image is in both splits."""
    bunch = import_module("sklearn.datasets").load_digits()  # slow to import
    chosen = slice(TRAIN_DIGITS) if split == "train" else slice(TRAIN_DIGITS, None)
    return (bunch.images[chosen] * (255 / 16)).round().astype(np.uint8), bunch.target[chosen]


def check_names(option: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise DataError for a name that an option does not know."""
    for name in names:
        if name not in known:
            raise DataError(
                f"scenes: {option} has {name!r}, it takes {', '.join(known)}{did_you_mean(name, list(known))}"
            )


def check_crowd(layout: SceneConfig) -> None:
    """Raise DataError where digits that are counted stand in cells of which their square may hold none."""
    scale = layout.enlarged if layout.large else 1.0
    if layout.grid and layout.cluster < (least := 1 / round(layout.grid / scale) + layout.digit[1] * scale + 0.01):
        raise DataError(
            f"scenes: cluster={layout.cluster} may hold no cell of grid={layout.grid}, and so nothing to count; "
            f"set it to {math.ceil(least * 100) / 100} or more"
        )


def check_layout(layout: SceneConfig) -> None:
    """Raise DataError where scenes could not be drawn as asked."""
    low, high = layout.canvas
    if not 64 <= low <= high <= TILE:
        raise DataError(f"scenes: canvas={list(layout.canvas)} must be two sides from 64 to {TILE} pixels, small first")
    if not 0 < layout.digit[0] <= layout.digit[1] <= 0.1 or low * layout.digit[0] < 8:
        raise DataError(
            f"scenes: digit={list(layout.digit)} must be two shares of the canvas up to 0.1, small first, that make "
            f"8 pixels or more on the smallest canvas of {low}"
        )
    if not 2 * layout.digit[1] <= layout.frame <= 0.2:
        raise DataError(f"scenes: frame={layout.frame} must lie between two sides of a digit and 0.2 of the canvas")
    if not 0 < layout.line <= 0.5 * (1 - layout.digit[1] / layout.frame):
        raise DataError(f"scenes: line={layout.line} must be above 0 and leave room for a digit in a frame")
    if not 1 <= layout.frames < len(COLOURS):
        raise DataError(f"scenes: frames={layout.frames} must lie between 1 and {len(COLOURS) - 1}")
    if layout.crowd < 1 or not (layout.crowd * 4 * layout.digit[1] ** 2) ** 0.5 <= layout.cluster <= 1:
        raise DataError(f"scenes: cluster={layout.cluster} is no room for crowd={layout.crowd}; it goes up to 1")
    if not 0 <= layout.large <= 1 or not 1 <= layout.enlarged <= 0.5 / layout.frame:
        raise DataError(
            f"scenes: large={layout.large} must be a share, enlarged={layout.enlarged} a factor from 1 to "
            f"{0.5 / layout.frame:.3g}, with which frame={layout.frame} takes up to half of the canvas"
        )
    if not 0 <= layout.dark <= 1:
        raise DataError(f"scenes: dark={layout.dark} must be a share, from 0 to 1")
    if layout.grid and not 2 * layout.digit[1] <= 2 / layout.grid <= 1:
        raise DataError(f"scenes: grid={layout.grid} must be cells in which a digit has room, at least 2, or 0")
