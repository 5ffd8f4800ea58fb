"""Conversations of as many tokens of each kind as one asks for, about images of noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vpt.data.collate import collate
from vpt.data.images import MediaStore
from vpt.data.records import SYSTEM_PROMPT, ImageRef, Message, Record
from vpt.models.build import ModelBundle
from vpt.perception.batch import VISION_TOWER, Batch
from vpt.perception.masking import Masking
from vpt.perception.tokens import action_tokens, region_tokens

ENCODER, PREFIX = "dino", "detection"
WORD = " red"  # one token of the tiny tokenizer
REGION = "".join(region_tokens(1))


def noise(name: str) -> Image.Image:
    """The image of a path `NUMBER_WIDTHxHEIGHT`."""
    width, height = map(int, name.split("_")[1].split("x"))
    return Image.effect_noise((width, height), 60).convert("RGB")


MEDIA = MediaStore(Path(), max_side=10_000, render=noise)


@dataclass(frozen=True)
class SyntheticRow:
    """One conversation.

    Attributes:
        image, crop: (rows, columns) of image tokens of the image, and of the selected region if any.
        question, answer: words.
        perceives: whether the re-encoder encodes the image before the answer.
        masked: whether image and question are hidden from the answer.
    """

    image: tuple[int, int] = (8, 8)
    question: int = 40
    crop: tuple[int, int] | None = None
    perceives: bool = False
    answer: int = 30
    masked: bool = False

    def record(self, number: int, cell: int) -> Record:
        """The conversation about image `number`; the vision tower makes one token of `cell` x `cell` pixels."""
        (rows, columns), crop = self.image, self.crop
        image = ImageRef(f"{number}_{columns * cell}x{rows * cell}")
        images, messages = {VISION_TOWER: [image]}, [Message("user", "<image>" + WORD * self.question)]
        if crop is not None:
            images[VISION_TOWER].append(ImageRef(image.path, (0, 0, crop[1] * cell, crop[0] * cell)))
            messages += [Message("assistant", REGION), Message("user", "<image>")]
        if self.perceives:
            images[ENCODER] = [image]
            messages += [Message("assistant", "".join(action_tokens(PREFIX))), Message("user", f"<{PREFIX}_image>")]
        turns = (Message("system", SYSTEM_PROMPT), *messages, Message("assistant", WORD * self.answer))
        return Record(turns, {source: tuple(found) for source, found in images.items()}, f"row {number}")


def records(bundle: ModelBundle, rows: Sequence[SyntheticRow]) -> Iterator[Record]:
    """The conversation of each row, each about an image of its own."""
    vision = bundle.model.qwen.config.vision_config
    return (row.record(number, vision.patch_size * vision.spatial_merge_size) for number, row in enumerate(rows))


def synthetic_batch(bundle: ModelBundle, rows: Sequence[SyntheticRow]) -> Batch:
    """Rows packed for a model, on its device."""
    samples = [bundle.processor.encode_conversation(record, MEDIA) for record in records(bundle, rows)]
    masked = [Masking(1).spans(sample.row) if row.masked else () for row, sample in zip(rows, samples)]
    return collate(samples, masked=masked).to(bundle.model.device)
