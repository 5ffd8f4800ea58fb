"""From a record to a sample: ids, labels, positions, prepared images. One sample is one row of a batch."""

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpt.batch import TOWER, Block, Row
from vpt.data.baseline import PlainLook
from vpt.data.images import ImageFolder
from vpt.data.records import PLACEHOLDER, Message, Record
from vpt.data.references import Reference, VideoRef
from vpt.data.template import Draft, Template, TooLong, cut_draft
from vpt.encoders.base import Look, View
from vpt.errors import DataError
from vpt.positions import GridSpan, PerceivedPositions, PositionKind, row_positions

if TYPE_CHECKING:
    from vpt.features import FeatureStore

LONGEST_TOKEN = 256  # characters; the longest of Qwen's vocabulary has 128, and normalisation may shorten text

LookKey = tuple[str, str]  # root and reference of an image: the same key is the same pixels


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
    looks: dict[str, list[tuple[LookKey, Look]]]
    views: dict[str, str]
    record: Record


class LookCache:
    """Prepared images by view and reference, the least recently used dropped beyond `megabytes`."""

    def __init__(self, megabytes: int) -> None:
        self.limit, self.held = megabytes << 20, 0
        self._entries: OrderedDict[tuple[str, LookKey], Look] = OrderedDict()

    def get(self, view: str, key: LookKey) -> Look | None:
        look = self._entries.get((view, key))
        if look is not None:
            self._entries.move_to_end((view, key))
        return look

    def put(self, view: str, key: LookKey, look: Look) -> None:
        size = look.nbytes
        if size > self.limit:
            return
        before = self._entries.pop((view, key), None)
        self._entries[view, key] = look
        self.held += size - (before.nbytes if before is not None else 0)
        while self.held > self.limit:
            self.held -= self._entries.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class Numbering:
    """How positions are counted.

    Attributes:
        positions: `model.positions`.
        perceived: `model.perceived_positions`.
        merge: the tower's `spatial_merge_size`.
        tokens_per_second: positions that a second of video takes (Qwen2.5-VL); None: a step of its grid takes one.
    """

    positions: PositionKind = "mrope"
    perceived: PerceivedPositions = "sequential"
    merge: int = 2
    tokens_per_second: float | None = None

    def grid_of(self, block: Block, look: Look) -> GridSpan | None:
        """The grid that a block's positions follow, or None where it counts as text."""
        if self.positions == "sequential" or (block.source != TOWER and self.perceived == "sequential"):
            return None
        return GridSpan(block.start, look.grid[0] if look.grid else 1, *self.cells(look), self._interval(look))

    def cells(self, look: Look) -> tuple[int, int]:
        """Rows and columns of the grid that an image's tokens form."""
        if look.grid is not None:
            return look.grid[1] // self.merge, look.grid[2] // self.merge
        side = math.isqrt(look.tokens)
        return side, side

    def _interval(self, look: Look) -> float:
        """Positions from one step of the grid to the next, rounded as transformers does: its seconds are float32."""
        if look.seconds is None or self.tokens_per_second is None:
            return 1.0
        return float(np.float32(self.tokens_per_second) * np.float32(look.seconds))


@dataclass
class SampleEncoder:
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

    template: Template
    views: Mapping[str, View]
    numbering: Numbering = field(default_factory=Numbering)
    max_length: int = 2048
    on_too_long: TooLong = "raise"
    cache: LookCache = field(default_factory=lambda: LookCache(256))
    store: "FeatureStore | None" = None

    def keeping(self, store: "FeatureStore | None") -> "SampleEncoder":
        """The same, with a cache of its own, for a model whose frozen encoders share `store`."""
        return replace(self, store=store, cache=LookCache(self.cache.limit >> 20))

    def encode(self, record: Record, folder: ImageFolder) -> Sample:
        """A whole conversation, for training. Raises DataError with the record's name."""
        self._check_size(record.messages, record.where)
        looks = self.look(record.images, folder, where=record.where)
        draft = Draft()
        self.template.write(draft, record.messages, _tokens(looks))
        cut_draft(draft, self.max_length, where=record.where, on_too_long=self.on_too_long)
        return self.finish(draft, looks, record)

    def prompt(self, record: Record, folder: ImageFolder, *, turns: int = 1) -> Sample:
        """The first `turns` user turns and all before them, up to where the assistant speaks."""
        users = [i for i, message in enumerate(record.messages) if message.role == "user"]
        messages = record.messages[: users[turns - 1] + 1]
        self._check_size(messages, record.where)
        images = self._images_within(record, messages)
        looks = self.look(images, folder, where=record.where)
        draft = Draft()
        self.template.write(draft, messages, _tokens(looks))
        self.template.open_answer(draft)
        if len(draft.ids) > self.max_length:
            raise DataError(
                f"{record.where}: the prompt has {len(draft.ids)} tokens, data.max_length is {self.max_length}; "
                f"raise data.max_length, or shorten the question"
            )
        return self.finish(draft, looks, record)

    def _check_size(self, messages: Sequence[Message], where: str) -> None:
        """Refuse text that no cut could make fit before it costs minutes to encode."""
        size, most = sum(len(message.content) for message in messages), self.max_length * LONGEST_TOKEN
        if size > most:
            raise DataError(
                f"{where}: its text has {size:,} characters, data.max_length={self.max_length} tokens hold {most:,} at "
                "the very most; shorten or remove it"
            )

    def look(
        self, images: Mapping[str, tuple[Reference, ...]], folder: ImageFolder, *, where: str
    ) -> dict[str, list[tuple[LookKey, Look]]]:
        """Prepare the images of every source: source -> (key, look) in order."""
        return {
            source: [self._one_look(source, reference, folder, where) for reference in references]
            for source, references in images.items()
        }

    def _one_look(self, source: str, reference: Reference, folder: ImageFolder, where: str) -> tuple[LookKey, Look]:
        view = self.views[source]
        key = (str(folder.root), str(reference))
        look = self.cache.get(view.name, key)
        if look is None or look.features is None:
            look = self._known(view, reference, folder, look) or look or self._opened(view, reference, folder, where)
            self.cache.put(view.name, key, look)
        return key, look

    def _known(self, view: View, reference: Reference, folder: ImageFolder, look: Look | None) -> Look | None:
        """The image as the encoder saw it before, if it did; `look` as it was prepared already, if it was."""
        if self.store is None:
            return None
        name = look.key if look is not None else self.store.key(view, reference, folder)
        return self.store.get(name) if name is not None else None

    def _opened(self, view: View, reference: Reference, folder: ImageFolder, where: str) -> Look:
        if isinstance(reference, VideoRef):
            return view.watch(folder.watch(reference, where=where))
        image = folder.load(reference, where=where)
        if isinstance(reference, PlainLook):
            _, like = self._one_look(reference.source, reference.like, folder, where)
            return view.fit(image, like.tokens)
        name = self.store.key(view, reference, folder) if self.store is not None else None
        return replace(view.prepare(image), key=name)

    def prepare(self, source: str, image: Image.Image) -> Look:
        """One image through the view of `source`."""
        return self.views[source].prepare(image)

    def _images_within(self, record: Record, messages: tuple[Message, ...]) -> dict[str, tuple[Reference, ...]]:
        """What the placeholders in `messages` stand for."""
        users = "\n".join(message.content for message in messages if message.role == "user")
        seen = Counter(PLACEHOLDER.findall(users))
        token = {**self.template.encoder_tokens, TOWER: ""}
        within = {source: images[: seen[token[source]]] for source, images in record.images.items()}
        return {source: images for source, images in within.items() if images}

    def finish(self, draft: Draft, looks: dict[str, list[tuple[LookKey, Look]]], record: Record) -> Sample:
        """Number the positions of a written row."""
        grids = [self.numbering.grid_of(block, looks[block.source][block.look][1]) for block in draft.blocks]
        row = draft.row()
        sources = {block.source for block in row.blocks}
        return Sample(
            ids=torch.tensor(draft.ids),
            labels=torch.tensor(draft.labels),
            positions=row_positions(row.length, [grid for grid in grids if grid is not None]),
            row=row,
            looks={source: entries for source, entries in looks.items() if source in sources},
            views={source: self.views[source].name for source in sources},
            record=record,
        )


def _tokens(looks: Mapping[str, list[tuple[LookKey, Look]]]) -> dict[str, list[int]]:
    return {source: [look.tokens for _, look in entries] for source, entries in looks.items()}
