"""The questions of a test split."""

from collections.abc import Mapping
from dataclasses import dataclass

from vpt.config.schema import TrainConfig
from vpt.data.build import build_sources
from vpt.data.images import MediaStore
from vpt.data.records import Record
from vpt.data.turns import read_turns, requests_in, shown_images
from vpt.perception.batch import VISION_TOWER
from vpt.perception.requests import REGION


@dataclass(frozen=True)
class EvalQuestion:
    """One test record, the folder of its images, the data set it is from, and its number among all questions."""

    record: Record
    folder: MediaStore
    source: str
    number: int


def questions(config: TrainConfig, *, limit: int | None) -> list[EvalQuestion]:
    """The test split, or its first `limit` questions."""
    sources, folders = build_sources(config.data.test, config, split="test")
    chosen: list[EvalQuestion] = []
    for name, source, folder in zip(config.data.test, sources, folders, strict=True):
        count = len(source) if limit is None else min(len(source), limit - len(chosen))
        chosen.extend(EvalQuestion(source[index], folder, name, len(chosen)) for index in range(count))
    return chosen


def expected_actions(record: Record, encoder_tokens: Mapping[str, str]) -> list[str]:
    """The kinds of perception that a record's own turns have, in order: `region` or a re-encoder."""
    turns = read_turns(record, encoder_tokens)
    pairs = ((requests_in(turns, number), answer) for number, answer in enumerate(turns[1:]))
    shown = [answer.images[image][0] for requests, answer in pairs for image in shown_images(requests, answer)]
    return [REGION if source == VISION_TOWER else source for source in shown]
