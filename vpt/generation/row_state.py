"""A row while it answers: what it may do, what it has said and perceived, what it feeds next."""

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
    """What an answer may do, and how far it may go.

    Attributes:
        max_new_tokens: tokens the model may say in all its turns, forced control tokens included.
        max_actions: times a row may ask for perception; after them the tokens that ask are forbidden.
        crop_margin: cells by which a selected region is widened on each side.
        action: `free`; `none` forbids perception; `region` or a re-encoder's name makes every answer about an image
            begin with that action, and forbids the others.
        stop: tokens that end an answer besides `<|im_end|>` and `<|endoftext|>`, wherever they are said.
        released: decode as the released code did, for comparison: past `<|im_end|>`, never perceiving, each control
            token's embedding the state just before it.
    """

    max_new_tokens: int = 64
    max_actions: int = 3
    crop_margin: int = 0
    action: str = FREE
    stop: tuple[int, ...] = ()
    upstream: bool = False


DONE, REPAIRED, IGNORED = "done", "repaired", "ignored"


@dataclass
class PerceptionStep:
    """One request for perception and what came of it.

    Attributes:
        kind: `region` or a re-encoder.
        said: the tokens that asked, as text.
        status: `seen`; `mended`, seen though the region was malformed; `ignored` (`vpt.perception.requests` has the rule).
        box: what a region shows, x0, y0, x1, y1 in pixels of the image.
        state_norm: mean norm of the control states.
        visual_tokens: how many tokens the conversation grew by.
        seconds: from the end of the turn that asked to the first token after what was seen, the batch's wait included.
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
    """What a row said: the text of its last turn, the ids it produced, and how it perceived.

    `states` holds the control states, [s, D], of each re-encoding that was seen. `complete` is False where
    `max_new_tokens` came before the end. `confidence` is the probability that the model gave to its last turn, its end
    included, before temperature and the like.
    """

    text: str
    ids: list[int]
    trace: list[PerceptionStep]
    complete: bool
    states: list[Tensor] = field(default_factory=list)
    confidence: float = 1.0


@dataclass
class RowState:
    """One row: where it is, what it has said, what it feeds next (None: it has ended).

    Attributes:
        dice: what its tokens are drawn from.
        may_ask: how often it may still ask for perception.
        has_asked: whether this turn has.
        opening: what its next tokens must be among, one entry for each.
        said, ids: tokens of this turn, and of all turns.
        log_probability: of this turn.
        asking: the re-encoder whose control states are being read.
        steering: control states of this turn's last action.
        states: control states of every re-encoding that was seen.
        looked: when the last turn that was shown something ended, until it goes on.
    """

    sample: Sample
    media: MediaStore
    rng: np.random.Generator
    position: int
    actions_left: int = 0
    requested: bool = False
    forced_prefix: list[tuple[int, ...]] = field(default_factory=list)
    next_input: RowInput | None = None
    turn_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    trace: list[PerceptionStep] = field(default_factory=list)
    pending_action: str | None = None
    turn_states: list[Tensor] = field(default_factory=list)
    control_states: list[Tensor] = field(default_factory=list)
    perceived_at: float | None = None
    complete: bool = False

    def append(self, *tokens: int) -> None:
        """Take tokens into the turn."""
        self.turn_ids.extend(tokens)
        self.output_ids.extend(tokens)

    @property
    def image(self) -> ImageRef | None:
        """The image that actions refer to."""
        return self.sample.record.image
