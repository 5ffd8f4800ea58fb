"""Images with known patches: what the small parts are shown while they learn to see."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from vpt.data.sources.easy_vqa import SHAPES, question_type, shape_extent
from vpt.data.sources.scene_cells import CELLS
from vpt.data.sources.scene_grid import (
    BRIGHTNESS,
    CELL_PIXELS,
    TEXTURE,
    Cell,
    at_a_glance,
    crowded_cells,
    crowded_outlines,
    grid_scene,
)
from vpt.data.sources.scene_outlines import Outline
from vpt.data.sources.scene_rendering import Scene, render_scene, texture_bank
from vpt.data.sources.scenes import SPLITS, load_digits
from vpt.pretraining.labels import ALL_COLOURS, CLASSES, UNKNOWN, mark, nothing, outline_labels, scene_labels

Labels = Mapping[str, np.ndarray]  # head -> [side, side]


@dataclass(frozen=True)
class View:
    """An image, and what its patches show where it has `side` x `side` of them; heads that it lacks are not asked."""

    image: Image.Image
    labels: Callable[[int], Labels]


class Views:
    """Views of one split: `draw` makes one of a kind. Digits, textures and shapes of the test split are in no other."""

    def __init__(self, split: str, *, seed: int = 0) -> None:
        self.split = split
        self.digits, self.values = load_digits(split)
        self.tiles = texture_bank(seed, SPLITS.index(split), contrast=TEXTURE, brightness=BRIGHTNESS)

    def draw(self, kind: str, generator: np.random.Generator) -> View:
        """A view of a kind in `KINDS`."""
        return KINDS[kind](self, generator)

    def _scene(
        self, generator: np.random.Generator, cells: Sequence[Cell], *, across: int = CELLS,
        outlines: Sequence[Outline] = (),
    ) -> tuple[Scene, Image.Image]:  # fmt: skip
        scene = grid_scene(generator, self.values, cells, across=across, outlines=outlines)
        return scene, render_scene(scene, self.digits, self.tiles)

    def whole(self, generator: np.random.Generator) -> View:
        """A whole scene at 224 px; three of four are full of digits, so that one image teaches as much as ten."""
        filled = float(generator.choice([0.9, 0.9, 0.9, 0.2]))
        scene, image = self._scene(generator, crowded_cells(generator, filled=filled, framed=0.5))
        return View(_square(image, 224), partial(scene_labels, scene, (0, 0, scene.side, scene.side)))

    def cell(self, generator: np.random.Generator) -> View:
        """One cell of a scene, as the crop of a region shows it: all its patches show its digit and frame."""
        cells = crowded_cells(generator, filled=0.9, framed=0.5, across=1)
        scene, image = self._scene(generator, cells, across=1)
        shown = {head: seen.item() for head, seen in scene_labels(scene, (0, 0, scene.side, scene.side), 1).items()}

        def labels(side: int) -> Labels:
            return {head: np.full((side, side), label) for head, label in shown.items()}

        return View(_square(image, CELL_PIXELS), labels)

    def glance(self, generator: np.random.Generator) -> View:
        """A sparse scene at a glance, where no digit can be read: a patch tells its frame's colour, and its place."""
        framed = float(generator.choice([0.3, 0.6, 1.0]))
        scene, image = self._scene(generator, crowded_cells(generator, filled=0.12, framed=framed))

        def labels(side: int) -> Labels:
            column, row = np.meshgrid(*[np.arange(side) * CELLS // side] * 2)
            colour = scene_labels(scene, (0, 0, scene.side, scene.side), side)["colour"]
            return {"colour": colour, "column": column, "row": row}

        return View(at_a_glance(image), labels)

    def outlines(self, generator: np.random.Generator) -> View:
        """A whole canvas with empty frames and some digits: all patches of a frame tell how many gaps it has."""
        filled = float(generator.choice([0.9, 0.9, 0.9, 0.2]))
        cells, outlines = crowded_outlines(generator, filled=filled, framed=0.7)
        scene, image = self._scene(generator, cells, outlines=outlines)
        return View(image, partial(outline_labels, scene, outlines))

    def shape(self, generator: np.random.Generator) -> View:
        """An image of easy-VQA at 70 px."""
        shown = _shapes(self.split)
        path, (colour, shape) = shown[int(generator.integers(len(shown)))]
        box = shape_extent(path)

        def labels(side: int) -> Labels:
            found = {head: nothing(head, (side, side)) for head in CLASSES}
            mark(found["colour"], box, (0, 0, 64, 64), colour)
            mark(found["shape"], box, (0, 0, 64, 64), shape)
            return found

        return View(_square(Image.open(path).convert("RGB"), 70), labels)


KINDS = {
    "whole": Views.whole, "cell": Views.cell, "glance": Views.glance, "outlines": Views.outlines, "shape": Views.shape,
}  # fmt: skip


def _square(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


@lru_cache
def _shapes(split: str) -> list[tuple[Path, tuple[int, int]]]:
    """Images of easy-VQA, and colour and shape of each by number, UNKNOWN where no question tells."""
    folder = Path(str(files("easy_vqa") / "data" / split))
    told: dict[int, dict[str, int]] = defaultdict(dict)
    for _, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        kind = question_type(answer)
        if kind == "colour":
            told[image]["colour"] = ALL_COLOURS.index(answer)
        elif kind == "shape":
            told[image]["shape"] = SHAPES.index(answer)
    return [
        (folder / "images" / f"{image}.png", (seen.get("colour", UNKNOWN), seen.get("shape", UNKNOWN)))
        for image, seen in sorted(told.items())
    ]
