"""One question about one image: `vpt.load(FOLDER).ask("a.png", "What colour is it?")`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from vpt.checkpoint.load import load_pretrained
from vpt.config.schema import GenerationConfig, TrainConfig
from vpt.config.validate import generation_settings
from vpt.data.build import media_store
from vpt.data.images import MediaStore
from vpt.data.records import (
    DEFAULT_SYSTEM,
    PLACEHOLDER,
    REENCODE_PROMPT,
    REGION_PROMPT,
    ImageRef,
    Message,
    Record,
    with_prompt,
)
from vpt.errors import ConfigError, DataError
from vpt.generation.generator import Generator
from vpt.generation.row_state import Answer, PerceptionStep, RowState
from vpt.generation.similarity_map import SimilarityMap, similarity_maps
from vpt.models.build import ModelBundle
from vpt.perception.batch import VISION_TOWER
from vpt.perception.requests import FREE, NONE, REGION

PICTURES = (".png", ".pdf", ".svg", ".jpg")
StreamCallback = Callable[[RowState], None]


@dataclass(frozen=True)
class ImageQuestion:
    """A question about an image, as a conversation.

    Attributes:
        record: the conversation up to the question.
        media: where the image lies.
        image: the image at full resolution.
    """

    record: Record
    media: MediaStore
    image: Image.Image


@dataclass(frozen=True)
class Reply:
    """An answer and what led to it; as text, the answer."""

    bundle: ModelBundle
    question: ImageQuestion
    answer: Answer

    def __str__(self) -> str:
        return self.answer.text

    @property
    def trace(self) -> list[PerceptionStep]:
        """Every request for perception and what came of it."""
        return self.answer.trace

    def maps(self) -> list[SimilarityMap | None]:
        """The similarity map of each step of the trace; None where no control state conditioned what was seen."""
        return similarity_maps(self.bundle, self.answer, self.question.media, self.question.image)

    def draw(self, path: str | Path) -> Path:
        """Write a picture of the image, the selected regions and the similarity maps. Needs matplotlib."""
        check_output_path(Path(path))
        from vpt.generation.answer_images import answer_images, draw_reply  # matplotlib is an extra

        images = answer_images(self.question.image, self.trace, self.maps())
        return draw_reply(Path(path), question=self.question.record.question, answer=self.answer, images=images)


class Pipeline(ModelBundle):
    """A trained model, its tokenizer and its processor, ready to answer."""

    def ask(
        self, image: str | Path, question: str, *, action_prompt: bool | None = None,
        on_step: StreamCallback | None = None, **settings: Any,
    ) -> Reply:  # fmt: skip
        """Answer one question about one image, perceiving meanwhile.

        Args:
            image: a file.
            question: text.
            action_prompt: whether the sentence that asked for perception in training follows the question; by default
                as the model was trained.
            on_step: called after every decoding step with the row that answers.
            settings: keys of `generation`, such as `action="region"` or `temperature=1.0`; the rest is as trained.

        Raises:
            ConfigError: for a setting that does not exist or an action that the model lacks.
            DataError: for an image that cannot be read, or a question that is too long.
        """
        generation = generation_settings(self.config, settings)
        sentence = action_prompt_text(self.config, generation, action_prompt=action_prompt)
        return reply(self, build_question(self.config, Path(image), question, sentence), generation, on_step=on_step)


def load(path: str | Path, *, device: str = "auto", paths: Mapping[str, str] | None = None) -> Pipeline:
    """The trained model in `path`, ready to answer; arguments are those of `vpt.checkpoint.load.load_pretrained`."""
    return Pipeline(**vars(load_pretrained(path, device=device, paths=paths)))


def action_prompt_text(config: TrainConfig, generation: GenerationConfig, *, action_prompt: bool | None = None) -> str:
    """The sentence that, in training, asked for the action that is now forced, or for the only one there was."""
    if not (config.data.action_prompt if action_prompt is None else action_prompt):
        return ""
    trained = [kind for kind, share in config.data.actions.items() if share > 0]
    kinds = trained if generation.action == FREE else [generation.action]
    sentences = {"" if kind == NONE else REGION_PROMPT if kind == REGION else REENCODE_PROMPT for kind in kinds}
    return sentences.pop() if len(sentences) == 1 else ""


def build_question(config: TrainConfig, image: Path, question: str, sentence: str) -> ImageQuestion:
    """Open the image and write the conversation. Raises DataError where either cannot be used."""
    if not question.strip():
        raise DataError("the question is empty")
    if match := PLACEHOLDER.search(question):
        raise DataError(f"the question holds {match[0]}; leave it out, the image comes first by itself")
    if not image.is_file():
        found = "is a folder" if image.is_dir() else "does not exist"
        raise DataError(f"image {image} {found}; give the path of an image file")
    path = image.resolve()
    media = media_store(path.parent, config.data)  # as eval.py opens it
    reference, where = ImageRef(path.name), "the question"
    text = f"<image>\n{with_prompt(question.strip(), sentence)}"
    messages = (Message("system", DEFAULT_SYSTEM), Message("user", text))
    record = Record(messages, {VISION_TOWER: (reference,)}, where, question.strip())
    return ImageQuestion(record, media, media.original(reference, where=where))


def reply(
    bundle: ModelBundle, question: ImageQuestion, generation: GenerationConfig, *,
    on_step: StreamCallback | None = None,
) -> Reply:  # fmt: skip
    """Answer a question that has been read."""
    generator = Generator.from_config(bundle.model, bundle.processor, bundle.tokenizer, generation)
    sample = bundle.processor.encode_prompt(question.record, question.media)
    (row,) = generator.start([sample], [question.media])
    for _ in generator.steps([row]):
        if on_step is not None:
            on_step(row)
    return Reply(bundle, question, generator.finalize(row))


def check_output_path(path: Path) -> None:
    """Raises ConfigError where no picture can be written to `path`."""
    if find_spec("matplotlib") is None:
        raise ConfigError("a picture needs matplotlib; type: pip install matplotlib")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"out={path}: folder {path.parent} does not exist")
    if path.suffix not in PICTURES:
        raise ConfigError(f"out={path}: {path.suffix or 'no suffix'} is no picture format; {', '.join(PICTURES)} are")
