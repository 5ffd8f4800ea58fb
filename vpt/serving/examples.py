"""Images for a first question: of the model's own test data where these come with the package, or drawn."""

import io
from dataclasses import dataclass

from PIL import Image, ImageDraw

from vpt.config.schema import TrainConfig
from vpt.data.records import PLACEHOLDER
from vpt.errors import UserError
from vpt.evaluation.questions import EvalQuestion, questions

Box = tuple[int, int, int, int]
MAX_EXAMPLES, SEARCHED = 4, 60  # test questions among which they are looked for


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


def example_images(config: TrainConfig | None = None) -> list[ExampleImage]:
    """A test question of each type that the model of `config` knows. Drawn images without one, and where its data
    lie in a folder (`data.root`): whoever reaches the page would see them.
    """
    if config is not None and config.data.root is None:
        try:
            found = [example for question in _one_of_each_type(config) if (example := _shown(question))]
        except UserError:  # the data are not at hand
            found = []
        if found:
            return found[:MAX_EXAMPLES]
    return [ExampleImage(_png(_draw(ground, shapes)), question) for ground, shapes, question in SCENES]


def _one_of_each_type(config: TrainConfig) -> list[EvalQuestion]:
    first: dict[str, EvalQuestion] = {}
    for question in questions(config, limit=SEARCHED):
        first.setdefault(question.record.question_type, question)
    return [*first.values()]


def _shown(question: EvalQuestion) -> ExampleImage | None:
    record = question.record
    if record.image is None:
        return None
    asked = next(message.content for message in record.messages if message.role == "user")
    # As the model was taught: a model with several kinds of perception is told by a sentence which one to use.
    text, image = PLACEHOLDER.sub("", asked).strip(), question.folder.full_resolution(record.image, where=record.where)
    return ExampleImage(_png(image), text)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def _draw(ground: str, shapes: list[tuple[str, Box, str]]) -> Image.Image:
    image = Image.new("RGB", (64, 64), ground)
    pen = ImageDraw.Draw(image)
    for shape, (x0, y0, x1, y1), colour in shapes:
        if shape == "triangle":
            pen.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=colour)
        else:
            getattr(pen, shape)((x0, y0, x1, y1), fill=colour)
    return image
