"""Conversations of as many tokens as one asks for, about images of noise: for estimates and benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vpt.data.collate import collate
from vpt.data.images import MediaStore
from vpt.data.processor import Processor
from vpt.data.records import DEFAULT_SYSTEM, ImageRef, Message, Record
from vpt.perception.batch import VISION_TOWER, Batch
from vpt.perception.masking import Masking
from vpt.perception.tokens import REGION_END, REGION_START, action_tokens

WORD = " red"  # one token of the tiny tokenizer
REGION = f"{REGION_START}<|x_0|><|y_0|><|x_1|><|y_1|>{REGION_END}"


def _noise(name: str) -> Image.Image:
    """The image of a path `NUMBER_WIDTHxHEIGHT`."""
    width, height = map(int, name.split("_")[1].split("x"))
    return Image.effect_noise((width, height), 60).convert("RGB")


MEDIA = MediaStore(Path(), max_side=100_000, render=_noise)


@dataclass(frozen=True)
class SyntheticRow:
    """One conversation.

    Attributes:
        image, crop: width and height in pixels of the image, and of the selected region if any.
        question, answer: words.
        encoder: the re-encoder that encodes the image before the answer, if any.
        masked: whether image and question are hidden from the answer.
    """

    image: tuple[int, int] = (128, 128)
    question: int = 40
    crop: tuple[int, int] | None = None
    encoder: str | None = None
    answer: int = 30
    masked: bool = False

    def record(self, number: int, encoder_tokens: dict[str, str]) -> Record:
        """The conversation, about image `number`; `encoder_tokens` are the re-encoders' spellings."""
        image = ImageRef("{}_{}x{}".format(number, *self.image))
        images: dict[str, tuple[ImageRef, ...]] = {VISION_TOWER: (image,)}
        messages = [Message("user", "<image>" + WORD * self.question)]
        if self.crop is not None:
            images[VISION_TOWER] += (ImageRef(image.path, (0, 0, *self.crop)),)
            messages += [Message("assistant", REGION), Message("user", "<image>")]
        if self.encoder is not None:
            images[self.encoder], token = (image,), encoder_tokens[self.encoder]
            messages += [Message("assistant", "".join(action_tokens(token))), Message("user", f"<{token}_image>")]
        turns = (Message("system", DEFAULT_SYSTEM), *messages, Message("assistant", WORD * self.answer))
        return Record(turns, images, f"row {number}")


def synthetic_records(processor: Processor, rows: Sequence[SyntheticRow]) -> list[Record]:
    """The conversation of each row, each about an image of its own."""
    return [row.record(number, processor.chat_template.encoder_tokens) for number, row in enumerate(rows)]


def synthetic_batch(processor: Processor, rows: Sequence[SyntheticRow]) -> Batch:
    """Rows as a processor encodes them, packed."""
    samples = [processor.encode_conversation(record, MEDIA) for record in synthetic_records(processor, rows)]
    masked = [Masking(1).spans(sample.row) if row.masked else () for row, sample in zip(rows, samples)]
    return collate(samples, masked=masked)
