"""Records without perception: the same-data baselines of the paper's tables train on them.

`data.perception=false` removes every turn that asks for perception and every turn that shows what was asked for.
`data.token_matched_images=true` puts the whole image in its place, once more through Qwen's own tower, behind the
question, in as many tokens as the perception had (as nearly as the patch grid allows). Questions, answers and their
order stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vpt.data.records import Message, Record, strip_prompts
from vpt.data.references import ImageRef, Reference
from vpt.data.turns import Turn, perception_turns, read_turns, write_turns
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
    return replace(record, messages=tuple(messages))


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
    asking = set(perception_turns(turns))
    kept: list[Turn] = []
    for number, turn in enumerate(turns):
        if number in asking:
            continue
        if number - 1 in asking:
            if token_matched_images:
                kept[-1] = _append_images(kept[-1], [_token_matched(record, *image) for image in turn.images])
        elif any(source != VISION_TOWER for source, _ in turn.images):
            raise DataError(
                f"{record.where}: message {number} shows a re-encoded image beside text, or nothing asked for it; "
                "data.perception=false cannot remove it"
            )
        else:
            kept.append(turn)
    return write_turns(record, kept)


def _token_matched(record: Record, source: str, like: Reference) -> TokenMatchedImage:
    whole = record.image or like.frame
    return TokenMatchedImage(whole.path, whole.crop, whole.transpose, whole.size, source=source, like=like)


def _append_images(turn: Turn, images: list[TokenMatchedImage]) -> Turn:
    """A user's turn that ends in further images."""
    content = turn.message.content + "\n<image>" * len(images)
    return Turn(Message(turn.message.role, content), (*turn.images, *((VISION_TOWER, image) for image in images)))
