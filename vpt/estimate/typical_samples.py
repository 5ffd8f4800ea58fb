"""Samples as a configuration expects them: an image, a question, an act of perception, an answer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from PIL import Image

from vpt.data.build import build_masking
from vpt.data.transforms import ImageTransform, ProcessedImage
from vpt.estimate.settings import EstimateConfig
from vpt.perception.batch import IGNORE_INDEX, VISION_TOWER, Batch, ImageInputs, Row, RowBuilder

# What Qwen2-VL's chat format adds (`vpt.data.chat_template`), in tokens of its tokenizer
SYSTEM = 8  # "system\nYou are a helpful assistant."
ROLE = {"user": 2, "assistant": 2}  # "user\n", "assistant\n"
REGION = 6  # two markers, four cells


@dataclass(frozen=True)
class TypicalSample:
    """A kind of sample.

    Attributes:
        kind: `none`, `region`, or the name of a re-encoder.
        share: how often it comes, masked or not; shares of all examples add up to 1.
        batch: one row; its pixels are empty.
    """

    kind: str
    share: float
    batch: Batch

    @property
    def row(self) -> Row:
        """The only one."""
        return self.batch.rows[0]

    @property
    def image_tokens(self) -> int:
        """Tokens of the vision tower: the image and a selected region."""
        return sum(block.length for block in self.row.blocks if block.source == VISION_TOWER)

    @property
    def perceived_tokens(self) -> int:
        """Tokens of re-encoders."""
        return sum(block.length for block in self.row.blocks if block.source != VISION_TOWER)

    @property
    def text_tokens(self) -> int:
        """Everything else."""
        return self.row.length - self.image_tokens - self.perceived_tokens


class _Conversation(RowBuilder):
    """A conversation while it is written, in numbers of tokens."""

    @contextmanager
    def turn(self, role: int, *, loss: bool = False) -> Iterator[None]:
        """Write a turn around what is written meanwhile; `role` is the number of tokens that say whose it is."""
        self.text(1 + bool(self.ids))  # <|im_start|>, after a line break
        self.begin_paragraph()
        self.text(role)
        yield
        self.end_paragraph()
        self.text(1, loss=loss)  # <|im_end|>

    def show(self, source: str, look: ProcessedImage) -> None:
        """Write an image between its two markers."""
        self.text(1)
        self.image(source, look.tokens)
        self.text(1)


def image_size(config: EstimateConfig) -> tuple[int, int]:
    """Width and height that are assumed."""
    side = config.data.image.max_side
    width, height = config.assume.image or (side, side * 3 // 4)
    scale = min(1.0, side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def shares(config: EstimateConfig) -> dict[str, float]:
    """Share of each kind of sample; they add up to 1."""
    weights = {kind: weight for kind, weight in (config.assume.actions or config.data.actions).items() if weight}
    if not config.data.perception:
        return {"none": 1.0}
    return {kind: weight / sum(weights.values()) for kind, weight in weights.items()}


def typical_samples(config: EstimateConfig, views: Mapping[str, ImageTransform]) -> list[TypicalSample]:
    """One sample of each kind; those that may be masked twice, as they are and masked."""
    masking = build_masking(config)
    found = []
    for kind, share in shares(config).items():
        batch = _write(kind, config, views)
        spans = masking.spans(batch.rows[0]) if masking.para_mask_id else ()
        ratio = masking.para_mask_ratio if spans else 0.0
        masked = replace(batch, rows=[replace(batch.rows[0], masked=spans)])
        found += [TypicalSample(kind, share * (1 - ratio), batch), TypicalSample(kind, share * ratio, masked)]
    return [example for example in found if example.share]


def _write(kind: str, config: EstimateConfig, views: Mapping[str, ImageTransform]) -> Batch:
    assumed, image, talk = config.assume, Image.new("RGB", image_size(config)), _Conversation()
    looks = {VISION_TOWER: [views[VISION_TOWER](image)]}
    with talk.turn(SYSTEM):
        pass
    with talk.turn(ROLE["user"]):
        talk.show(VISION_TOWER, looks[VISION_TOWER][0])
        talk.text(assumed.question)
    if kind == "region":
        width, height = (max(1, round(side * assumed.crop)) for side in image.size)
        looks[VISION_TOWER].append(views[VISION_TOWER](Image.new("RGB", (width, height))))
        with talk.turn(ROLE["assistant"], loss=True):
            talk.text(REGION, loss=True)
        with talk.turn(ROLE["user"]):
            talk.show(VISION_TOWER, looks[VISION_TOWER][1])
    elif kind != "none":
        look = views[kind](image)
        looks.setdefault(views[kind].name, [look])  # the same image: seen once through a view
        with talk.turn(ROLE["assistant"], loss=True):
            talk.text(1, loss=True)
            talk.action(kind, config.model.projector_scale)
            talk.text(1, loss=True)
        with talk.turn(ROLE["user"]):
            talk.show(kind, look)
    with talk.turn(ROLE["assistant"], loss=True):
        talk.text(assumed.answer, loss=True)
    row, labelled = talk.build(), sum(label != IGNORE_INDEX for label in talk.labels)
    labels = torch.full((row.length,), IGNORE_INDEX)
    labels[row.length - labelled :] = 0  # how many counts here, not where
    images = {
        view: ImageInputs(torch.empty(0), [look.tokens for look in shown], [look.grid for look in shown if look.grid])
        for view, shown in looks.items()
    }
    positions = torch.zeros(3, row.length, dtype=torch.long)
    return Batch(torch.tensor(talk.ids), labels, positions, [row], images)
