"""Records: conversations as in the published VPT files, checked before anything is loaded.

    {"messages": [{"role": "user", "content": "<image>\\nWhat colour is the throat? ..."}, ...],
     "images": ["cub/0001.jpg"], "detection_images": ["cub/0001.jpg"], ...}

A placeholder `<image>`, `<TOKEN_image>` or `<video>` in a user's turn stands for the next entry of `images`,
`TOKEN_images` or `videos`; a video is {"frames": [paths], "fps": number}, or a path to a video file.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vpt.data.references import ImageRef, Pixels, Reference, VideoRef, check_text
from vpt.errors import DataError, shortened
from vpt.perception.batch import VISION_TOWER

PUBLISHED = ("detection", "clip", "seg")  # re-encoders of the published files, which have these lists even if empty
SYSTEM_PROMPT = "You are a helpful assistant."  # Qwen2-VL's and Qwen2.5-VL's, in conversations that have none
DEFAULT_SYSTEM = ""  # the content of a system turn that the base model's own prompt, if it has one, takes the place of
ROLES = ("system", "user", "assistant")
VIDEO = "<video>"
MAX_SIDE = 1 << 31  # pixels along a side
# The group is the spelling of a re-encoder; images and videos that Qwen's tower sees have none.
PLACEHOLDER = re.compile(r"<(?:(?:([a-z0-9]+)_)?image|video)>")

Images = dict[str, tuple[Reference, ...]]  # source -> what its placeholders stand for, in order


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
        images: source (`image` or a re-encoder's name) -> what its placeholders stand for, in order. Videos are among
            the images of Qwen's own tower.
        where: what to call it in messages (`FILE:LINE`).
        question, answer, question_type: for evaluation; the answer is the last assistant turn.
        box: the evidence (x0, y0, x1, y1) in pixels of the first image, where it is known.
        accepted: every answer that counts as right, `answer` or not; empty where that is the only one.
    """

    messages: tuple[Message, ...]
    images: Mapping[str, tuple[Reference, ...]]
    where: str
    question: str = ""
    answer: str = ""
    question_type: str = "all"
    box: Pixels | None = field(default=None)
    accepted: tuple[str, ...] = ()

    @property
    def image(self) -> ImageRef | None:
        """The image that actions encode or crop: the first of the conversation; of a video, a frame."""
        first = next(iter(self.images.get(VISION_TOWER, ())), None)
        return first.frame if first else None


REGION_PROMPT = "Identify the region that can help you answer the question, and then answer the question."
REENCODE_PROMPT = "Require additional perception features, and then answer the question."


def strip_prompts(text: str) -> str:
    """A question without the sentences that ask for perception."""
    for prompt in (REGION_PROMPT, REENCODE_PROMPT):
        text = text.replace(prompt, "")
    return text.rstrip()


def with_prompt(question: str, sentence: str) -> str:
    """A question followed by the sentence that asks for perception, in place of one that it has; as it is without."""
    return f"{strip_prompts(question)} {sentence}" if sentence else question.rstrip()


def parse_record(raw: Any, *, where: str, encoder_tokens: Mapping[str, str]) -> Record:
    """Check one record and read it.

    Args:
        raw: the decoded JSON.
        where: file and line, for messages.
        encoder_tokens: the model's re-encoders -> how they are spelt (`dino` -> `detection`).

    Raises:
        DataError: with `where`, what is wrong and both counts where counts differ.
    """
    check_shape(raw, where)
    messages = tuple(_message(item, f"{where}: message {number}") for number, item in enumerate(raw["messages"]))
    if messages[0].role != "system":
        messages = (Message("system", DEFAULT_SYSTEM), *messages)
    turns = [message.role for message in messages[1:]]
    if turns[::2] != ["user"] * len(turns[::2]) or turns[1::2] != ["assistant"] * len(turns[1::2]):
        raise DataError(f"{where}: after the system prompt, user and assistant take turns; found {', '.join(turns)}")
    if turns[-1:] != ["assistant"]:
        raise DataError(f"{where}: the last turn must be the assistant's answer")
    images = _with_size(_images(raw, messages, where, encoder_tokens), raw.get("image_size"), where)
    question = strip_prompts(PLACEHOLDER.sub("", messages[1].content)).strip()
    return Record(
        messages, images, where, question, messages[-1].content, str(raw.get("dataset") or "all"),
        box=_box(raw.get("box"), where), accepted=_accepted(raw.get("answers"), where),
    )  # fmt: skip


def check_shape(raw: Any, where: str) -> None:
    """Raise DataError where a decoded record has no turns, naming the keys that it should have."""
    if isinstance(raw, dict) and isinstance(raw.get("messages"), list) and raw["messages"]:
        return
    found = f"its keys are {shortened(', '.join(raw))}" if isinstance(raw, dict) else f"not {shortened(str(raw))}"
    if isinstance(raw, dict) and "conversations" in raw:
        found += "; what is `conversations` (`from`, `value`) there is `messages` (`role`, `content`) here"
    raise DataError(
        f"{where}: a record is an object with a non-empty list `messages` of turns (`role`, `content`), and lists "
        f"`images`, `TOKEN_images`; {found}"
    )


def _with_size(images: Images, size: Any, where: str) -> Images:
    """The images, those of the first image's file with the size that the record says this has."""
    if size is None or not images.get(VISION_TOWER):
        return images
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n < MAX_SIDE for n in size):
        raise DataError(f"{where}: `image_size` must be [width, height] of the first image, not {shortened(str(size))}")
    path = images[VISION_TOWER][0].frame.path

    def sized(reference: Reference) -> Reference:
        if isinstance(reference, VideoRef) or reference.path != path:
            return reference
        return replace(reference, size=(size[0], size[1]))

    return {source: tuple(map(sized, references)) for source, references in images.items()}


def _box(box: Any, where: str) -> Pixels | None:
    if box is None:
        return None
    numbers = isinstance(box, list) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)
    if not numbers or not (0 <= box[0] < box[2] < MAX_SIDE and 0 <= box[1] < box[3] < MAX_SIDE):
        raise DataError(
            f"{where}: `box` must be [x0, y0, x1, y1] in pixels, x0 < x1 and y0 < y1, not {shortened(str(box))}"
        )
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
    check_text(item["content"], where)
    return Message(item["role"], item["content"])


def _images(raw: dict[str, Any], messages: Iterable[Message], where: str, encoder_tokens: Mapping[str, str]) -> Images:
    """The references that placeholders of each source stand for, once placeholders and lists agree in number."""
    users = "\n".join(message.content for message in messages if message.role == "user")
    placeholders = list(PLACEHOLDER.finditer(users))
    counts = Counter(match[0] for match in placeholders)
    known = {"images", "videos", *(f"{token}_images" for token in (*PUBLISHED, *encoder_tokens.values()))}
    listed = {f"<{key.removesuffix('s')}>" for key in known & raw.keys()}
    entries = {name: _entries(raw, name, where, counts[name]) for name in sorted(listed | counts.keys())}
    sources = {token: name for name, token in encoder_tokens.items()} | {"": VISION_TOWER}
    images: Images = {}
    for match in placeholders:
        token = match[1] or ""
        if token not in sources:
            raise DataError(
                f"{where}: {match[0]} needs a re-encoder spelt {token!r}, this model has "
                f"{sorted(encoder_tokens.values()) or 'none'}; add it with encoder=[...], or drop such turns with "
                "data.perception=false"
            )
        images[sources[token]] = (*images.get(sources[token], ()), entries[match[0]].pop(0))
    return images


def _entries(raw: dict[str, Any], placeholder: str, where: str, count: int) -> list[Reference]:
    """The list that belongs to a placeholder, read: `count` references."""
    key = f"{placeholder[1:-1]}s"
    values = raw.get(key) or []
    if not isinstance(values, list):
        raise DataError(f"{where}: `{key}` must be a list, not {type(values).__name__}")
    if count != len(values):
        raise DataError(f"{where}: {count} placeholder(s) {placeholder} but {len(values)} entries in `{key}`")
    if placeholder == VIDEO:
        return [VideoRef.read(value, f"{where}: video {number}") for number, value in enumerate(values)]
    re_encoded = placeholder != "<image>"
    if not all(isinstance(value, str) or (re_encoded and isinstance(value, dict)) for value in values):
        raise DataError(f"{where}: `{key}` must be a list of paths")
    return [
        ImageRef.read(value, where) if isinstance(value, str) else VideoRef.read(value, f"{where}: `{key}`")
        for value in values
    ]
