"""A record as turns, each with what it images: for rewriting conversations."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vpt.data.records import PLACEHOLDER, Message, Record
from vpt.data.references import Reference
from vpt.perception.batch import VISION_TOWER
from vpt.perception.regions import Region
from vpt.perception.tokens import REGION_START

_ASKS = re.compile(re.escape(REGION_START) + r"|<\|[a-z0-9]+_action_start\|>")


@dataclass(frozen=True)
class Turn:
    """A message and what its placeholders stand for: (source, reference), in order."""

    message: Message
    images: tuple[tuple[str, Reference], ...] = ()

    @property
    def text(self) -> str:
        """The message without placeholders."""
        return PLACEHOLDER.sub("", self.message.content).strip()

    def region(self) -> Region | None:
        """The region that an assistant names, by tokens or by numbers."""
        if self.message.role != "assistant":
            return None
        return Region.from_text(self.message.content) or Region.from_numbers(self.message.content)

    def requests_perception(self) -> bool:
        """Whether an assistant asks for perception."""
        return self.message.role == "assistant" and bool(_ASKS.search(self.message.content) or self.region())


def read_turns(record: Record, encoder_tokens: Mapping[str, str]) -> list[Turn]:
    """The turns of a record; `encoder_tokens` are the re-encoders that it may name, and how they are spelt."""
    sources = {token: name for name, token in encoder_tokens.items()} | {"": VISION_TOWER}
    counts: Counter[str] = Counter()
    turns = []
    for message in record.messages:
        images = []
        for match in PLACEHOLDER.finditer(message.content) if message.role == "user" else ():
            source = sources[match[1] or ""]
            images.append((source, record.images[source][counts[source]]))
            counts[source] += 1
        turns.append(Turn(message, tuple(images)))
    return turns


def write_turns(record: Record, turns: Sequence[Turn]) -> Record:
    """`record` with other turns."""
    images: dict[str, tuple[Reference, ...]] = {}
    for turn in turns:
        for source, reference in turn.images:
            images[source] = (*images.get(source, ()), reference)
    return replace(record, messages=tuple(turn.message for turn in turns), images=images)


def perception_turns(turns: Sequence[Turn]) -> list[int]:
    """Numbers of the turns that ask for perception and are answered by a turn that only images."""
    return [
        number
        for number, (turn, answer) in enumerate(pairwise(turns))
        if turn.requests_perception() and answer.images and not answer.text
    ]
