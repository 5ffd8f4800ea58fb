"""What rows feed while they answer, and how a round of feeds becomes one stage of the walk."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vpt.attention import Layout
from vpt.batch import Block
from vpt.data.records import Record
from vpt.encoders.base import Look
from vpt.stages import Perceived, Stage


@dataclass
class Sight:
    """A block of a feed, what fills it, the control states that steer it ([s, D], or None for a crop), and for whom."""

    block: Block
    look: Look
    steering: Tensor | None
    record: Record


@dataclass
class Feed:
    """What one row feeds next.

    Attributes:
        ids: tokens.
        sight: what is perceived among them, if anything.
        states: [n, D] embeddings of the leading tokens (control tokens) instead of their own.
        keep: False where only the hidden states are wanted, not the keys (control states after the first).
    """

    ids: list[int]
    sight: Sight | None = None
    states: Tensor | None = None
    keep: bool = True

    @property
    def asked(self) -> int:
        """How many of its hidden states are wanted: the last one, or all where they are all there is to it."""
        return 1 if self.keep else len(self.ids)


@dataclass
class Round:
    """The feeds of all rows as one stage.

    Attributes:
        ids: [N] packed tokens.
        stage: indices for `VPTModel.compose` and `extend`.
        sights: source -> what to look at, in the order in which `stage.perceived` counts their tokens.
        states: [r, D] control states that the stage refers to.
    """

    ids: Tensor
    stage: Stage
    sights: dict[str, list[Sight]]
    states: Tensor


def gather(feeds: Sequence[Feed], cached: Sequence[int], *, device: torch.device, like: Tensor) -> Round:
    """Pack one feed of each row.

    Args:
        feeds: one for each row.
        cached: how many positions each row has cached.
        device: of the model.
        like: a tensor of the model's width and type, [..., D].
    """
    counts = [len(feed.ids) for feed in feeds]
    layout = Layout(counts, [n + c for n, c in zip(cached, counts, strict=True)], device=device)
    collector = _Collector(device, like)
    asked: list[int] = []
    offset = 0
    for feed in feeds:
        collector.add(feed, offset)
        offset += len(feed.ids)
        asked.extend(range(offset - feed.asked, offset))
    none = torch.zeros(0, dtype=torch.long, device=device)
    stage = Stage(
        none, layout, collector.tensor(collector.control_at), collector.tensor(collector.control_state),
        collector.perceived, zeroed=none,
        asked=collector.tensor(asked) if len(asked) < offset else None, reads=none,
    )  # fmt: skip
    ids = collector.tensor([token for feed in feeds for token in feed.ids])
    return Round(ids, stage, collector.sights, torch.cat(collector.bank))


@dataclass
class _Collector:
    """Numbers the control states and the perceived tokens of a round."""

    device: torch.device
    like: Tensor
    control_at: list[int] = field(default_factory=list)
    control_state: list[int] = field(default_factory=list)
    perceived: list[Perceived] = field(default_factory=list)
    sights: dict[str, list[Sight]] = field(default_factory=dict)
    bank: list[Tensor] = field(default_factory=list)
    banked: int = 0

    def __post_init__(self) -> None:
        self.bank.append(self.like.new_zeros(0, self.like.shape[-1]))

    def add(self, feed: Feed, offset: int) -> None:
        """Take in the feed that begins at `offset` of the round."""
        if feed.states is not None:
            self.control_at.extend(range(offset, offset + len(feed.states)))
            self.control_state.extend(self._deposit(feed.states))
        if feed.sight is not None:
            block, source = feed.sight.block, feed.sight.block.source
            seen = self.sights.setdefault(source, [])
            first = sum(sight.look.tokens for sight in seen)
            seen.append(feed.sight)
            steering = feed.sight.steering
            self.perceived.append(
                Perceived(
                    source,
                    at=self.tensor(range(offset + block.start, offset + block.start + block.length)),
                    tokens=self.tensor(range(first, first + block.length)),
                    block=self.tensor([0] * block.length),
                    states=None if steering is None else self.tensor(self._deposit(steering))[None],
                )
            )

    def _deposit(self, states: Tensor) -> range:
        self.bank.append(states)
        self.banked += len(states)
        return range(self.banked - len(states), self.banked)

    def tensor(self, values: Sequence[int]) -> Tensor:
        """Indices on the model's device."""
        return torch.tensor(list(values), dtype=torch.long, device=self.device)
