"""Sources of records: any sequence of `Record` with a folder of images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpt.data.images import MediaStore
from vpt.data.records import DEFAULT_SYSTEM, REENCODE_PROMPT, REGION_PROMPT, ImageRef, Message, Pixels, Record
from vpt.data.same_data import without_perception, without_prompts
from vpt.errors import DataError
from vpt.perception.batch import VISION_TOWER
from vpt.perception.regions import Region
from vpt.perception.tokens import action_tokens


@dataclass(frozen=True)
class SourceContext:
    """Settings of the run that every source gets.

    Attributes:
        root: `data.root`, or None.
        encoder_tokens: re-encoder -> how it is spelt.
        actions: kind (`none`, `region` or a re-encoder) -> share; for sources that make up their own turns.
        action_prompt: whether questions say which perception to use (Free Choice leaves that out).
        perception: False removes every perception turn (the same-data baseline).
        token_matched_images: puts an image of as many tokens in place of each perception that is removed.
        region_bins: cells of the region grid along a side.
        seed: of the run.
        media: folder -> its images, with the run's limits.
    """

    root: Path | None
    encoder_tokens: Mapping[str, str]
    actions: Mapping[str, float]
    action_prompt: bool
    perception: bool
    region_bins: int
    seed: int
    token_matched_images: bool = False
    media: Callable[[Path], MediaStore] = MediaStore

    def apply_run_options(self, record: Record) -> Record:
        """A record as this run wants it: without prompts, without perception."""
        if not self.perception:
            return without_perception(record, self.encoder_tokens, token_matched_images=self.token_matched_images)
        return record if self.action_prompt else without_prompts(record)


class Source(ABC):
    """A sequence of records; subclasses say where they come from.

    Attributes:
        root: the folder that their image paths start from.
        render: for sources that make their images up: path -> image. `root` is then a name that no other images have.
    """

    root: Path
    render: Callable[[str], Image.Image] | None = None

    @classmethod
    def check(cls, root: Path | None, **options: Any) -> None:
        """Raise DataError where a file or package that the source needs is missing; opens nothing."""
        return  # by default nothing is

    @abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Record number `index`. Raises DataError that names it where it cannot be used."""

    def draft(self, index: int) -> Record:
        """Record number `index` as far as it is known without a look at its images: enough to tell what it costs."""
        return self[index]


def draw_kinds(actions: Mapping[str, float], count: int, *, seed: int) -> list[str]:
    """A kind of perception for each of `count` records, by the shares of `actions`."""
    shares = {kind: share for kind, share in actions.items() if share > 0}
    if not shares:
        raise DataError("data.actions gives no kind a share above 0; try data.actions.none=1")
    weights = np.array(list(shares.values()))
    picks = np.random.default_rng(seed).choice(len(shares), size=count, p=weights / weights.sum())
    names = list(shares)
    return [names[pick] for pick in picks]


def perceiving_record(
    context: SourceContext, kind: str, *, question: str, answer: str, image: ImageRef, box: Pixels,
    size: tuple[int, int], where: str, question_type: str,
) -> Record:  # fmt: skip
    """A question and its answer with the turns that one kind of perception takes in between."""
    images: dict[str, tuple[ImageRef, ...]] = {VISION_TOWER: (image,)}
    turns: list[Message] = []
    prompt = ""
    if kind == "region":
        try:
            region = Region.from_box(box, size, bins=context.region_bins)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        crop = replace(image, crop=region.to_box(size, bins=context.region_bins))
        images[VISION_TOWER] = (image, crop)
        turns = [Message("assistant", region.to_text()), Message("user", "<image>")]
        prompt = REGION_PROMPT
    elif kind != "none":
        token = context.encoder_tokens[kind]
        images[kind] = (image,)
        turns = [Message("assistant", "".join(action_tokens(token))), Message("user", f"<{token}_image>")]
        prompt = REENCODE_PROMPT
    asked = f"{question} {prompt}" if prompt and context.action_prompt else question
    messages = (Message("system", DEFAULT_SYSTEM), Message("user", f"<image>\n{asked}"), *turns)
    record = Record((*messages, Message("assistant", answer)), images, where, question, answer, question_type, box)
    return context.apply_run_options(record)
