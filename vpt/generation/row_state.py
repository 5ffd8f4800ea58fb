"""A row while it answers: its limits, its tokens so far, the trace of its perception, its next input."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from vpt.data.images import MediaStore
from vpt.data.processor import Sample
from vpt.data.references import ImageRef
from vpt.generation.decode_step import RowInput
from vpt.perception.requests import FREE


@dataclass(frozen=True)
class GenerationLimits:
    """Limits on an answer's perception and length.

    Attributes:
        max_new_tokens: tokens of all the model's turns, forced control tokens included.
        max_actions: times a row may request perception; after them the tokens that request it are forbidden.
        crop_margin: cells by which a selected region is widened on each side.
        action: `free`; `none` forbids perception; `region` or a re-encoder's name makes every answer about an image
            begin with that action, and forbids the others.
        stop: tokens that end an answer besides `<|im_end|>` and `<|endoftext|>`, wherever they come.
    """

    max_new_tokens: int = 64
    max_actions: int = 3
    crop_margin: int = 0
    action: str = FREE
    stop: tuple[int, ...] = ()


DONE, REPAIRED, IGNORED = "done", "repaired", "ignored"


@dataclass
class PerceptionStep:
    """One request for perception and what came of it.

    Attributes:
        kind: `region` or a re-encoder.
        requested: the tokens of the request, as text.
        status: `done`; `repaired`, done though the request was malformed; `ignored` (see `vpt.perception.requests`).
        box: what a region shows, x0, y0, x1, y1 in pixels of the image.
        state_norm: mean norm of the control states.
        visual_tokens: how many tokens the conversation grew by.
        seconds: from the end of the requesting turn to the first token after its images, the batch's wait included.
    """

    kind: str
    requested: str = ""
    status: str = DONE
    box: tuple[int, int, int, int] | None = None
    state_norm: float | None = None
    visual_tokens: int = 0
    seconds: float = 0.0


@dataclass
class Answer:
    """The text of a row's last turn, the ids of all its turns, and the trace of its perception.

    `states` holds the control states, [s, D], of each re-encoding. `complete` is False where `max_new_tokens` came
    before the end. `confidence` is the probability that the model gave to its last turn, its end included, before
    temperature and the like.
    """

    text: str
    ids: list[int]
    trace: list[PerceptionStep]
    complete: bool
    states: list[Tensor] = field(default_factory=list)
    confidence: float = 1.0


@dataclass(frozen=True)
class Draw:
    """A token that was drawn: its position in the conversation, its id, the set of tokens that were forbidden
    (`PerceptionConstraints.forbidden`), and its log-probability among the others at the temperature."""

    position: int
    token: int
    constraint: int
    log_prob: float


@dataclass(eq=False)
class RowState:
    """One row while it answers.

    Attributes:
        rng: its tokens are drawn from it.
        position: of its next token.
        actions_left: how often it may still request perception.
        forced_prefix: the set of tokens that each of its next tokens must be in.
        next_input: of the next decode step; None once it has ended.
        turn_ids, output_ids: tokens of this turn, and of all turns.
        log_probability: of this turn.
        pending_action: the re-encoder whose control states are being read.
        pending_states: those that have been read, [D] each.
        turn_states: control states of each of this turn's actions, [s, D].
        control_states: control states of every re-encoding so far.
        perceived_at: when the last turn that was shown something ended, until the first token after it.
        length: positions of the conversation so far.
        constraint: the set of tokens that are forbidden now (`PerceptionConstraints.forbidden`).
        recording: what follows is kept, for rollouts.
        inputs: what it has run so far, after its prompt.
        draws: of all tokens so far, forced ones too.
    """

    sample: Sample
    media: MediaStore
    rng: np.random.Generator
    position: int
    actions_left: int = 0
    forced_prefix: list[tuple[int, ...]] = field(default_factory=list)
    next_input: RowInput | None = None
    turn_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    trace: list[PerceptionStep] = field(default_factory=list)
    pending_action: str | None = None
    pending_states: list[Tensor] = field(default_factory=list)
    turn_states: list[Tensor] = field(default_factory=list)
    control_states: list[Tensor] = field(default_factory=list)
    perceived_at: float | None = None
    complete: bool = False
    length: int = field(init=False)
    constraint: int = 0
    recording: bool = False
    inputs: list[RowInput] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)

    def add_input(self, row_input: RowInput) -> None:
        """Note that an input has become part of the conversation."""
        if self.recording:
            self.inputs.append(row_input)
        self.length += len(row_input.ids)

    def append(self, *tokens: int) -> None:
        """Add tokens to the turn."""
        self.turn_ids.extend(tokens)
        self.output_ids.extend(tokens)

    def __post_init__(self) -> None:
        self.length = len(self.sample.ids)

    @property
    def image(self) -> ImageRef | None:
        """The image that actions encode or crop."""
        return self.sample.record.image
