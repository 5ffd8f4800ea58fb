"""From a record to a sample: ids, labels, positions, prepared images. One sample is one row of a batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from vpt.data.chat_template import ChatTemplate, Overflow, truncate
from vpt.data.feature_cache import FeatureCache
from vpt.data.image_cache import ImageCache, ImageKey
from vpt.data.images import MediaStore
from vpt.data.positions import PositionScheme
from vpt.data.records import PLACEHOLDER, Message, Record
from vpt.data.references import ImageRef, Reference, VideoRef
from vpt.data.same_data import TokenMatchedImage
from vpt.data.sources.base import Source
from vpt.data.transforms import ImageTransform, ProcessedImage, TokenRun
from vpt.data.videos import MIDDLE, SUFFIXES, chosen_frames
from vpt.errors import DataError
from vpt.perception.batch import VISION_TOWER, Row, RowBuilder
from vpt.perception.mrope import row_positions

ProcessedImages = dict[
    str, list[tuple[ImageKey, ProcessedImage]]
]  # source -> its images, with keys that tell equal ones
LONGEST_TOKEN = 256  # characters; the longest of Qwen's vocabulary has 128, and normalisation may shorten text


@dataclass
class Sample:
    """One encoded row.

    Attributes:
        ids, labels: [L]; labels are not shifted.
        positions: [3, L].
        row: its structure; blocks refer to the images of their source, in order.
        images: processed images.
        transforms: source -> name of its image transform.
        record: where it came from.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    row: Row
    images: ProcessedImages
    transforms: dict[str, str]
    record: Record


@dataclass
class Processor:
    """Everything that turns records into samples; it holds no weights, so data workers carry it.

    Attributes:
        chat_template: the chat format.
        transforms: source -> its image transform.
        position_scheme: how positions are counted.
        max_length: tokens a row may have.
        overflow: `raise` or `truncate`.
        image_cache: processed images, of this process.
        frames: source -> which frames of a video a re-encoder takes: middle, all, or a number (`encoder.X.frames`).
        feature_cache: features of frozen encoders, on disk; None: every image is encoded anew.
    """

    chat_template: ChatTemplate
    transforms: Mapping[str, ImageTransform]
    position_scheme: PositionScheme = field(default_factory=PositionScheme)
    max_length: int = 2048
    overflow: Overflow = "raise"
    image_cache: ImageCache = field(default_factory=lambda: ImageCache(256))
    frames: Mapping[str, str] = field(default_factory=dict)
    feature_cache: FeatureCache | None = None

    def with_feature_cache(self, feature_cache: FeatureCache | None) -> "Processor":
        """A copy with another feature cache, and an image cache of its own."""
        return replace(self, feature_cache=feature_cache, image_cache=ImageCache(self.image_cache.limit >> 20))

    def encode_conversation(self, record: Record, media: MediaStore) -> Sample:
        """A whole conversation, for training. Raises DataError with the record's name."""
        self._check_messages(record.messages, record.where)
        images = self.process_images(record.images, media, where=record.where)
        conversation = RowBuilder()
        self.chat_template.encode(conversation, record.messages, _runs(images))
        truncate(conversation, self.max_length, where=record.where, overflow=self.overflow)
        return self.build_sample(conversation, images, record)

    def encode_prompt(self, record: Record, media: MediaStore, *, turns: int = 1) -> Sample:
        """The first `turns` user turns and all before them, up to where the assistant answers."""
        users = [i for i, message in enumerate(record.messages) if message.role == "user"]
        messages = record.messages[: users[turns - 1] + 1]
        self._check_messages(messages, record.where)
        images = self.process_images(self._images_within(record, messages), media, where=record.where)
        conversation = RowBuilder()
        self.chat_template.encode(conversation, messages, _runs(images))
        self.chat_template.add_generation_prompt(conversation)
        if len(conversation.ids) > self.max_length:
            raise DataError(
                f"{record.where}: the prompt has {len(conversation.ids)} tokens, data.max_length is {self.max_length}; "
                f"raise data.max_length, or shorten the question"
            )
        return self.build_sample(conversation, images, record)

    def _check_messages(self, messages: Sequence[Message], where: str) -> None:
        """Refuse text that no cut could make fit before it costs minutes to encode, and perception tokens of others."""
        size, most = sum(len(message.content) for message in messages), self.max_length * LONGEST_TOKEN
        if size > most:
            raise DataError(
                f"{where}: its text has {size:,} characters, data.max_length={self.max_length} tokens hold {most:,} at "
                "the very most; shorten or remove it"
            )
        said = (message.content for message in messages if message.role == "assistant")
        if unknown := next((found[0] for found in map(self.chat_template.unknown_tokens, said) if found), None):
            raise DataError(
                f"{where}: an assistant says {unknown}, which is no token of this model: it would learn the letters; "
                "mend it, or type the model.region_bins=... or encoder=[...] that it is meant for"
            )

    def process_images(
        self, images: Mapping[str, tuple[Reference, ...]], media: MediaStore, *, where: str
    ) -> ProcessedImages:
        """Process the images of every source: source -> (key, processed image) in order."""
        return {
            source: [self._process_image(source, reference, media, where) for reference in references]
            for source, references in images.items()
        }

    def _process_image(
        self, source: str, reference: Reference, media: MediaStore, where: str
    ) -> tuple[ImageKey, ProcessedImage]:
        """One image from memory, from the feature cache, or from its file: the first of them that has it."""
        transform, features = self.transforms[source], self.feature_cache
        reference, frames = self._frames_of(source, reference)
        key = (str(media.root), f"{reference} {frames}" if frames else str(reference))
        image = self.image_cache.get(transform.name, key)
        if image is not None and (image.features is not None or features is None):
            return key, image
        cache_key = image.cache_key if image is not None else None
        if image is None and features is not None:
            cache_key = features.key(transform, reference, media)
        encoded = features.get(cache_key) if features is not None and cache_key is not None else None
        if encoded is not None:
            image = encoded
        elif image is None:
            image = replace(self._transform(transform, reference, frames, media, where), cache_key=cache_key)
        self.image_cache.put(transform.name, key, image)
        return key, image

    def _frames_of(self, source: str, reference: Reference) -> tuple[Reference, str]:
        """What a source takes of a video, or of a path to a video file: one frame, or which frames of which video."""
        frames = self.frames.get(source, MIDDLE)
        if source == VISION_TOWER or frames == MIDDLE:
            return (reference if source == VISION_TOWER else reference.frame), ""
        if isinstance(reference, ImageRef) and PurePosixPath(reference.path).suffix.lower() in SUFFIXES:
            reference = VideoRef((reference,))
        return reference, frames if isinstance(reference, VideoRef) else ""

    def _transform(
        self, transform: ImageTransform, reference: Reference, frames: str, media: MediaStore, where: str
    ) -> ProcessedImage:
        """Open an image or video and transform it; `frames`: which ones of a video a re-encoder takes."""
        if isinstance(reference, VideoRef):
            clip = media.video(reference, where=where)
            # Qwen3-VL's tower writes a video in several runs; what re-encodes fills one run.
            return (
                replace(transform.video(chosen_frames(clip, frames)), captions=()) if frames else transform.video(clip)
            )
        image = media.image(reference, where=where)
        if isinstance(reference, TokenMatchedImage):
            _, like = self._process_image(reference.source, reference.like, media, where)
            return transform.to_token_count(image, like.tokens)
        return transform(image)

    def apply_transform(self, source: str, image: Image.Image) -> ProcessedImage:
        """One image through the transform of `source`."""
        return self.transforms[source](image)

    def _images_within(self, record: Record, messages: tuple[Message, ...]) -> dict[str, tuple[Reference, ...]]:
        """The images that placeholders in `messages` stand for."""
        users = "\n".join(message.content for message in messages if message.role == "user")
        counts = Counter(PLACEHOLDER.findall(users))
        token = {**self.chat_template.encoder_tokens, VISION_TOWER: ""}
        within = {source: images[: counts[token[source]]] for source, images in record.images.items()}
        return {source: images for source, images in within.items() if images}

    def build_sample(self, conversation: RowBuilder, images: ProcessedImages, record: Record) -> Sample:
        """The sample of an encoded conversation."""
        grids = [
            self.position_scheme.grid_span(block, images[block.source][block.image][1]) for block in conversation.blocks
        ]
        row = conversation.build()
        sources = {block.source for block in row.blocks}
        return Sample(
            ids=torch.tensor(conversation.ids), labels=torch.tensor(conversation.labels),
            positions=row_positions(row.length, [grid for grid in grids if grid is not None]), row=row,
            images={source: entries for source, entries in images.items() if source in sources},
            transforms={source: self.transforms[source].name for source in sources}, record=record,
        )  # fmt: skip


def _runs(images: ProcessedImages) -> dict[str, list[list[TokenRun]]]:
    return {source: [image.runs for _, image in entries] for source, entries in images.items()}


# For a record that cannot be used: `data.on_error`
OnError = Literal["raise", "skip"]


def encode_samples(
    rows: Sequence[tuple[Source, int, MediaStore]], processor: Processor, on_error: OnError
) -> tuple[list[Sample | None], list[str]]:
    """A sample for each record, None where it is skipped; and why those are."""
    samples: list[Sample | None] = []
    errors = []
    for source, index, media in rows:
        try:
            samples.append(processor.encode_conversation(source[index], media))
        except DataError as error:
            if on_error == "raise":
                raise
            samples.append(None)
            errors.append(str(error))
    return samples, errors
