"""Records without perception: the same-data baselines of the paper's tables train on them.

`data.perception=false` removes every turn that asks for perception and every turn that shows what was asked for.
`data.token_matched_images=true` puts the whole image in its place, once more through Qwen's own tower, behind the
question, in as many tokens as the perception had (as nearly as the patch grid allows). Questions, answers and their
order stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vpt.data.records import PLACEHOLDER, Message, Record, strip_prompts
from vpt.data.references import ImageRef, Reference
from vpt.data.turns import Turn, check_placeholders, read_turns, remove_spans, requests_in, shown_images, write_turns
from vpt.errors import DataError
from vpt.perception.batch import VISION_TOWER


@dataclass(frozen=True, kw_only=True)
class TokenMatchedImage(ImageRef):
    """An image to be seen in as many tokens as `like` takes through `source`."""

    source: str
    like: Reference

    def __str__(self) -> str:
        return f"{super().__str__()} in as many tokens as {self.source} {self.like}"


def without_prompts(record: Record) -> Record:
    """The record without the sentences that ask for perception (Free Choice)."""
    messages = (
        replace(message, content=strip_prompts(message.content)) if message.role == "user" else message
        for message in record.messages
    )
    return check_placeholders(replace(record, messages=tuple(messages)))


def without_perception(
    record: Record, encoder_tokens: Mapping[str, str], *, token_matched_images: bool = False
) -> Record:
    """The questions and answers of a record with no perception in between.

    Args:
        record: any conversation; turns that have nothing to do with perception stay.
        encoder_tokens: the re-encoders that it may name, and how they are spelt.
        token_matched_images: put a `TokenMatchedImage` in place of each perception.

    Raises:
        DataError: where what was asked for stands beside text, so that the turn cannot go.
    """
    turns = read_turns(without_prompts(record), encoder_tokens)
    kept: list[Turn] = []
    shown: list[int] = []  # numbers of this turn's images that the turn before requested
    for number, turn in enumerate(turns):
        if any(source != VISION_TOWER for n, (source, _) in enumerate(turn.images) if n not in shown):
            raise DataError(
                f"{record.where}: message {number} shows a re-encoded image that nothing asked for; "
                "data.perception=false cannot remove it"
            )
        left = _without_images(record, turn, shown, token_matched=token_matched_images) if shown else turn
        requests = requests_in(turns, number)
        shown = shown_images(requests, turns[number + 1]) if requests and number + 1 < len(turns) else []
        if shown:
            words = remove_spans(turn.message.content, [(request.start, request.stop) for request in requests])
            left = Turn(Message("assistant", words.strip()))
            if requests_in([left], 0):
                raise DataError(
                    f"{record.where}: without what message {number} requests, its words spell another request; mend "
                    "the text around it"
                )
        if left is turn or left.message.content:
            same_role = kept and kept[-1].message.role == turn.message.role
            kept.append(_joined(kept.pop(), left) if same_role else left)
    return write_turns(record, kept)


def _without_images(record: Record, turn: Turn, shown: Sequence[int], *, token_matched: bool) -> Turn:
    """A user's turn without the images of these numbers, or with a `TokenMatchedImage` in place of each."""
    numbers, images = iter(range(len(turn.images))), list(turn.images)
    instead = "<image>" if token_matched else ""
    content = PLACEHOLDER.sub(lambda match: instead if next(numbers) in shown else match[0], turn.message.content)
    for number in sorted(shown, reverse=True):
        images[number : number + 1] = [(VISION_TOWER, _token_matched(record, *images[number]))] * token_matched
    return Turn(Message("user", content.strip()), tuple(images))


def _token_matched(record: Record, source: str, like: Reference) -> TokenMatchedImage:
    whole = record.image or like.frame
    return TokenMatchedImage(whole.path, whole.crop, whole.transpose, whole.size, source=source, like=like)


def _joined(first: Turn, second: Turn) -> Turn:
    """Two turns of one role as one."""
    role, joint = first.message.role, " " if first.message.role == "assistant" else "\n"
    return Turn(Message(role, first.message.content + joint + second.message.content), first.images + second.images)
