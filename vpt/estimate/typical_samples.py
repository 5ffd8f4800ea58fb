"""Samples as a configuration expects them: an image, a question, an act of perception, an answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from vpt.data.build import build_masking
from vpt.data.transforms import ImageTransform, ProcessedImage
from vpt.estimate.settings import EstimateConfig
from vpt.perception.batch import IGNORE_INDEX, VISION_TOWER, Action, Batch, ImageInputs, PlaceholderSpan, Row

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


@dataclass
class _Writer:
    """A row while it is written, in numbers of tokens."""

    length: int = 0
    labels: int = 0
    blocks: list[PlaceholderSpan] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    paragraphs: list[tuple[int, int]] = field(default_factory=list)
    looks: dict[str, list[ProcessedImage]] = field(default_factory=dict)

    def turn(self, text: int, *, image: tuple[str, ProcessedImage] | None = None) -> None:
        """A system's or a user's."""
        start = self._open()
        if image is not None:
            source, look = image
            shown = self.looks.setdefault(source, [])
            self.blocks.append(PlaceholderSpan(self.length + ROLE["user"] + 1, look.tokens, source, len(shown)))
            shown.append(look)
            text += look.tokens + 2
        self._close(start, text)

    def said(self, text: int) -> None:
        """An assistant's."""
        self._close(self._open(), ROLE["assistant"] + text)
        self.labels += text + 1

    def acted(self, encoder: str, count: int) -> None:
        """An assistant's turn that asks for re-encoding; what is perceived is the next image shown."""
        self.actions.append(Action(self.length + 2 + ROLE["assistant"] + 1, count, encoder, len(self.blocks)))
        self.said(2 + count)
        self.labels -= count

    def _open(self) -> int:
        self.length += 1 + bool(self.length)  # <|im_start|>, after a line break
        return self.length

    def _close(self, start: int, text: int) -> None:
        self.length += text
        self.paragraphs.append((start, self.length))
        self.length += 1


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
    assumed, image = config.assume, Image.new("RGB", image_size(config))
    writer = _Writer()
    writer.turn(SYSTEM)
    writer.turn(ROLE["user"] + assumed.question, image=(VISION_TOWER, views[VISION_TOWER](image)))
    if kind == "region":
        width, height = (max(1, round(side * assumed.crop)) for side in image.size)
        writer.said(REGION)
        writer.turn(ROLE["user"], image=(VISION_TOWER, views[VISION_TOWER](Image.new("RGB", (width, height)))))
    elif kind != "none":
        writer.acted(kind, config.model.projector_scale)
        writer.turn(ROLE["user"], image=(kind, views[kind](image)))
    writer.said(assumed.answer)
    row = Row(writer.length, tuple(writer.blocks), tuple(writer.actions), tuple(writer.paragraphs))
    labels = torch.full((row.length,), IGNORE_INDEX)
    labels[row.length - writer.labels :] = 0  # how many counts here, not where
    looks: dict[str, list[ProcessedImage]] = {}
    for source, shown in writer.looks.items():
        known = looks.setdefault(views[source].name, [])
        known += [
            look for look in shown if source == VISION_TOWER or not known
        ]  # the same image: seen once through a view
    return Batch(
        input_ids=torch.zeros(row.length, dtype=torch.long),
        labels=labels,
        positions=torch.zeros(3, row.length, dtype=torch.long),
        rows=[row],
        images={
            view: ImageInputs(
                torch.empty(0), [look.tokens for look in shown], [look.grid for look in shown if look.grid]
            )
            for view, shown in looks.items()
        },
    )
