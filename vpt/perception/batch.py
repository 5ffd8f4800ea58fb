"""`Batch`: rows packed one after the other, never padded, and their images.

A *row* is one conversation. Its *blocks* are runs of placeholder tokens that an encoder fills, its *actions* are runs
of control tokens. Positions inside a `Row` count from the row's first token; `start` says where the row begins in the
packed tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vpt.perception.rollouts import RolloutTokens

VISION_TOWER = "image"  # the transform of Qwen's own vision tower
IGNORE_INDEX = -100  # the label of a position that carries no loss
Grid = tuple[int, int, int]  # (frames, rows of patches, columns of patches)
Span = tuple[int, int]


@dataclass(frozen=True)
class PlaceholderSpan:
    """A run of placeholder tokens.

    Attributes:
        start, length: where it lies in its row.
        source: whose tokens fill it: `VISION_TOWER` for a plain image, else the name of a re-encoder.
        image: which image of the source, in the order of the row (in a batch: of the source's transform).
        offset: the first of the image's tokens that fills it, where an image fills several spans (frames of a video).
    """

    start: int
    length: int
    source: str
    image: int
    offset: int = 0


@dataclass(frozen=True)
class Action:
    """A run of `count` control tokens at `start`; `block` is the index of the block it conditions, if one follows."""

    start: int
    count: int
    encoder: str
    block: int | None


@dataclass(frozen=True)
class Row:
    """The structure of one conversation.

    Attributes:
        start: its first token in the packed batch.
        length: how many tokens it has.
        paragraphs: spans strictly inside `<|im_start|>` ... `<|im_end|>`, in order (paper section 3.4).
        masked: spans hidden between the inner passes; empty for a row that is not masked.
        dummy: written to make the calls of all processes match; it counts in no metric.
        prefix: the number of an earlier row of the batch, without actions, that this one goes on from: its tokens see
            all of that one's. Rollouts of one prompt share its keys in this way.
    """

    length: int
    blocks: tuple[PlaceholderSpan, ...] = ()
    actions: tuple[Action, ...] = ()
    paragraphs: tuple[Span, ...] = ()
    masked: tuple[Span, ...] = ()
    start: int = 0
    dummy: bool = False
    prefix: int | None = None


@dataclass
class RowBuilder:
    """A row while it is written, token by token; where text does not matter, its ids are zero."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    blocks: list[PlaceholderSpan] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    paragraphs: list[Span] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, loss: bool = False) -> None:
        """Append tokens, with loss or without."""
        self.ids.extend(ids)
        self.labels.extend(ids if loss else [IGNORE_INDEX] * len(ids))

    def image(self, source: str, tokens: int, *, pad: int = 0, offset: int = 0) -> None:
        """Append the placeholders of the next image of `source`, or more of the last one's, from its token `offset` on.

        The first action that waits for an image of `source` conditions them.
        """
        for number, action in enumerate(self.actions):
            if action.encoder == source and action.block is None:
                self.actions[number] = replace(action, block=len(self.blocks))
                break
        number = self.images_of(source) - bool(offset)
        self.blocks.append(PlaceholderSpan(len(self.ids), tokens, source, number, offset))
        self.add([pad] * tokens)

    def images_of(self, source: str) -> int:
        """How many images of `source` there are so far."""
        return sum(block.source == source and not block.offset for block in self.blocks)

    def action(self, encoder: str, count: int, *, token: int = 0) -> None:
        """Append `count` control tokens of an action."""
        self.actions.append(Action(len(self.ids), count, encoder, None))
        self.add([token] * count)

    def begin_paragraph(self) -> None:
        """Let a paragraph begin with the next token."""
        self.paragraphs.append((len(self.ids), len(self.ids)))

    def end_paragraph(self) -> None:
        """Let the last paragraph end with the last token."""
        self.paragraphs[-1] = (self.paragraphs[-1][0], len(self.ids))

    def build(self, *, dummy: bool = False) -> Row:
        """The structure of what has been written."""
        return Row(len(self.ids), tuple(self.blocks), tuple(self.actions), tuple(self.paragraphs), dummy=dummy)


@dataclass
class ImageInputs:
    """Images prepared by one transform, each of them once however often it is referred to.

    Attributes:
        pixels: what the encoder takes, of the images that are not `cached`: [patches, dim] for the tower,
            [images, 3, H, W] for others.
        tokens: how many tokens each image becomes.
        grids: (t, h, w) in patches of each image among `pixels`; the tower's only.
        cached: features of images that need no encoder, by number.
        cache_keys: of each image among `pixels`, its name in the feature cache.
    """

    pixels: Tensor
    tokens: list[int]
    grids: list[Grid] = field(default_factory=list)
    cached: dict[int, Tensor] = field(default_factory=dict)
    cache_keys: list[str | None] = field(default_factory=list)

    @property
    def uncached(self) -> list[int]:
        """Tokens of each image among `pixels`."""
        return [count for number, count in enumerate(self.tokens) if number not in self.cached]

    def merge_cached(self, encoded: Tensor | None) -> Tensor:
        """[positions, feature_dim], image after image: the cached, and those that have been `encoded` just now."""
        if not self.cached:
            assert encoded is not None
            return encoded
        parts = iter(self.split(encoded) if encoded is not None else ())
        return torch.cat([self.cached[n] if n in self.cached else next(parts) for n in range(len(self.tokens))])

    def split(self, features: Tensor) -> tuple[Tensor, ...]:
        """The features of each image among `pixels`."""
        positions = len(features) // sum(self.uncached)  # of a token: a projector may make one of several positions
        return features.split([count * positions for count in self.uncached])

    def map(self, move: Callable[[Tensor], Tensor]) -> "ImageInputs":
        """Apply `move` to every tensor."""
        return replace(self, pixels=move(self.pixels), cached={n: move(x) for n, x in self.cached.items()})

    def concat(self, other: "ImageInputs") -> "ImageInputs":
        """The images of both, those of `other` last."""
        pixels = torch.cat([self.pixels, other.pixels.to(self.pixels)]) if self.uncached else other.pixels
        cached = self.cached | {number + len(self.tokens): features for number, features in other.cached.items()}
        keys = (self.cache_keys or [None] * len(self.uncached)) + (other.cache_keys or [None] * len(other.uncached))
        return ImageInputs(pixels, self.tokens + other.tokens, self.grids + other.grids, cached, keys)


@dataclass
class Batch:
    """Rows of any kind, packed.

    Attributes:
        input_ids: [N].
        labels: [N], `IGNORE_INDEX` where there is no loss; not shifted.
        positions: [3, N], temporal, vertical, horizontal (M-RoPE), counted within each row.
        rows: the structure of each row.
        images: transform -> prepared images.
        ids: a name for each row, for reports (`source:index`).
        loss_positions: [M] ascending, the positions whose next token carries loss; on the CPU wherever the rest is,
            since the forward pass is planned there. A row's first token is never predicted.
        skipped: why records that belong here are left out, each beginning with the record's name.
        rollouts: how the labelled tokens were drawn, where they are of rollouts (`vpt.rl`).
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    rows: list[Row]
    images: dict[str, ImageInputs]
    ids: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    rollouts: RolloutTokens | None = None
    loss_positions: np.ndarray = field(default=None, repr=False)  # type: ignore[arg-type]  # from the labels

    def __post_init__(self) -> None:
        if self.loss_positions is None:
            carries_loss = self.labels.numpy(force=True) != IGNORE_INDEX
            carries_loss[[row.start for row in self.rows]] = False
            self.loss_positions = np.flatnonzero(carries_loss) - 1

    @classmethod
    def empty(cls) -> "Batch":
        """No rows: what a process holds where there are fewer rows than processes. No model can run it as it is."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(none, none, none.view(1, 0).expand(3, 0), [], {})

    @property
    def num_labels(self) -> int:
        """Number of tokens that carry loss."""
        return len(self.loss_positions)

    def to(self, device: torch.device | str) -> "Batch":
        """Copy every tensor to `device`."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy every tensor to page-locked memory; torch's DataLoader calls it by this name."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self, input_ids=move(self.input_ids), labels=move(self.labels), positions=move(self.positions),
            images={transform: images.map(move) for transform, images in self.images.items()},
            rollouts=self.rollouts and self.rollouts.map(move),
        )  # fmt: skip
