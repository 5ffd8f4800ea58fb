"""A row while it answers: what it may do, what it has said and perceived, what it feeds next."""

from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from vpt.batch import TOWER
from vpt.data.images import ImageFolder
from vpt.data.samples import Sample
from vpt.feeds import Feed


@dataclass(frozen=True)
class Limits:
    """How far an answer may go.

    Attributes:
        max_new_tokens: tokens the model may say in all its turns, forced control tokens included.
        max_actions: perceptions a row may ask for; after them the tokens that ask are forbidden.
        crop_margin: cells by which a selected region is widened on each side.
        released: decode as the released code did, for comparison: past `<|im_end|>`, never perceiving, each control
            token's embedding the state just before it.
    """

    max_new_tokens: int = 64
    max_actions: int = 3
    crop_margin: int = 0
    released: bool = False


@dataclass
class Step:
    """One act of perception: its kind, and the box in pixels for a region, else the mean norm of the control states."""

    kind: str
    box: tuple[int, int, int, int] | None = None
    state_norm: float | None = None
    visual_tokens: int = 0


@dataclass
class Answer:
    """What a row said: the text of its last turn, the ids it produced, and how it perceived.

    `complete` is False where `max_new_tokens` came before the end.
    """

    text: str
    ids: list[int]
    trace: list[Step]
    complete: bool


@dataclass
class Speaker:
    """One row: where it is, what it has said, what it feeds next (None: it has ended)."""

    sample: Sample
    folder: ImageFolder
    position: int
    feed: Feed | None = None
    said: list[int] = field(default_factory=list)  # this turn
    ids: list[int] = field(default_factory=list)  # all turns
    trace: list[Step] = field(default_factory=list)
    asking: str | None = None  # the re-encoder whose control states are being read
    states: list[Tensor] = field(default_factory=list)  # of this turn's action
    complete: bool = False

    def say(self, *tokens: int) -> None:
        """Take tokens into the turn."""
        self.said.extend(tokens)
        self.ids.extend(tokens)

    def image(self) -> Image.Image | None:
        """The image that actions refer to, at full resolution: the first of the conversation."""
        references = self.sample.record.images.get(TOWER)
        return self.folder.open(references[0], where=self.sample.record.where) if references else None
