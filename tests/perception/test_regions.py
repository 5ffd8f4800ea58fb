"""box -> cells -> tokens -> cells -> crop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.perception.regions import Region


@st.composite
def boxes(draw):
    width, height = draw(st.integers(8, 4000)), draw(st.integers(8, 4000))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))), (width, height)


@given(boxes(), st.sampled_from([4, 8, 16]))
def test_the_crop_holds_the_box(case, bins):
    box, size = case
    region = Region.from_box(box, size, bins=bins)
    x0, y0, x1, y1 = region.to_box(size, bins=bins)
    assert x0 <= box[0] and y0 <= box[1] and x1 >= box[2] and y1 >= box[3]
    assert Region.find(region.to_text())[0][1] == region


def test_the_published_formula():
    """[x0*W/k, y0*H/k] to [(x1+1)*W/k, (y1+1)*H/k]."""
    assert Region(1, 2, 5, 6).to_box((640, 320), bins=8) == (80, 80, 480, 280)
    assert Region(1, 2, 5, 6).to_box((640, 320), bins=8, margin=1) == (0, 40, 560, 320)
    assert Region.from_box((0, 0, 640, 320), (640, 320), bins=8) == Region(0, 0, 7, 7)


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 11, 5), (5, 0, 4, 5)])
def test_a_box_outside_its_image(box):
    with pytest.raises(ValueError, match=r"does not lie inside its image of 10x10"):
        Region.from_box(box, (10, 10), bins=8)


def test_swapped_corners_and_malformed_text():
    text = Region(1, 2, 5, 6).to_text()
    assert Region.find(text.replace("x_1", "x_9").replace("x_5", "x_1").replace("x_9", "x_5"))[0][1] == Region(
        1, 2, 5, 6
    )
    assert Region.find(text[:-5]) == []
    assert Region.find("no region") == []
