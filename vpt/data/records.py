"""Records: conversations as in the published VPT files, checked before anything is loaded.

    {"messages": [{"role": "user", "content": "<image>\\nWhat colour is the throat? ..."}, ...],
     "images": ["cub/0001.jpg"], "detection_images": ["cub/0001.jpg"], ...}

A placeholder `<image>` or `<TOKEN_image>` in a user's turn stands for the next entry of `images` or `TOKEN_images`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vpt.batch import TOWER
from vpt.errors import DataError

SYSTEM_PROMPT = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
PLACEHOLDER = re.compile(r"<(?:([a-z0-9]+)_)?image>")
_CROP = re.compile(r"^(?P<path>.*)_(?P<box>\d+,\d+,\d+,\d+)$")

Pixels = tuple[int, int, int, int]


@dataclass(frozen=True)
class ImageRef:
    """A path below the data root, and a crop (x0, y0, x1, y1) in pixels or None for the whole image.

    `turn`, 0 to 7, is one of the ways to flip and rotate a square, done before the crop (augmentation; 0 leaves it).
    """

    path: str
    crop: Pixels | None = None
    turn: int = 0

    @classmethod
    def parse(cls, text: str) -> "ImageRef":
        """`a.jpg` or `a.jpg_x0,y0,x1,y1`."""
        match = _CROP.match(text)
        if match is None:
            return cls(text)
        x0, y0, x1, y1 = (int(number) for number in match["box"].split(","))
        return cls(match["path"], (x0, y0, x1, y1))

    def __str__(self) -> str:
        crop = "" if self.crop is None else f"_{','.join(map(str, self.crop))}"
        return f"{self.path}{crop}" + (f" turned {self.turn}" if self.turn else "")


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """A conversation and its images.

    Attributes:
        messages: turns, a system prompt first.
        images: source (`image` or a re-encoder's name) -> the images its placeholders stand for, in order.
        where: what to call it in messages (`FILE:LINE`).
        question, answer, question_type: for evaluation; the answer is the last assistant turn.
        box: the evidence (x0, y0, x1, y1) in pixels of the first image, where it is known.
        accepted: every answer that counts as right, `answer` or not; empty where that is the only one.
    """

    messages: tuple[Message, ...]
    images: Mapping[str, tuple[ImageRef, ...]]
    where: str
    question: str = ""
    answer: str = ""
    question_type: str = "all"
    box: Pixels | None = field(default=None)
    accepted: tuple[str, ...] = ()


REGION_PROMPT = "Identify the region that can help you answer the question, and then answer the question."
REENCODE_PROMPT = "Require additional perception features, and then answer the question."


def strip_prompts(text: str) -> str:
    """A question without the sentences that ask for perception."""
    for prompt in (REGION_PROMPT, REENCODE_PROMPT):
        text = text.replace(prompt, "")
    return text.rstrip()


def parse_record(raw: Any, *, where: str, encoder_tokens: Mapping[str, str]) -> Record:
    """Check one record and read it.

    Args:
        raw: the decoded JSON.
        where: file and line, for messages.
        encoder_tokens: the model's re-encoders -> how they are spelt (`dino` -> `detection`).

    Raises:
        DataError: with `where`, what is wrong and both counts where counts differ.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list) or not raw["messages"]:
        raise DataError(f"{where}: a record is an object with a non-empty list `messages`")
    messages = tuple(_message(item, f"{where}: message {number}") for number, item in enumerate(raw["messages"]))
    if messages[0].role != "system":
        messages = (Message("system", SYSTEM_PROMPT), *messages)
    turns = [message.role for message in messages[1:]]
    if turns[::2] != ["user"] * len(turns[::2]) or turns[1::2] != ["assistant"] * len(turns[1::2]):
        raise DataError(f"{where}: after the system prompt, user and assistant take turns; found {', '.join(turns)}")
    if turns[-1] != "assistant":
        raise DataError(f"{where}: the last turn must be the assistant's answer")
    images = _images(raw, messages, where, encoder_tokens)
    question = strip_prompts(PLACEHOLDER.sub("", messages[1].content)).strip()
    return Record(
        messages, images, where, question, messages[-1].content, str(raw.get("dataset", "all")),
        box=_box(raw.get("box"), where), accepted=_accepted(raw.get("answers"), where),
    )  # fmt: skip


def _box(box: Any, where: str) -> Pixels | None:
    if box is None:
        return None
    numbers = isinstance(box, list) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)
    if not numbers or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        raise DataError(f"{where}: `box` must be [x0, y0, x1, y1] in pixels, x0 < x1 and y0 < y1, not {box}")
    return tuple(box)  # type: ignore[return-value]  # of length 4


def _accepted(answers: Any, where: str) -> tuple[str, ...]:
    if answers is None:
        return ()
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{where}: `answers` must be a list of texts, every answer that counts as right")
    return tuple(answers)


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict) or item.get("role") not in ROLES or not isinstance(item.get("content"), str):
        raise DataError(f"{where}: needs a `role` out of {', '.join(ROLES)} and a `content` that is text")
    return Message(item["role"], item["content"])


def _images(
    raw: dict[str, Any], messages: Iterable[Message], where: str, encoder_tokens: Mapping[str, str]
) -> dict[str, tuple[ImageRef, ...]]:
    """The lists of images by source, once placeholders and lists agree in number."""
    names = {token: name for name, token in encoder_tokens.items()}
    counts: dict[str, int] = {}
    for message in messages:
        for token in PLACEHOLDER.findall(message.content) if message.role == "user" else ():
            counts[token] = counts.get(token, 0) + 1
    lists = {
        key.removesuffix("images").rstrip("_"): value
        for key, value in raw.items()
        if key == "images" or key.endswith("_images")
    }
    images = {}
    for token in sorted({*counts, *lists}):
        placeholder, key = (f"<{token}_image>", f"{token}_images") if token else ("<image>", "images")
        paths = lists.get(token) or []
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise DataError(f"{where}: `{key}` must be a list of paths")
        if counts.get(token, 0) != len(paths):
            raise DataError(
                f"{where}: {counts.get(token, 0)} placeholder(s) {placeholder} but {len(paths)} entries in `{key}`"
            )
        if not paths:
            continue
        if token and token not in names:
            raise DataError(
                f"{where}: {placeholder} needs a re-encoder spelt {token!r}, this model has "
                f"{sorted(names) or 'none'}; add it with encoder=[...], or drop such turns with data.perception=false"
            )
        images[names[token] if token else TOWER] = tuple(_reference(path, where) for path in paths)
    return images


def _reference(text: str, where: str) -> ImageRef:
    reference = ImageRef.parse(text)
    path = PurePosixPath(reference.path)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: image path {reference.path!r} leaves data.root; give paths below data.root")
    return reference
