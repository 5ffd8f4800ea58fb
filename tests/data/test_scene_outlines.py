"""Outlines: their gaps are in the picture, unseen at first look; lessons about them agree with the picture."""

import re

import numpy as np
import pytest
from PIL import Image
from sklearn.neural_network import MLPClassifier

from vpt.data.sources.base import SourceContext
from vpt.data.sources.outline_lessons import OutlineLessons
from vpt.data.sources.scene_cells import CELLS
from vpt.data.sources.scene_grid import BRIGHTNESS, TEXTURE, at_a_glance, crowded_outlines, grid_scene
from vpt.data.sources.scene_outlines import MOST_GAPS, Outline, outline_frame
from vpt.data.sources.scene_rendering import COLOURS, render_scene, texture_bank
from vpt.data.sources.scenes import load_digits


def outlines(seed: int, *, filled: float = 0.9) -> tuple[list[Outline], list, Image.Image]:
    """Outlines, their frames and the picture of a scene of the training split."""
    generator = np.random.default_rng(seed)
    digits, values = load_digits("train")
    cells, shown = crowded_outlines(generator, filled=filled, framed=0.7)
    scene = grid_scene(generator, values, cells, outlines=shown)
    return (
        shown,
        [*scene.frames],
        render_scene(scene, digits, texture_bank(0, 0, contrast=TEXTURE, brightness=BRIGHTNESS)),
    )


def gaps_seen(pixels: np.ndarray, frame) -> int:
    """How often the line of a frame's colour is interrupted, side by side, in [height, width, 3] pixels."""
    near = np.abs(pixels - COLOURS[frame.colour]).max(axis=2) < 40
    middle = round(frame.width / 2) + frame.width // 2
    x0, y0, x1, y1 = (*(edge + middle for edge in frame.box[:2]), *(edge - middle - 1 for edge in frame.box[2:]))
    sides = (near[y0, x0:x1], near[y1, x0:x1], near[y0:y1, x0], near[y0:y1, x1])
    return sum(int((np.diff(side.astype(int)) == -1).sum()) for side in sides)


@pytest.mark.parametrize("seed", range(4))
def test_a_frame_has_as_many_gaps_as_it_says(seed):
    shown, frames, picture = outlines(seed)
    pixels = np.asarray(picture, dtype=float)
    assert [gaps_seen(pixels, frame) for frame in frames] == [outline.gaps for outline in shown]
    assert len({outline.gaps for outline in shown}) == MOST_GAPS + 1
    for frame, outline in zip(frames, shown):
        cell = picture.width / CELLS
        assert outline.column * cell <= frame.box[0] + 1 and frame.box[2] <= (outline.column + 1) * cell + 1
        assert outline.row * cell <= frame.box[1] + 1 and frame.box[3] <= (outline.row + 1) * cell + 1


def test_gaps_leave_as_much_ink():
    """What a coarse picture would tell them by."""
    covered = {}
    for gaps in range(MOST_GAPS + 1):
        inks = []
        for seed in range(200):
            generator = np.random.default_rng(seed)
            canvas = int(generator.integers(336, 673))
            frame = outline_frame(generator, Outline(3, 3, "red", gaps), canvas)
            filled = np.zeros((canvas, canvas), dtype=bool)
            for x0, y0, x1, y1 in frame.strokes:
                filled[y0:y1, x0:x1] = True
            inks.append(filled.sum() / canvas**2)
        covered[gaps] = np.mean(inks)
    assert max(covered.values()) / min(covered.values()) < 1.03  # four gaps uncompensated: 0.87


@pytest.mark.slow
def test_the_first_look_shows_no_gaps_and_256_pixels_do():
    """A perceptron that is told where a frame stands, and in which colour, counts its gaps, by chance 0.2."""
    shown = {split: [outlines(seed, filled=0.4) for seed in seeds]
             for split, seeds in (("train", range(500)), ("test", range(500, 620)))}  # fmt: skip
    right = {}
    for side in (28, 256):
        looks = {split: [crop for scene in scenes for crop in crops(*scene, side)] for split, scenes in shown.items()}
        told = {split: [outline.gaps for found, _, _ in scenes for outline in found] for split, scenes in shown.items()}
        learner = MLPClassifier((128, 64), max_iter=25, early_stopping=True, random_state=0)
        right[side] = learner.fit(looks["train"], told["train"]).score(looks["test"], told["test"])
    assert right[28] < 0.35 and right[256] > 0.8, right


def crops(shown, frames, picture: Image.Image, side: int) -> list[np.ndarray]:
    """The cell of each outline, and half of its neighbours, where the picture has `side` pixels, along its frame's colour."""
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), dtype=float) / 60 - 1
    pixels = np.pad(pixels, ((side // CELLS, side // CELLS), (side // CELLS, side // CELLS), (0, 0)), mode="edge")
    found = []
    for outline in shown:
        row, column = (
            round(place * side / CELLS - side / 16) + side // CELLS for place in (outline.row, outline.column)
        )
        colour = np.array(COLOURS[outline.colour]) / np.linalg.norm(COLOURS[outline.colour])
        found.append((pixels[row : row + side // 4, column : column + side // 4] @ colour).ravel())
    return found


def test_lessons_agree_with_the_picture():
    context = SourceContext(None, {"sam": "seg"}, {"none": 1.0}, False, True, 8, 0)
    source = OutlineLessons(context, split="test", count=50, questions=20)
    closed = 0
    for index in range(8):
        said = [message.content.removeprefix("<image>\n") for message in source[index].messages[1:]]
        (asked, dense), *short = zip(said[::2], said[1::2])
        gaps = {text[:-1]: text[-1] for text in dense.split()}
        assert asked == "How many gaps have the frames?" and source.render(f"test/{index}").width >= 336
        seen = np.asarray(source.render(f"test/{index}"), dtype=float)
        for colour in COLOURS:
            assert (colour in gaps) == ((np.abs(seen - COLOURS[colour]).max(axis=2) < 40).sum() > 200)
        for question, answer in short:
            colour = re.search(r"(\w+) frame", question)[1]
            if question.startswith("How many"):
                assert answer == gaps[colour]
            elif question.startswith("Is there"):
                assert (answer == "yes") == (colour in gaps)
            else:
                closed += 1
                assert [name for name, count in gaps.items() if count == "0"] == [answer]
        assert sum(question.startswith("How many") for question, _ in short) == len(gaps)
    assert closed
    assert at_a_glance(source.render("test/0")).size == (112, 112)
