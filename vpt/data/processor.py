"""From a record to a sample: ids, labels, positions, prepared images. One sample is one row of a batch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpt.data.chat_template import ChatTemplate, EncodedConversation, Overflow, truncate
from vpt.data.feature_cache import FeatureCache
from vpt.data.image_cache import ImageCache, ImageKey
from vpt.data.images import MediaStore
from vpt.data.records import PLACEHOLDER, Message, Record
from vpt.data.references import Reference, VideoRef
from vpt.data.same_data import TokenMatchedImage
from vpt.data.sources.base import Source
from vpt.data.transforms import ImageTransform, ProcessedImage
from vpt.errors import DataError
from vpt.perception.batch import VISION_TOWER, PlaceholderSpan, Row
from vpt.perception.mrope import GridSpan, PositionKind, ReencodedPositions, row_positions

LONGEST_TOKEN = 256  # characters; the longest of Qwen's vocabulary has 128, and normalisation may shorten text


@dataclass
class Sample:
    """One encoded row.

    Attributes:
        ids, labels: [L]; labels are not shifted.
        positions: [3, L].
        row: its structure; blocks refer to the images of their source, in order.
        looks: source -> prepared images, with keys that tell equal ones.
        views: source -> name of the view that it looks through.
        record: where it came from.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    row: Row
    images: dict[str, list[tuple[ImageKey, ProcessedImage]]]
    transforms: dict[str, str]
    record: Record


@dataclass(frozen=True)
class PositionScheme:
    """How positions are counted.

    Attributes:
        positions: `model.positions`.
        perceived: `model.reencoded_positions`.
        merge: the tower's `spatial_merge_size`.
        tokens_per_second: positions that a second of video takes (Qwen2.5-VL); None: a step of its grid takes one.
    """

    positions: PositionKind = "mrope"
    reencoded: ReencodedPositions = "sequential"
    merge: int = 2
    tokens_per_second: float | None = None

    def grid_span(self, block: PlaceholderSpan, look: ProcessedImage) -> GridSpan | None:
        """The grid that a block's positions follow, or None where it counts as text."""
        if self.positions == "sequential" or (block.source != VISION_TOWER and self.reencoded == "sequential"):
            return None
        return GridSpan(block.start, look.grid[0] if look.grid else 1, *self.grid_shape(look), self._interval(look))

    def grid_shape(self, look: ProcessedImage) -> tuple[int, int]:
        """Rows and columns of the grid that an image's tokens form."""
        if look.grid is not None:
            return look.grid[1] // self.merge, look.grid[2] // self.merge
        side = math.isqrt(look.tokens)
        return side, side

    def _interval(self, look: ProcessedImage) -> float:
        """Positions from one step of the grid to the next, rounded as transformers does: its seconds are float32."""
        if look.seconds is None or self.tokens_per_second is None:
            return 1.0
        return float(np.float32(self.tokens_per_second) * np.float32(look.seconds))


@dataclass
class Processor:
    """Everything that turns records into samples; it holds no weights, so data workers carry it.

    Attributes:
        template: the chat format.
        views: source -> the view it looks through.
        numbering: how positions are counted.
        max_length: tokens a row may have.
        on_too_long: `raise` or `cut`.
        cache: prepared images, of this process.
        store: what frozen encoders saw of images, on disk; None: every image is looked at anew.
    """

    chat_template: ChatTemplate
    transforms: Mapping[str, ImageTransform]
    position_scheme: PositionScheme = field(default_factory=PositionScheme)
    max_length: int = 2048
    overflow: Overflow = "raise"
    image_cache: ImageCache = field(default_factory=lambda: ImageCache(256))
    feature_cache: "FeatureCache | None" = None

    def with_feature_cache(self, feature_cache: "FeatureCache | None") -> "Processor":
        """The same, with a cache of its own, for a model whose frozen encoders share `store`."""
        return replace(self, feature_cache=feature_cache, image_cache=ImageCache(self.image_cache.limit >> 20))

    def encode_conversation(self, record: Record, folder: MediaStore) -> Sample:
        """A whole conversation, for training. Raises DataError with the record's name."""
        self._check_size(record.messages, record.where)
        looks = self.process_images(record.images, folder, where=record.where)
        draft = EncodedConversation()
        self.chat_template.encode(draft, record.messages, _tokens(looks))
        truncate(draft, self.max_length, where=record.where, overflow=self.overflow)
        return self.build_sample(draft, looks, record)

    def encode_prompt(self, record: Record, folder: MediaStore, *, turns: int = 1) -> Sample:
        """The first `turns` user turns and all before them, up to where the assistant speaks."""
        users = [i for i, message in enumerate(record.messages) if message.role == "user"]
        messages = record.messages[: users[turns - 1] + 1]
        self._check_size(messages, record.where)
        images = self._images_within(record, messages)
        looks = self.process_images(images, folder, where=record.where)
        draft = EncodedConversation()
        self.chat_template.encode(draft, messages, _tokens(looks))
        self.chat_template.add_generation_prompt(draft)
        if len(draft.ids) > self.max_length:
            raise DataError(
                f"{record.where}: the prompt has {len(draft.ids)} tokens, data.max_length is {self.max_length}; "
                f"raise data.max_length, or shorten the question"
            )
        return self.build_sample(draft, looks, record)

    def _check_size(self, messages: Sequence[Message], where: str) -> None:
        """Refuse text that no cut could make fit before it costs minutes to encode."""
        size, most = sum(len(message.content) for message in messages), self.max_length * LONGEST_TOKEN
        if size > most:
            raise DataError(
                f"{where}: its text has {size:,} characters, data.max_length={self.max_length} tokens hold {most:,} at "
                "the very most; shorten or remove it"
            )

    def process_images(
        self, images: Mapping[str, tuple[Reference, ...]], folder: MediaStore, *, where: str
    ) -> dict[str, list[tuple[ImageKey, ProcessedImage]]]:
        """Prepare the images of every source: source -> (key, look) in order."""
        return {
            source: [self._process_image(source, reference, folder, where) for reference in references]
            for source, references in images.items()
        }

    def _process_image(
        self, source: str, reference: Reference, folder: MediaStore, where: str
    ) -> tuple[ImageKey, ProcessedImage]:
        transform = self.transforms[source]
        key = (str(folder.root), str(reference))
        look = self.image_cache.get(transform.name, key)
        if look is None or look.features is None:
            look = (
                self._from_feature_cache(transform, reference, folder, look)
                or look
                or self._transform(transform, reference, folder, where)
            )
            self.image_cache.put(transform.name, key, look)
        return key, look

    def _from_feature_cache(
        self, view: ImageTransform, reference: Reference, folder: MediaStore, look: ProcessedImage | None
    ) -> ProcessedImage | None:
        """The image as the encoder saw it before, if it did; `look` as it was prepared already, if it was."""
        if self.feature_cache is None:
            return None
        name = look.cache_key if look is not None else self.feature_cache.key(view, reference, folder)
        return self.feature_cache.get(name) if name is not None else None

    def _transform(self, view: ImageTransform, reference: Reference, folder: MediaStore, where: str) -> ProcessedImage:
        if isinstance(reference, VideoRef):
            return view.video(folder.video(reference, where=where))
        image = folder.image(reference, where=where)
        if isinstance(reference, TokenMatchedImage):
            _, like = self._process_image(reference.source, reference.like, folder, where)
            return view.to_token_count(image, like.tokens)
        name = self.feature_cache.key(view, reference, folder) if self.feature_cache is not None else None
        return replace(view(image), cache_key=name)

    def apply_transform(self, source: str, image: Image.Image) -> ProcessedImage:
        """One image through the view of `source`."""
        return self.transforms[source](image)

    def _images_within(self, record: Record, messages: tuple[Message, ...]) -> dict[str, tuple[Reference, ...]]:
        """What the placeholders in `messages` stand for."""
        users = "\n".join(message.content for message in messages if message.role == "user")
        seen = Counter(PLACEHOLDER.findall(users))
        token = {**self.chat_template.encoder_tokens, VISION_TOWER: ""}
        within = {source: images[: seen[token[source]]] for source, images in record.images.items()}
        return {source: images for source, images in within.items() if images}

    def build_sample(
        self, draft: EncodedConversation, looks: dict[str, list[tuple[ImageKey, ProcessedImage]]], record: Record
    ) -> Sample:
        """Number the positions of a written row."""
        grids = [self.position_scheme.grid_span(block, looks[block.source][block.image][1]) for block in draft.blocks]
        row = draft.build()
        sources = {block.source for block in row.blocks}
        return Sample(
            ids=torch.tensor(draft.ids),
            labels=torch.tensor(draft.labels),
            positions=row_positions(row.length, [grid for grid in grids if grid is not None]),
            row=row,
            images={source: entries for source, entries in looks.items() if source in sources},
            transforms={source: self.transforms[source].name for source in sources},
            record=record,
        )


def _tokens(looks: Mapping[str, list[tuple[ImageKey, ProcessedImage]]]) -> dict[str, list[int]]:
    return {source: [look.tokens for _, look in entries] for source, entries in looks.items()}


# What becomes of a record that cannot be used: `data.on_error`
OnError = Literal["raise", "skip"]


def encode_samples(
    rows: Sequence[tuple[Source, int, MediaStore]], encoder: Processor, on_error: OnError
) -> tuple[list[Sample | None], list[str]]:
    """A sample for each record, None where it is skipped; and why those are."""
    samples: list[Sample | None] = []
    errors = []
    for source, index, folder in rows:
        try:
            samples.append(encoder.encode_conversation(source[index], folder))
        except DataError as error:
            if on_error == "raise":
                raise
            samples.append(None)
            errors.append(str(error))
    return samples, errors
