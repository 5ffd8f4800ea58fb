"""Images for a first question, drawn here: nothing has to be at hand."""

import io
from dataclasses import dataclass

from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ExampleImage:
    """An image and a question about it."""

    png: bytes
    question: str


SCENES: list[tuple[str, list[tuple[str, Box, str]], str]] = [
    ("#f4efe6", [("rectangle", (8, 30, 28, 50), "red"), ("ellipse", (36, 8, 58, 30), "blue")], "what shape is red?"),
    ("#101828", [("triangle", (14, 12, 46, 48), "yellow")], "what color is the triangle?"),
    ("#e8f3ea", [("ellipse", (20, 20, 44, 44), "green"), ("rectangle", (2, 2, 12, 12), "black")], "is there a circle?"),
]


def example_images() -> list[ExampleImage]:
    """The examples, in order."""
    return [ExampleImage(_draw(ground, shapes), question) for ground, shapes, question in SCENES]


def _draw(ground: str, shapes: list[tuple[str, Box, str]]) -> bytes:
    image = Image.new("RGB", (64, 64), ground)
    pen = ImageDraw.Draw(image)
    for shape, (x0, y0, x1, y1), colour in shapes:
        if shape == "triangle":
            pen.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=colour)
        else:
            getattr(pen, shape)((x0, y0, x1, y1), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()
