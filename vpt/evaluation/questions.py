"""The questions of a test split."""

from collections.abc import Mapping
from dataclasses import dataclass

from vpt.asking import REGION
from vpt.batch import TOWER
from vpt.config import TrainConfig
from vpt.data.build import build_sources
from vpt.data.images import ImageFolder
from vpt.data.records import Record
from vpt.data.turns import perceptions, read_turns


@dataclass(frozen=True)
class Question:
    """One test record, the folder of its images, the data set it is from, and its number among all questions."""

    record: Record
    folder: ImageFolder
    source: str
    number: int


def questions(config: TrainConfig, *, limit: int | None) -> list[Question]:
    """The test split, or its first `limit` questions."""
    sources, folders = build_sources(config.data.test, config, split="test")
    chosen: list[Question] = []
    for name, source, folder in zip(config.data.test, sources, folders, strict=True):
        count = len(source) if limit is None else min(len(source), limit - len(chosen))
        chosen.extend(Question(source[index], folder, name, len(chosen)) for index in range(count))
    return chosen


def asked_kinds(record: Record, encoder_tokens: Mapping[str, str]) -> list[str]:
    """The kinds of perception that a record's own turns have, in order: `region` or a re-encoder."""
    turns = read_turns(record, encoder_tokens)
    shown = (turns[number + 1].shows[0][0] for number in perceptions(turns))
    return [REGION if source == TOWER else source for source in shown]
