"""From segments to stages: index tensors that say who runs when, who attends to whom, and what is filled in.

Training plans every stage of a batch at once (`ForwardPlanner`); generation plans one stage at a time, a segment of
each row that goes on (`vpt.generation.decode_step`). Both fill their stages with an `InsertCollector`.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vpt.models.attention import AttentionLayout, Hidden
from vpt.models.stage import InsertCollector, Stage, index_tensor
from vpt.perception.batch import Row, Span
from vpt.perception.segments import Segment, by_stage


@dataclass
class ForwardPlan:
    """The stages of a batch.

    Attributes:
        stages: in the order in which they run.
        kv_index: [N] where each position's last keys lie among those of all stages.
        output_index: [M] where the hidden state of each position to keep lies among all that the stages return.
    """

    stages: list[Stage]
    kv_index: Tensor
    output_index: Tensor


@dataclass
class _RowProgress:
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
        token_offsets: source -> first token of each image among the source's projected tokens.
        logits_to_keep: ascending, the positions of the batch whose hidden states are wanted; None for all.
        device: where the index tensors live.
        """
        self.rows, self.token_offsets, self.device = rows, token_offsets, device
        self._tensor = partial(index_tensor, device=device)
        self.logits_to_keep = np.arange(sum(row.length for row in rows)) if logits_to_keep is None else logits_to_keep
        self.segments = [by_stage(*pair) for pair in zip(rows, segments, strict=True)]
        self.progress = [_RowProgress() for _ in rows]
        self.cached = self.state_count = 0
        self.last_keys = np.zeros(sum(row.length for row in rows), dtype=np.int64)
        self.spans: list[Span] = []  # of each stage, its keys among all that are cached
        self.control_outputs: list[list[int]] = []  # of each stage, the positions in it that are control states

    def plan(self) -> ForwardPlan:
        """Lay out every stage in turn."""
        stages = [self._stage(number) for number in range(max(map(len, self.segments)))]
        output_index = self._select_outputs(stages)
        return ForwardPlan(stages, self._tensor(self.last_keys), self._tensor(output_index))

    def _select_outputs(self, stages: list[Stage]) -> np.ndarray:
        """Limit each stage's output to positions to keep and control states; returns `ForwardPlan.output_index`."""
        keys = self.last_keys[self.logits_to_keep]
        output_index = np.empty_like(keys)
        returned = 0
        for stage, (start, stop), control_outputs in zip(stages, self.spans, self.control_outputs, strict=True):
            here = (start <= keys) & (keys < stop)
            kept = np.union1d(keys[here] - start, control_outputs).astype(np.int64)
            output_index[here] = returned + np.searchsorted(kept, keys[here] - start)
            stage.logits_to_keep = None if len(kept) == stop - start else self._tensor(kept)
            stage.control_outputs = self._tensor(np.searchsorted(kept, control_outputs))
            returned += len(kept)
        return output_index

    def _stage(self, number: int) -> Stage:
        running = [
            (row, segment, progress)
            for row, stages, progress in zip(self.rows, self.segments, self.progress, strict=True)
            if number < len(stages)
            for segment in stages[number]
        ]
        lengths = [segment.length for _, segment, _ in running]
        offsets = np.cumsum([0, *lengths[:-1]]).tolist()
        collector = InsertCollector(self.device, merge=True)
        tokens: list[np.ndarray] = []
        keys: list[np.ndarray] = []
        control_outputs: list[int] = []
        for (row, segment, progress), offset in zip(running, offsets, strict=True):
            own, length = self.cached + offset, segment.length
            tokens.append(np.arange(row.start + segment.start, row.start + segment.stop))
            keys.append(np.concatenate([self._prefix_keys(row), _visible_keys(segment, progress, own)]))
            self._collect_inserts(collector, row, segment, progress, shift=offset - segment.start)
            self.last_keys[row.start + segment.start : row.start + segment.stop] = np.arange(own, own + length)
            progress.segment_at.append((own, segment.start))
            control_outputs.extend(offset + position - segment.start for position in segment.control_positions)
            self._register_states(progress, segment)
        self.spans.append((self.cached, self.cached + sum(lengths)))
        self.control_outputs.append(control_outputs)
        self.cached += sum(lengths)
        hidden = [_hidden_span(segment) for _, segment, _ in running]
        layout = AttentionLayout(lengths, keys, device=self.device, hidden=hidden)
        return collector.build(layout, tokens=np.concatenate(tokens))

    def _prefix_keys(self, row: Row) -> np.ndarray:
        """The keys of the row that a row goes on from, if it does."""
        if row.prefix is None:
            return np.arange(0)
        [(start, _)] = self.progress[row.prefix].segment_at
        return np.arange(start, start + self.rows[row.prefix].length)

    def _collect_inserts(
        self, collector: InsertCollector, row: Row, segment: Segment, progress: _RowProgress, *, shift: int
    ) -> None:
        """Collect what fills control tokens and placeholder spans; `shift` leads from row to stage positions."""
        known = list(zip(row.actions[: segment.resolved_actions], progress.states, strict=False))
        for action, states in known:
            for position, state in enumerate(states, start=action.start):
                if segment.start <= position < segment.stop:
                    collector.add_control(shift + position, state)
        conditioned = {action.block: states for action, states in known}
        for number, span in enumerate(row.blocks):
            if segment.start <= span.start and span.start + span.length <= segment.stop:
                first = self.token_offsets[span.source][span.image] + span.offset
                collector.add_insert(span, shift=shift, first_token=first, states=conditioned.get(number, []))
        for start, stop in segment.zeroed:
            collector.zeroed.extend(range(shift + max(start, segment.start), shift + min(stop, segment.stop)))

    def _register_states(self, progress: _RowProgress, segment: Segment) -> None:
        """Number the control states that this segment returns: they belong to the first unresolved action."""
        if not segment.control_positions:
            return
        while len(progress.states) <= segment.resolved_actions:
            progress.states.append([])
        numbers = range(self.state_count, self.state_count + len(segment.control_positions))
        progress.states[segment.resolved_actions].extend(numbers)
        self.state_count += len(segment.control_positions)


def _visible_keys(segment: Segment, progress: _RowProgress, own: int) -> np.ndarray:
    runs = []
    for run in segment.attends_to:
        offset, first = progress.segment_at[run.segment]
        runs.append(np.arange(offset + run.start - first, offset + run.stop - first))
    return np.concatenate([*runs, np.arange(own, own + segment.length)])


def _hidden_span(segment: Segment) -> Hidden | None:
    if segment.hidden_span is None:
        return None
    first, start, stop = segment.hidden_span
    return first - segment.start, start - segment.start, stop - segment.start
