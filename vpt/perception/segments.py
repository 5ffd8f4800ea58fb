"""A conversation as a list of segments, cut where it perceives.

The language model is causal, so nothing before a control token can see what comes after it. `shared` runs each segment
once, over the keys that earlier segments left behind; `full` runs the whole row again after each action. Both are lists
of segments for `vpt.models.inner_forward`, and their results are equal. A position that runs more than once
counts as it was computed last.

    shared   [ question ........ | control, perceived ... | control, perceived ... answer ]
    full     [ question ........................................................... answer ]   state 1 known after it
             [ question ........................................................... answer ]   state 2 known after it
             [ question ........................................................... answer ]
"""

from dataclasses import dataclass, field
from typing import Literal

from vpt.perception.batch import Row, Span

InnerForward = Literal["shared", "full"]
MaskMode = Literal["zero", "bottleneck"]


@dataclass(frozen=True)
class CachedSpan:
    """Keys of positions [start, stop) of a row, as segment number `segment` left them."""

    segment: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) of a row, run through the language model at once.

    Attributes:
        attends_to: cached keys that are visible besides its own.
        resolved_actions: how many of the row's actions have perceived: their control tokens and blocks are filled.
        zeroed: spans whose embeddings are zero.
        control_positions: positions whose hidden states are the control states of the first unresolved action.
        hidden_span: (first query, key start, key stop) in positions of the row: keys not visible from that query on.
        same_stage: runs in the same stage as the segment before it, from which it needs keys only.
    """

    start: int
    stop: int
    attends_to: tuple[CachedSpan, ...] = ()
    resolved_actions: int = 0
    zeroed: tuple[Span, ...] = ()
    control_positions: tuple[int, ...] = ()
    hidden_span: tuple[int, int, int] | None = None
    same_stage: bool = False

    @property
    def length(self) -> int:
        """Number of its positions."""
        return self.stop - self.start

    @property
    def cached_length(self) -> int:
        """Number of cached keys that it sees."""
        return sum(span.stop - span.start for span in self.attends_to)


def split_segments(row: Row, *, inner_forward: InnerForward, passes: int, mode: MaskMode) -> list[Segment]:
    """Cut a row into segments, in the order in which they run.

    Args:
        row: the conversation.
        inner_forward: `shared` or `full`.
        passes: `num_inner_forward_run`; with 1 nothing is conditioned and there is one segment (alignment stage).
        mode: what happens to `row.masked` once the first action has perceived.
    """
    if passes == 1 or not row.actions:
        return [Segment(0, row.length)]
    if inner_forward == "full":
        return _split_full(row, mode)
    return _SharedSplit(row, mode).segments


def by_stage(row: Row, segments: list[Segment]) -> list[list[Segment]]:
    """The segments of a row, those of one stage together; a row that goes on from another begins a stage later."""
    stages: list[list[Segment]] = [] if row.prefix is None else [[]]
    for segment in segments:
        if segment.same_stage:
            stages[-1].append(segment)
        else:
            stages.append([segment])
    return stages


def _control_positions(row: Row, number: int) -> tuple[int, ...]:
    """Positions just before each control token of action `number`: they predict it, their states condition it."""
    action = row.actions[number]
    return tuple(range(action.start - 1, action.start - 1 + action.count))


def _split_full(row: Row, mode: MaskMode) -> list[Segment]:
    control, passes = row.actions[0].start, []
    for known in range(len(row.actions) + 1):
        masked = row.masked if known else ()
        zeroed = masked if mode == "zero" else ()
        positions = _control_positions(row, known) if known < len(row.actions) else ()
        hidden = (control + 1, masked[0][0], control) if masked and mode == "bottleneck" else None
        passes.append(Segment(0, row.length, (), known, zeroed, positions, hidden))
    return passes


@dataclass
class _SharedSplit:
    """A row while it is cut; the fields say what has been cached so far."""

    row: Row
    mode: MaskMode
    segments: list[Segment] = field(default_factory=list)
    cached: list[CachedSpan] = field(default_factory=list)
    cursor: int = 0
    zeroed: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        joined = False
        for number, action in enumerate(self.row.actions):
            reads = _control_positions(self.row, number)
            # The later control states are read over plain control tokens, whose keys are not kept.
            self._run_to(reads[-1] + 1, known=number, reads=reads, kept=action.start, joined=joined)
            joined = number == 0 and bool(self.row.masked) and self._mask(action.start)
        self._run_to(self.row.length, known=len(self.row.actions), joined=joined)

    def _run_to(
        self, stop: int, *, known: int, reads: tuple[int, ...] = (), kept: int | None = None, joined: bool = False
    ) -> None:
        sees = tuple(self.cached)
        kept = stop if kept is None else kept
        self.cached.append(CachedSpan(len(self.segments), self.cursor, kept))
        self.segments.append(Segment(self.cursor, stop, sees, known, self.zeroed, reads, same_stage=joined))
        self.cursor = kept

    def _mask(self, control: int) -> bool:
        """The first action has its state: from here on the row goes without its masked spans.

        Returns whether the next segment can run beside the last one.
        """
        start = min(self.row.masked[0][0], control)
        if self.mode == "zero":  # all that follows the first masked position is computed again
            self.zeroed = self.row.masked
            self.cursor = start
        else:  # the control token is the last to see what is hidden
            self._run_to(control + 1, known=1)
        before = CachedSpan(0, 0, start)
        self.cached = [before, *(run for run in self.cached if self.mode == "bottleneck" and run.start >= control)]
        if not start:
            self.cached = self.cached[1:]
        return self.mode == "bottleneck"
