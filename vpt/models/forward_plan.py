"""From segments to stages: index tensors that say who runs when, who attends to whom, and what is filled in."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vpt.models.attention import AttentionLayout, Hidden
from vpt.perception.batch import Row, Span
from vpt.perception.segments import Segment, by_stage


@dataclass
class VisualInsert:
    """Tokens of one source that a stage fills in.

    Attributes:
        source: the tower or a re-encoder.
        at: [T] where they go, in the stage.
        tokens: [T] which of the source's projected tokens.
        block: [T] which of the n blocks each token belongs to.
        states: [n, s] which control states steer each block, or None where none does.
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
        control_at: [c] control tokens in the stage whose embedding is replaced ...
        control_state: [c] ... by which control state.
        perceived: what fills the placeholder tokens.
        zeroed: [z] positions in the stage whose embedding is zero.
        asked: [h] positions in the stage whose hidden states anything reads, or None for all of them.
        reads: [r] which of those hidden states are control states from now on.
    """

    tokens: Tensor
    layout: AttentionLayout
    control_positions: Tensor
    control_sources: Tensor
    inserts: list[VisualInsert]
    zeroed: Tensor
    logits_to_keep: Tensor | None
    control_outputs: Tensor


@dataclass
class ForwardPlan:
    """The stages of a batch.

    Attributes:
        stages: in the order in which they run.
        cached: [N] where each position's last keys lie among those of all stages.
        hidden: [M] where the hidden state of each position that was asked for lies among all that the stages return.
    """

    stages: list[Stage]
    kv_index: Tensor
    output_index: Tensor


@dataclass
class _RowState:
    """Where a row's segments and control states ended up."""

    segment_at: list[tuple[int, int]] = field(default_factory=list)  # (offset among all cached keys, first position)
    states: list[list[int]] = field(default_factory=list)  # one list of state numbers for each action


class ForwardPlanner:
    """Turns rows cut into segments into stages of index tensors."""

    def __init__(
        self, rows: list[Row], segments: list[list[Segment]], token_offsets: dict[str, list[int]], *,
        logits_to_keep: np.ndarray | None, device: torch.device | str,
    ) -> None:  # fmt: skip
        """Args:
        rows, segments: the batch's rows and the cut of each.
        token_offsets: source -> first token of each look among the source's projected tokens.
        asked: ascending, the positions of the batch whose hidden states are wanted; None for all.
        device: where the index tensors live.
        """
        self.rows, self.token_offsets, self.device = rows, token_offsets, device
        self.logits_to_keep = np.arange(sum(row.length for row in rows)) if logits_to_keep is None else logits_to_keep
        self.segments = [by_stage(cuts) for cuts in segments]
        self.progress = [_RowState() for _ in rows]
        self.cached = self.state_count = 0
        self.last_keys = np.zeros(sum(row.length for row in rows), dtype=np.int64)
        self.spans: list[Span] = []  # of each stage, its keys among all that are cached
        self.reads: list[list[int]] = []  # of each stage, the positions in it that are control states

    def plan(self) -> ForwardPlan:
        """Lay out every stage in turn."""
        stages = [self._stage(number) for number in range(max(map(len, self.segments)))]
        hidden = self._select_outputs(stages)
        return ForwardPlan(stages, self._tensor(self.last_keys), self._tensor(hidden))

    def _select_outputs(self, stages: list[Stage]) -> np.ndarray:
        """Let each stage return what is asked for and what is read, no more; `Walk.hidden` of that."""
        keys = self.last_keys[self.logits_to_keep]
        hidden = np.empty_like(keys)
        returned = 0
        for stage, (start, stop), reads in zip(stages, self.spans, self.reads, strict=True):
            here = (start <= keys) & (keys < stop)
            asked = np.union1d(keys[here] - start, reads).astype(np.int64)
            hidden[here] = returned + np.searchsorted(asked, keys[here] - start)
            stage.logits_to_keep = None if len(asked) == stop - start else self._tensor(asked)
            stage.control_outputs = self._tensor(np.searchsorted(asked, reads))
            returned += len(asked)
        return hidden

    def _stage(self, number: int) -> Stage:
        parts = [
            (row, segment, progress)
            for row, stages, progress in zip(self.rows, self.segments, self.progress, strict=True)
            if number < len(stages)
            for segment in stages[number]
        ]
        lengths = [segment.stop - segment.start for _, segment, _ in parts]
        offsets = np.cumsum([0, *lengths[:-1]]).tolist()
        filler = _InsertCollector(self.token_offsets)
        tokens: list[np.ndarray] = []
        keys: list[np.ndarray] = []
        hidden: list[Hidden | None] = []
        reads: list[int] = []
        for (row, segment, progress), offset in zip(parts, offsets, strict=True):
            tokens.append(np.arange(row.start + segment.start, row.start + segment.stop))
            own = self.cached + offset
            keys.append(_visible_keys(segment, progress, own))
            hidden.append(_hidden_span(segment))
            filler.fill(row, segment, progress, offset)
            self.last_keys[row.start + segment.start : row.start + segment.stop] = np.arange(own, own + len(tokens[-1]))
            progress.segment_at.append((own, segment.start))
            reads.extend(offset + position - segment.start for position in segment.control_positions)
            self._register_states(progress, segment)
        self.spans.append((self.cached, self.cached + sum(lengths)))
        self.reads.append(reads)
        self.cached += sum(lengths)
        return Stage(
            tokens=self._tensor(np.concatenate(tokens)),
            layout=AttentionLayout(lengths, keys, device=self.device, hidden=hidden),
            control_positions=self._tensor(filler.control_positions),
            control_sources=self._tensor(filler.control_sources),
            inserts=filler.inserts(self._tensor),
            zeroed=self._tensor(filler.zeroed),
            logits_to_keep=None,
            control_outputs=self._tensor(reads),
        )

    def _register_states(self, progress: _RowState, segment: Segment) -> None:
        """Number the states that this segment reads: they belong to the action that is not yet known."""
        if not segment.control_positions:
            return
        while len(progress.states) <= segment.resolved_actions:
            progress.states.append([])
        numbers = range(self.state_count, self.state_count + len(segment.control_positions))
        progress.states[segment.resolved_actions].extend(numbers)
        self.state_count += len(segment.control_positions)

    def _tensor(self, values: np.ndarray | list) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.device, non_blocking=True)


def _visible_keys(segment: Segment, progress: _RowState, own: int) -> np.ndarray:
    runs = []
    for run in segment.attends_to:
        offset, first = progress.segment_at[run.segment]
        runs.append(np.arange(offset + run.start - first, offset + run.stop - first))
    return np.concatenate([*runs, np.arange(own, own + segment.stop - segment.start)])


def _hidden_span(segment: Segment) -> Hidden | None:
    if segment.hidden_span is None:
        return None
    first, start, stop = segment.hidden_span
    return first - segment.start, start - segment.start, stop - segment.start


class _InsertCollector:
    """Collects what a stage fills in: control states, perceived tokens, zeros."""

    def __init__(self, token_offsets: dict[str, list[int]]) -> None:
        self.token_offsets = token_offsets
        self.control_positions: list[int] = []
        self.control_sources: list[int] = []
        self.zeroed: list[int] = []
        self.blocks: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray, list[int]]]] = {}

    def fill(self, row: Row, segment: Segment, progress: _RowState, offset: int) -> None:
        """Note what the segment at `offset` of the stage fills in."""
        shift = offset - segment.start
        for number, action in enumerate(row.actions[: segment.resolved_actions]):
            for step, state in enumerate(progress.states[number]):
                if segment.start <= action.start + step < segment.stop:
                    self.control_positions.append(shift + action.start + step)
                    self.control_sources.append(state)
        steering = {
            action.block: progress.states[n] for n, action in enumerate(row.actions[: segment.resolved_actions])
        }
        for number, block in enumerate(row.blocks):
            if segment.start <= block.start and block.start + block.length <= segment.stop:
                first = self.token_offsets[block.source][block.image]
                at = np.arange(shift + block.start, shift + block.start + block.length)
                states = steering.get(number, [])
                entry = (at, np.arange(first, first + block.length), states)
                self.blocks.setdefault((block.source, len(states)), []).append(entry)
        for start, stop in segment.zeroed:
            self.zeroed.extend(range(shift + max(start, segment.start), shift + min(stop, segment.stop)))

    def inserts(self, tensor: Callable[[np.ndarray], Tensor]) -> list[VisualInsert]:
        """The blocks of the stage, those of one source and one number of control states together."""
        return [
            VisualInsert(
                source,
                positions=tensor(np.concatenate([at for at, _, _ in entries])),
                tokens=tensor(np.concatenate([tokens for _, tokens, _ in entries])),
                block=tensor(np.repeat(np.arange(len(entries)), [len(at) for at, _, _ in entries])),
                states=tensor(np.array([states for _, _, states in entries])) if count else None,
            )
            for (source, count), entries in self.blocks.items()
        ]
