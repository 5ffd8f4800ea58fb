"""Lessons about scenes: every answer agrees with the picture and with the dense answer."""

import re

import numpy as np
import pytest
from PIL import Image

from vpt.data.sources.base import SourceContext
from vpt.data.sources.scene_cells import COLUMNS, ROWS
from vpt.data.sources.scene_lessons import SceneLessons
from vpt.data.sources.scene_rendering import COLOURS
from vpt.errors import DataError


def lessons(**options) -> SceneLessons:
    actions = options.pop("actions", {"none": 1.0})
    context = SourceContext(None, {"dino": "detection"}, actions, False, True, 8, 0)
    return SceneLessons(context, split="test", count=50, questions=20, **options)


def answers(record) -> list[tuple[str, str]]:
    """Questions and answers in order, turns of perception left out."""
    said = [
        message.content
        for message in record.messages
        if "_action" not in message.content and "_image>" not in message.content
    ]
    return list(zip((text.removeprefix("<image>\n") for text in said[1::2]), said[2::2]))


def place(name: str) -> tuple[int, int]:
    return COLUMNS.index(name[0]), ROWS.index(name[1])


def places_in(image: Image.Image) -> dict[str, tuple[int, int]]:
    """Frames by colour: column and row of the 8 x 8 cells that the pixels of their colour have their middle in."""
    pixels, found = np.asarray(image, dtype=float), {}
    for name, rgb in COLOURS.items():
        rows, columns = np.nonzero(np.abs(pixels - rgb).max(axis=2) < 40)
        if len(rows) >= 30:
            found[name] = tuple(int((edge.min() + edge.max() + 1) / 2 * 8 / image.width) for edge in (columns, rows))
    return found


@pytest.mark.parametrize("index", range(8))
def test_at_a_glance_frames_are_where_the_answers_say(index):
    source = lessons(glance=True, frames=(1, 4))
    assert source.render(f"{source.split}/{index}").size == source[index].box[2:]
    seen = places_in(source.scene_of(index))
    (asked, dense), *others = answers(source[index])
    assert asked == "Where are the frames?" and {text[:-2]: place(text[-2:]) for text in dense.split()} == seen
    for question, answer in others:
        colour = re.search(r"(\w+) frame\?", question)[1]
        if question.startswith("Where"):
            assert place(answer) == seen[colour]
        elif question.startswith("Is there"):
            assert (answer == "yes") == (colour in seen)
        else:
            axis, last = {"leftmost": (0, min), "rightmost": (0, max), "topmost": (1, min), "lowest": (1, max)}[colour]
            assert seen[answer][axis] == last(place[axis] for place in seen.values())
            assert sum(place[axis] == seen[answer][axis] for place in seen.values()) == 1


@pytest.mark.parametrize("across", [2, 8])
def test_short_answers_agree_with_the_dense_one_and_that_with_the_picture(across):
    source = lessons(across=across, frames=(1, 4))
    for index in range(8):
        (asked, dense), *others = answers(source[index])
        read = {text[:-1]: text[-1] for text in dense.split()}
        assert asked == "Which frames are there?" and read.keys() == places_in(source.scene_of(index)).keys()
        assert sum(question.startswith("Which digit") for question, _ in others) == len(read)
        for question, answer in others:
            named = re.search(r"(\w+) frame\?|the (\d)\?", question)
            if question.startswith("Which digit"):
                assert answer == read[named[1]]
            elif question.startswith("What colour"):
                assert read[answer] == named[2]
            else:
                assert (answer == "yes") == (named[1] in read)
        side = 28 * across
        assert source.render(f"test/{index}").size == (side, side)


def test_a_lesson_with_an_action_perceives_before_the_dense_answer():
    record = lessons(actions={"none": 0.0, "dino": 1.0})[0]
    assert [message.role for message in record.messages[:5]] == ["system", "user", "assistant", "user", "assistant"]
    assert record.messages[3].content == "<detection_image>" and record.messages[4].content == record.answer


def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="frames"):
        lessons(across=1)
