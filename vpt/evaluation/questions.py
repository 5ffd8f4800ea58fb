"""The questions of a test split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vpt.config.schema import TrainConfig
from vpt.data.build import build_sources
from vpt.data.images import MediaStore
from vpt.data.records import Record
from vpt.data.skipping import check_skipped, format_skipped
from vpt.data.sources.base import Source
from vpt.data.turns import read_turns, requests_in, shown_images
from vpt.errors import DataError
from vpt.evaluation.predictions import repeat_name
from vpt.perception.batch import VISION_TOWER
from vpt.perception.requests import REGION


@dataclass(frozen=True)
class EvalQuestion:
    """One test record, the folder of its images, the data set it is from, and its number among all questions; and why
    it cannot be asked, where it cannot be read.
    """

    record: Record
    folder: MediaStore
    source: str
    number: int
    error: str = ""


def questions(config: TrainConfig, *, limit: int | None) -> list[EvalQuestion]:
    """The test split, or its first `limit` questions; with data.on_error=skip, those that cannot be read among them."""
    sources, folders = build_sources(config.data.test, config, split="test")
    chosen: list[EvalQuestion] = []
    for name, source, folder in zip(config.data.test, sources, folders, strict=True):
        count = len(source) if limit is None else min(len(source), limit - len(chosen))
        for index in range(count):
            record, error = _read(source, index, name, config.data.on_error)
            chosen.append(EvalQuestion(record, folder, name, len(chosen), error))
    return chosen


def repeated(asked: Sequence[EvalQuestion], count: int) -> list[EvalQuestion]:
    """All questions so many times over, each time under another name and with other random numbers (Avg@k)."""
    again = [
        replace(
            question,
            record=replace(question.record, where=repeat_name(question.record.where, time)),
            number=question.number + (time - 1) * len(asked),
        )
        for time in range(2, count + 1)
        for question in asked
    ]
    return [*asked, *again]


def _read(source: Source, index: int, name: str, on_error: str) -> tuple[Record, str]:
    try:
        return source[index], ""
    except DataError as error:
        if on_error == "raise":
            raise
        return Record((), {}, f"{name}: record {index}"), str(error)


def check_test_records(config: TrainConfig, *, limit: int | None) -> str:
    """Read all test records that a run will ask (the first `limit`) or score, and look whether their images are there
    and whole, as far as that shows without decoding them. Returns what is to be left out, in words.

    Raises:
        DataError: for the first one that cannot be used; with data.on_error=skip for too many of them.
    """
    data, reasons, rows, left = config.data, [], 0, limit
    for source, folder in zip(*build_sources(data.test, config, split="test"), strict=True):
        asked = len(source) if left is None else min(len(source), left)
        left = None if left is None else left - asked
        count = max(asked, min(config.training.eval_rows, len(source)))
        reasons += _unusable(source, folder, count, data.on_error)
        rows += count
    check_skipped(reasons, rows, data.max_skipped_fraction, what="test records", complete=True)
    return format_skipped(reasons, rows, "test records") if reasons else ""


def _unusable(source: Source, folder: MediaStore, count: int, on_error: str) -> list[str]:
    """Why some of the first `count` records cannot be used."""
    reasons, checked = [], set()
    for index in range(count):
        try:
            record = source[index]
            for image in (image for images in record.images.values() for image in images):
                if (key := (image, image.frame.size)) not in checked:
                    folder.check(image, where=record.where)
                    checked.add(key)
        except DataError as error:
            if on_error == "raise":
                raise
            reasons.append(str(error))
    return reasons


def expected_actions(record: Record, encoder_tokens: Mapping[str, str]) -> list[str]:
    """The kinds of perception that a record's own turns have, in order: `region` or a re-encoder."""
    turns = read_turns(record, encoder_tokens)
    pairs = ((requests_in(turns, number), answer) for number, answer in enumerate(turns[1:]))
    shown = [answer.images[image][0] for requests, answer in pairs for image in shown_images(requests, answer)]
    return [REGION if source == VISION_TOWER else source for source in shown]
