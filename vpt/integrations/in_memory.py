"""Answering questions whose images are in memory or in files anywhere, many at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from vpt.checkpoint.load import load_pretrained
from vpt.config.validate import generation_settings
from vpt.data.build import media_store
from vpt.data.images import MediaStore, reading
from vpt.data.records import DEFAULT_SYSTEM, ImageRef, Message, Record, with_prompt
from vpt.data.references import check_no_address
from vpt.data.stored_files import StoredFile
from vpt.errors import DataError
from vpt.generation.generator import Generator
from vpt.generation.pipeline import action_prompt_text
from vpt.models.build import ModelBundle
from vpt.perception.batch import VISION_TOWER

IMAGE = "<image>"
_numbers = count()  # an image's name, new for each, because prepared images are kept by name


Picture = Image.Image | str | Path  # an image in memory, of any mode, or its file


@dataclass(frozen=True)
class InMemoryMedia(MediaStore):
    """Images in memory, or in files anywhere, where those of a data set lie in one folder."""

    images: Mapping[str, Picture] = field(default_factory=dict)

    def _whole(self, reference: ImageRef, where: str) -> Image.Image:
        image = self.images[reference.path]
        if not isinstance(image, Image.Image):
            check_no_address(str(image), where)
            return self.open(StoredFile(Path(image)), where=where)
        with reading(reference.path, where):
            return self.decode(image, f"{where}: image {reference.path}")


class Responder:
    """A checkpoint that answers questions about images in memory.

    Args:
        checkpoint: whatever `vpt.load` takes.
        device: `auto`, `cpu` or `cuda`.
        action_prompt: whether the sentence that asked for perception in training follows each question; by default as
            the model was trained.
        max_side: longer side of the first look at an image, in pixels; by default as trained, as is `max_length`.
        max_length: tokens that a prompt may have.
    """

    def __init__(
        self, checkpoint: str | Path, *, device: str = "auto", action_prompt: bool | None = None,
        max_side: int | None = None, max_length: int | None = None,
    ) -> None:  # fmt: skip
        self.bundle: ModelBundle = load_pretrained(checkpoint, device=device)
        self.action_prompt = action_prompt
        limits, processor = self.bundle.config.data.image, self.bundle.processor
        limits.max_side, processor.max_length = max_side or limits.max_side, max_length or processor.max_length

    def respond(self, questions: Sequence[tuple[Sequence[Picture], str]], **settings: Any) -> list[str]:
        """Answer questions together, each (images, text); `<image>` in a text says where its images stand.

        Args:
            questions: the images of each come first where its text does not name as many as there are.
            settings: keys of `generation`; the rest is as trained.

        Raises:
            ConfigError: for a setting that does not exist.
            DataError: for a question that is too long.
        """
        generation = generation_settings(self.bundle.config, settings)
        sentence = action_prompt_text(self.bundle.config, generation, action_prompt=self.action_prompt)
        records, media = zip(*(self._record(images, text, sentence) for images, text in questions))
        samples = [self.bundle.processor.encode_prompt(record, store) for record, store in zip(records, media)]
        generator = Generator.from_config(self.bundle.model, self.bundle.processor, self.bundle.tokenizer, generation)
        return [answer.text for answer in generator.generate(samples, media)]

    def _record(self, images: Sequence[Picture], text: str, sentence: str) -> tuple[Record, InMemoryMedia]:
        references = [ImageRef(f"number {next(_numbers)}") for _ in images]
        if text.count(IMAGE) != len(images):
            text = IMAGE * len(images) + "\n" + text.replace(IMAGE, "").strip()
        if not text.replace(IMAGE, "").strip():
            raise DataError("a question is empty")
        limits = media_store(Path(), self.bundle.config.data)
        kept = {reference.path: image for reference, image in zip(references, images)}
        store = InMemoryMedia(**vars(limits), images=kept)
        messages = (Message("system", DEFAULT_SYSTEM), Message("user", with_prompt(text, sentence)))
        return Record(messages, {VISION_TOWER: tuple(references)} if references else {}, "question"), store
