"""A record as turns: what each shows, and what an assistant requests, for rewriting conversations."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vpt.data.records import PLACEHOLDER, Message, Record
from vpt.data.references import ImageRef, Reference
from vpt.errors import DataError
from vpt.perception.batch import VISION_TOWER
from vpt.perception.regions import Region
from vpt.perception.tokens import REGION_END, REGION_START

# Whole requests, well-formed or not; the group is the spelling of a re-encoder.
_REQUEST = re.compile(
    rf"{re.escape(REGION_START)}(?:<\|[xy]_\d+\|>)*(?:{re.escape(REGION_END)})?"
    r"|<\|([a-z0-9]+)_action_start\|>(?:<\|\1_action\|>)*(?:<\|\1_action_end\|>)?"
)


@dataclass(frozen=True)
class Turn:
    """A message and what its placeholders stand for: (source, reference), in order."""

    message: Message
    images: tuple[tuple[str, Reference], ...] = ()

    @property
    def text(self) -> str:
        """The message without placeholders."""
        return PLACEHOLDER.sub("", self.message.content).strip()

    def crops(self, *, beside_text: bool) -> list[int]:
        """Numbers of the images of the vision tower that may show regions: `beside_text`, those that are crops."""
        tower = [(number, shown) for number, (source, shown) in enumerate(self.images) if source == VISION_TOWER]
        return [n for n, shown in tower if not beside_text or (isinstance(shown, ImageRef) and shown.crop)]

    def with_image(self, number: int, image: Reference) -> "Turn":
        """The turn with another image of the same source in place of one."""
        images = list(self.images)
        images[number] = images[number][0], image
        return replace(self, images=tuple(images))


@dataclass(frozen=True)
class TurnRequest:
    """A request for perception in an assistant's turn.

    Attributes:
        start, stop: where it stands in the message.
        region: its cells; None for a re-encoding, and for a region that cannot be read.
        image: which image of the next turn shows it, if any does.
    """

    start: int
    stop: int
    region: Region | None
    image: int | None


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
    """`record` with other turns. Raises DataError where they hold other placeholders than images."""
    images: dict[str, tuple[Reference, ...]] = {}
    for turn in turns:
        for source, reference in turn.images:
            images[source] = (*images.get(source, ()), reference)
    return check_placeholders(replace(record, messages=tuple(turn.message for turn in turns), images=images))


def check_placeholders(record: Record) -> Record:
    """A record whose text has been rewritten. Raises DataError where what was cut out has left another one."""
    users = [message.content for message in record.messages if message.role == "user"]
    found = [match[0] for content in users for match in PLACEHOLDER.finditer(content)]
    if len(found) != sum(map(len, record.images.values())):
        raise DataError(
            f"{record.where}: without its requests for perception, its text spells one of {', '.join(found)} that no "
            "image belongs to; mend the text around placeholders"
        )
    return record


def requests_in(turns: Sequence[Turn], number: int) -> list[TurnRequest]:
    """What turn `number` requests, in order, and which images of the next turn show it.

    Requests and images of one kind belong together in order. `[x0, y0, x1, y1]` is a region where the next turn shows
    as many images: crops, unless both turns hold nothing else.
    """
    turn, answer = turns[number], turns[number + 1] if number + 1 < len(turns) else Turn(Message("user", ""))
    if turn.message.role != "assistant":
        return []
    content = turn.message.content
    spans = [(match.span(), match[1] or "") for match in _REQUEST.finditer(content)]
    crops = answer.crops(beside_text=bool(answer.text))
    regions = {match.span(): region for match, region in Region.find(content)}
    if not regions and (numeric := Region.find(content, numbers=True)):
        words = remove_spans(content, [match.span() for match, _ in numeric])
        crops = answer.crops(beside_text=bool(answer.text or words.strip()))
        if len(crops) == len(numeric):
            regions = {match.span(): region for match, region in numeric}
            spans = sorted([*spans, *((span, "") for span in regions)])
    shown = [match[1] or "" for match in PLACEHOLDER.finditer(answer.message.content)]
    left = {token: [n for n, other in enumerate(shown) if other == token] for token in shown} | {"": crops}
    return [
        TurnRequest(*span, regions.get(span), left[token].pop(0) if left.get(token) else None) for span, token in spans
    ]


def shown_images(requests: Sequence[TurnRequest], answer: Turn) -> list[int]:
    """Numbers of the images of `answer` that show what was requested: all where it holds nothing else."""
    if requests and answer.images and not answer.text:
        return list(range(len(answer.images)))
    return sorted(request.image for request in requests if request.image is not None)


def remove_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """`text` without ascending spans."""
    edges = zip([0, *(stop for _, stop in spans)], [*(start for start, _ in spans), len(text)], strict=True)
    return "".join(text[start:stop] for start, stop in edges)
