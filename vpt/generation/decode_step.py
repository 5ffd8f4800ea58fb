"""What rows feed while they answer, and how a round of feeds becomes one stage of the walk."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vpt.data.records import Record
from vpt.data.transforms import ProcessedImage
from vpt.models.attention import AttentionLayout
from vpt.models.forward_plan import Stage, VisualInsert
from vpt.perception.batch import PlaceholderSpan


@dataclass
class VisualInput:
    """A block of a feed, what fills it, the control states that steer it ([s, D], or None for a crop), and for whom."""

    span: PlaceholderSpan
    image: ProcessedImage
    control_states: Tensor | None
    record: Record


@dataclass
class RowInput:
    """What one row feeds next.

    Attributes:
        ids: tokens.
        sight: what is perceived among them, if anything.
        states: [n, D] embeddings of the leading tokens (control tokens) instead of their own.
        keep: False where only the hidden states are wanted, not the keys (control states after the first).
    """

    ids: list[int]
    visual: VisualInput | None = None
    states: Tensor | None = None
    keep: bool = True

    @property
    def num_outputs(self) -> int:
        """How many of its hidden states are wanted: the last one, or all where they are all there is to it."""
        return 1 if self.keep else len(self.ids)


@dataclass
class DecodeStep:
    """The feeds of all rows as one stage.

    Attributes:
        ids: [N] packed tokens.
        stage: indices for `VPTModel.compose` and `extend`.
        sights: source -> what to look at, in the order in which `stage.perceived` counts their tokens.
        states: [r, D] control states that the stage refers to.
    """

    ids: Tensor
    stage: Stage
    visuals: dict[str, list[VisualInput]]
    states: Tensor


def pack_inputs(inputs: Sequence[RowInput], cached: Sequence[int], *, device: torch.device, like: Tensor) -> DecodeStep:
    """Pack one feed of each row.

    Args:
        feeds: one for each row.
        cached: how many positions each row has cached.
        device: of the model.
        like: a tensor of the model's width and type, [..., D].
    """
    counts = [len(feed.ids) for feed in inputs]
    layout = AttentionLayout(counts, [n + c for n, c in zip(cached, counts, strict=True)], device=device)
    collector = _Collector(device, like)
    asked: list[int] = []
    offset = 0
    for feed in inputs:
        collector.add(feed, offset)
        offset += len(feed.ids)
        asked.extend(range(offset - feed.num_outputs, offset))
    none = torch.zeros(0, dtype=torch.long, device=device)
    stage = Stage(
        none, layout, collector.tensor(collector.control_positions), collector.tensor(collector.control_sources),
        collector.inserts, zeroed=none,
        logits_to_keep=collector.tensor(asked) if len(asked) < offset else None, control_outputs=none,
    )  # fmt: skip
    ids = collector.tensor([token for feed in inputs for token in feed.ids])
    return DecodeStep(ids, stage, collector.visuals, torch.cat(collector.states))


@dataclass
class _Collector:
    """Numbers the control states and the perceived tokens of a round."""

    device: torch.device
    like: Tensor
    control_positions: list[int] = field(default_factory=list)
    control_sources: list[int] = field(default_factory=list)
    inserts: list[VisualInsert] = field(default_factory=list)
    visuals: dict[str, list[VisualInput]] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    banked: int = 0

    def __post_init__(self) -> None:
        self.states.append(self.like.new_zeros(0, self.like.shape[-1]))

    def add(self, feed: RowInput, offset: int) -> None:
        """Take in the feed that begins at `offset` of the round."""
        if feed.states is not None:
            self.control_positions.extend(range(offset, offset + len(feed.states)))
            self.control_sources.extend(self._add_states(feed.states))
        if feed.visual is not None:
            block, source = feed.visual.span, feed.visual.span.source
            seen = self.visuals.setdefault(source, [])
            first = sum(sight.image.tokens for sight in seen)
            seen.append(feed.visual)
            steering = feed.visual.control_states
            self.inserts.append(
                VisualInsert(
                    source,
                    positions=self.tensor(range(offset + block.start, offset + block.start + block.length)),
                    tokens=self.tensor(range(first, first + block.length)),
                    block=self.tensor([0] * block.length),
                    states=None if steering is None else self.tensor(self._add_states(steering))[None],
                )
            )

    def _add_states(self, states: Tensor) -> range:
        self.states.append(states)
        self.banked += len(states)
        return range(self.banked - len(states), self.banked)

    def tensor(self, values: Sequence[int]) -> Tensor:
        """Indices on the model's device."""
        return torch.tensor(list(values), dtype=torch.long, device=self.device)
