"""From the messages of a request to a prompt: images decoded within limits, nothing fetched, nothing opened."""

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from PIL import Image
from transformers import PreTrainedTokenizerBase

from vpt.config.schema import TrainConfig
from vpt.data.build import media_store
from vpt.data.images import FORMATS, MediaStore
from vpt.data.records import DEFAULT_SYSTEM, PLACEHOLDER, ImageRef, Message, Record, with_prompt
from vpt.data.references import check_text
from vpt.errors import DataError
from vpt.perception.batch import VISION_TOWER
from vpt.serving.protocol import ApiError, ChatMessage, ImagePart, TextPart

DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)
WHERE, IMAGE = "the question", "<image>"


@dataclass(frozen=True)
class PromptReader:
    """Reads the messages of requests.

    Attributes:
        config: of the trained model.
        special: matches every token of the chat format and of perception, none of which a text may hold.
        max_images, max_pixels: what a request may have in all.
        fetch: the bytes at a URL; None: no URL is followed.
    """

    config: TrainConfig
    special: re.Pattern[str]
    max_images: int
    max_pixels: int
    fetch: Callable[[str], bytes] | None = None

    @staticmethod
    def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
        """A pattern for all tokens that were added to a tokenizer's vocabulary."""
        return re.compile("|".join(re.escape(token) for token in tokenizer.get_added_vocab()))

    def read(self, messages: list[ChatMessage], sentence: str) -> tuple[Record, MediaStore]:
        """The conversation as a record, and its images; `sentence` follows the last question.

        Raises ApiError, or DataError for what would be wrong in a record, too.
        """
        turns = [message for message in messages if message.role not in ("system", "developer")]
        prompts = messages[: len(messages) - len(turns)]
        roles = [turn.role for turn in turns]
        if turns != messages[len(prompts) :] or len(prompts) > 1 or not turns or len(turns) % 2 == 0:
            raise ApiError(400, "a system message may come first, the last one is the user's", param="messages")
        if roles[::2] != ["user"] * len(roles[::2]) or roles[1::2] != ["assistant"] * len(roles[1::2]):
            raise ApiError(400, f"user and assistant must take turns, not {', '.join(roles[:9])}", param="messages")
        images: dict[str, Image.Image] = {}
        references: list[ImageRef] = []
        written = [Message("system", self._text(prompts[0], 0) if prompts else DEFAULT_SYSTEM)]
        for number, turn in enumerate(turns, start=len(prompts)):
            content = self._text(turn, number)
            if turn.role == "user":
                for part in turn.content if isinstance(turn.content, list) else ():
                    if isinstance(part, ImagePart):
                        references.append(self._image(part, images, len(references), f"messages.{number}.content"))
            written.append(Message(turn.role, content))
        question = PLACEHOLDER.sub("", written[-1].content).strip()
        if not question:
            raise ApiError(400, "the question is empty", param="messages")
        written[-1] = Message("user", with_prompt(written[-1].content, sentence))
        sources = {VISION_TOWER: tuple(references)} if references else {}
        media = replace(media_store(Path(), self.config.data), render=images.__getitem__)
        return Record(tuple(written), sources, WHERE, question), media

    def _text(self, message: ChatMessage, number: int) -> str:
        """A message with a placeholder for each image: they come first, as in training, unless texts surround them."""
        param = f"messages.{number}.content"
        parts = message.content if isinstance(message.content, list) else [TextPart(type="text", text=message.content)]
        if message.role == "assistant":  # what it said may hold tokens of requests that were ignored
            parts = [
                TextPart(type="text", text=PLACEHOLDER.sub("", self.special.sub("", part.text)))
                if isinstance(part, TextPart) else part
                for part in parts
            ]  # fmt: skip
        kinds = [isinstance(part, ImagePart) for part in parts]
        if any(kinds) and message.role != "user":
            raise ApiError(400, f"{param}: images belong into a user's message", param=param)
        if any(kinds):  # their places may be marked in the text, as other evaluation programs do
            text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
            if text.count(IMAGE) == sum(kinds):
                self._checked(text.replace(IMAGE, ""), param)
                return text.strip()
            parts = [_unmarked(part) for part in parts]
        if sum(a != b for a, b in pairwise(kinds)) <= 1:
            parts = [part for _, part in sorted(zip(kinds, parts), key=lambda pair: not pair[0])]
        texts = ["" if isinstance(part, ImagePart) else self._checked(part.text, param).strip() for part in parts]
        pieces = []
        for (part, text), following in zip(zip(parts, texts), [*texts[1:], ""]):
            pieces.append((IMAGE if isinstance(part, ImagePart) else text) + "\n" * bool(text or following))
        return "".join(pieces).strip()

    def _checked(self, text: str, param: str) -> str:
        """A text without tokens or placeholders of the model's own."""
        check_text(text, param)
        if match := self.special.search(text) or PLACEHOLDER.search(text):
            raise ApiError(400, f"{param} holds {match[0]}, which is a token of the model; leave it out", param=param)
        return text

    def _image(self, part: ImagePart, images: dict[str, Image.Image], number: int, param: str) -> ImageRef:
        """Decode an image, once however often it is shown, under a name that tells its bytes."""
        if number >= self.max_images:
            raise ApiError(400, f"{param}: more than {self.max_images} images", param=param)
        data = self._bytes(part.image_url.url, param)
        name = hashlib.sha256(data).hexdigest()
        if name not in images:
            media = media_store(Path(), self.config.data)
            left = self.max_pixels - sum(image.width * image.height for image in images.values())
            images[name] = decode_image(data, media, left, where=f"{param}: image {number}")
        return ImageRef(name)

    def _bytes(self, url: str, param: str) -> bytes:
        match = DATA_URL.match(url[:80])
        if match is None:
            if self.fetch is not None and url[:8].lower() == "https://":
                return self.fetch(url)
            raise ApiError(400, f"{param}: images are data:image/...;base64, URLs; nothing is fetched", param=param)
        try:
            return base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(400, f"{param}: the image is no valid base64", param=param) from None


def _unmarked(part: TextPart | ImagePart) -> TextPart | ImagePart:
    return part if isinstance(part, ImagePart) else TextPart(type="text", text=part.text.replace(IMAGE, ""))


def decode_image(data: bytes, media: MediaStore, max_pixels: int, *, where: str) -> Image.Image:
    """RGB pixels, as `media` decodes files, of the formats that files may have. Raises DataError for all else."""
    try:
        with Image.open(io.BytesIO(data), formats=[*FORMATS]) as image:
            if not 0 < image.width * image.height <= max_pixels:
                size = f"{image.width}x{image.height} pixels"
                raise DataError(f"{where} has {size}; the images of a request may have {max_pixels} more")
            return media.decode(image, where)
    except DataError:
        raise
    except Exception:  # decoders of broken files raise whatever comes to them
        raise DataError(f"{where} cannot be read; send {', '.join(sorted(FORMATS))}") from None
