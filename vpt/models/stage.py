"""`Stage`: one run of the decoder as index tensors, and the collector of what it fills in."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vpt.models.attention import AttentionLayout
from vpt.perception.batch import PlaceholderSpan

Indices = Sequence[int] | np.ndarray


@dataclass
class VisualInsert:
    """Tokens of one source that a stage fills in.

    Attributes:
        source: the vision tower or a re-encoder.
        positions: [T] where they go, in the stage.
        tokens: [T] which of the source's projected tokens.
        block: [T] which of the n placeholder spans each token belongs to.
        states: [n, s] which control states condition each span, or None where none does.
    """

    source: str
    positions: Tensor
    tokens: Tensor
    block: Tensor
    states: Tensor | None


@dataclass
class Stage:
    """One `extend`: the segments of every row that run together, packed. All tensors are indices.

    Attributes:
        tokens: [n] positions of the batch.
        layout: who attends to whom.
        control_positions: [c] control tokens in the stage whose embedding is replaced ...
        control_sources: [c] ... by which control state.
        inserts: visual tokens that fill the placeholder tokens.
        zeroed: [z] positions in the stage whose embedding is zero.
        logits_to_keep: [h] positions in the stage whose hidden states are returned, or None for all of them.
        control_outputs: [r] which of those hidden states are control states from now on.
    """

    tokens: Tensor
    layout: AttentionLayout
    control_positions: Tensor
    control_sources: Tensor
    inserts: list[VisualInsert]
    zeroed: Tensor
    logits_to_keep: Tensor | None
    control_outputs: Tensor


class InsertCollector:
    """Collects what replaces the token embeddings of one stage, and builds the stage."""

    def __init__(self, device: torch.device | str, *, merge: bool) -> None:
        """`merge` makes one insert of the spans of a source with equally many control states. That is faster; apart,
        what fills a row does not depend on the other rows, to the last bit."""
        self.merge, self._tensor = merge, partial(index_tensor, device=device)
        self.control_positions: list[int] = []
        self.control_sources: list[int] = []
        self.zeroed: list[int] = []
        self._inserts: dict[Hashable, list[tuple[str, range, range, Sequence[int]]]] = {}

    def add_control(self, position: int, state: int) -> None:
        """Replace the embedding at `position` of the stage by a control state, given by its number."""
        self.control_positions.append(position)
        self.control_sources.append(state)

    def add_insert(self, span: PlaceholderSpan, *, shift: int, first_token: int, states: Sequence[int]) -> None:
        """Fill a span, which lies `shift` further on in the stage than in its row, with its source's projected tokens
        from `first_token` on, conditioned on the control states of these numbers, if any."""
        positions = range(shift + span.start, shift + span.start + span.length)
        tokens = range(first_token, first_token + span.length)
        key = (span.source, len(states)) if self.merge else len(self._inserts)
        self._inserts.setdefault(key, []).append((span.source, positions, tokens, states))

    def build(self, layout: AttentionLayout, *, tokens: Indices = (), logits_to_keep: Indices | None = None) -> Stage:
        """The stage; `ForwardPlanner` adds its control outputs once it knows them."""
        return Stage(
            self._tensor(tokens), layout, self._tensor(self.control_positions), self._tensor(self.control_sources),
            [self._insert(entries) for entries in self._inserts.values()], self._tensor(self.zeroed),
            None if logits_to_keep is None else self._tensor(logits_to_keep), self._tensor([]),
        )  # fmt: skip

    def _insert(self, entries: list[tuple[str, range, range, Sequence[int]]]) -> VisualInsert:
        sources, positions, tokens, states = zip(*entries, strict=True)
        return VisualInsert(
            sources[0], positions=self._tensor(np.concatenate(positions)), tokens=self._tensor(np.concatenate(tokens)),
            block=self._tensor(np.repeat(np.arange(len(entries)), [len(span) for span in positions])),
            states=self._tensor(np.array(states)) if states[0] else None,
        )  # fmt: skip


def index_tensor(values: Indices, device: torch.device | str) -> Tensor:
    """Whole numbers as an index tensor."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device, non_blocking=True)
