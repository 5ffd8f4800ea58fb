"""What each patch of an image shows: the labels that the small parts learn to see by."""

from collections.abc import Sequence

import numpy as np

from vpt.data.records import Pixels
from vpt.data.sources.easy_vqa import COLOURS as SHAPE_COLOURS
from vpt.data.sources.easy_vqa import SHAPES
from vpt.data.sources.scene_cells import COLUMNS, ROWS
from vpt.data.sources.scene_outlines import MOST_GAPS, Outline
from vpt.data.sources.scene_rendering import COLOURS, Scene

# What is told apart; the class after the last of each is "nothing of the kind", and -1 stands where nobody knows
DIGITS = tuple("0123456789")
ALL_COLOURS = (*COLOURS, *(colour for colour in SHAPE_COLOURS if colour not in COLOURS))
CLASSES: dict[str, tuple[str, ...]] = {"digit": DIGITS, "colour": ALL_COLOURS, "shape": SHAPES}
PLACES: dict[str, tuple[str, ...]] = {"column": COLUMNS, "row": ROWS}
OUTLINES: dict[str, tuple[str, ...]] = {"gaps": DIGITS[: MOST_GAPS + 1]}
UNKNOWN = -1
_SHARE = 0.3  # of an object's width and height that a patch must cover to be said to show it, or half the patch


def nothing(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Labels that say that there is nothing of a kind."""
    return np.full(shape, len(CLASSES[kind]))


def scene_labels(scene: Scene, window: Pixels, side: int) -> dict[str, np.ndarray]:
    """Digit and frame's colour of each of the `side` x `side` patches of a square window of a scene.

    Inside a frame every patch has its colour, so that a patch can tell which frame the digit is in.
    """
    digits, colours = (nothing(kind, (side, side)) for kind in ("digit", "colour"))
    for frame in scene.frames:
        mark(colours, frame.box, window, ALL_COLOURS.index(frame.colour))
    for glyph in scene.glyphs:
        mark(digits, glyph.box, window, glyph.value)
    return {"digit": digits, "colour": colours, "shape": nothing("shape", (side, side))}


def outline_labels(scene: Scene, outlines: Sequence[Outline], side: int) -> dict[str, np.ndarray]:
    """Labels of a whole scene whose frames are `outlines`, in their order: patches of a frame tell its gaps."""
    window, gaps = (0, 0, scene.side, scene.side), np.full((side, side), len(OUTLINES["gaps"]))
    for frame, outline in zip(scene.frames, outlines, strict=True):
        mark(gaps, frame.box, window, outline.gaps)
    return {**scene_labels(scene, window, side), "gaps": gaps}


def mark(labels: np.ndarray, box: Pixels, window: Pixels, label: int) -> None:
    """Write a label into the patches of a square window, [side, side], that show what fills `box`."""
    patch = (window[2] - window[0]) / len(labels)
    rows = _covering((box[1] - window[1]) / patch, (box[3] - window[1]) / patch, len(labels))
    columns = _covering((box[0] - window[0]) / patch, (box[2] - window[0]) / patch, len(labels))
    labels[np.ix_(rows, columns)] = label


def _covering(start: float, stop: float, count: int) -> Sequence[int]:
    """Of `count` patches along a side, those that cover enough of start..stop, which count in patches."""
    enough = min(_SHARE * (stop - start), 0.5)
    return [number for number in range(count) if min(stop, number + 1) - max(start, number) >= enough]
