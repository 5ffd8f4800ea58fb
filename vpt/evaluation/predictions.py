"""`predictions.jsonl`: what was answered, one question a line."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vpt.data.references import ImageRef, Pixels, VideoRef
from vpt.errors import DataError
from vpt.generation.row_state import IGNORED, PerceptionStep
from vpt.perception.batch import VISION_TOWER

PREDICTIONS, SETTINGS = "predictions.jsonl", "settings.json"
# What files of version 0.1 call them
FORMER_KEYS = {"right": "correct", "asked": "expected_actions", "said": "requested"}
FORMER_STATUS = {"seen": "done", "mended": "repaired"}


@dataclass(frozen=True)
class Prediction:
    """One answered question: a line of `predictions.jsonl`.

    Attributes:
        record: the name of its record.
        source: the data set, as `data.test` names it.
        question, target, answer: what was asked, the record's answer, the model's.
        correct: whether the answer is an accepted one, up to case, punctuation and articles.
        type: of the question.
        images: source of tokens -> images and videos, as records spell them.
        box: the true box, (x0, y0, x1, y1) in pixels of the first image, or None.
        accepted: every answer that counts as right; `target` alone where a record has no more.
        expected_actions: kinds of perception that the record has, in order.
        complete: whether the answer ended by itself.
        confidence: the probability that the model gave to its answer.
        trace: what the model asked for before it answered.
        seconds: its share of the time that its batch took.
        skipped: why the question could not be asked (`data.on_error=skip`); empty where it was.
    """

    record: str
    question: str
    target: str
    answer: str
    correct: bool
    type: str = "all"
    source: str = "test"
    images: dict[str, list[str | dict[str, Any]]] = field(default_factory=dict)
    box: Pixels | None = None
    accepted: list[str] = field(default_factory=list)
    expected_actions: list[str] = field(default_factory=list)
    complete: bool = True
    confidence: float = 1.0
    trace: list[PerceptionStep] = field(default_factory=list)
    seconds: float = 0.0
    skipped: str = ""

    def __post_init__(self) -> None:
        if not self.accepted:
            object.__setattr__(self, "accepted", [self.target])

    @property
    def image(self) -> ImageRef | None:
        """The image that the question is about; of a video, the frame that is re-encoded. None for text alone."""
        first = next(iter(self.images.get(VISION_TOWER, [])), None)
        if isinstance(first, dict):
            return VideoRef.read(first, self.record).frame
        return ImageRef.parse(first) if first is not None else None

    @property
    def perceived(self) -> list[PerceptionStep]:
        """The steps of the trace that showed the model something."""
        return [step for step in self.trace if step.status != IGNORED]

    @property
    def actions(self) -> list[str]:
        """Kinds of perception that the model chose and was shown, in order."""
        return [step.kind for step in self.perceived]

    @property
    def region(self) -> Pixels | None:
        """The first region that was shown."""
        return next((step.box for step in self.perceived if step.box), None)

    @classmethod
    def parse(cls, line: str) -> "Prediction":
        """A line of the file; keys that this version does not know are passed over."""
        raw = json.loads(line)
        trace = [PerceptionStep(**_known(PerceptionStep, step)) for step in raw.get("trace", [])]
        return cls(**_known(cls, raw | {"trace": trace}))


def _known(kind: type, raw: dict[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    raw = {FORMER_KEYS.get(key, key): value for key, value in raw.items()}
    if "status" in raw:
        raw["status"] = FORMER_STATUS.get(raw["status"], raw["status"])
    return {key: tuple(value) if key == "box" and value else value for key, value in raw.items() if key in names}


def repeat_name(record: str, time: int) -> str:
    """The name under which a record is asked for the second, third ... time."""
    return f"{record} (answer {time})"


def without_repeat(record: str) -> str:
    """The name of the record that is asked several times."""
    return re.sub(r" \(answer \d+\)$", "", record)


def answered(items: Sequence[Prediction]) -> list[Prediction]:
    """Those that were asked and answered, not skipped."""
    return [item for item in items if not item.skipped]


def read_predictions(path: Path) -> list[Prediction]:
    """The answers in a file. Raises DataError where a line is no prediction."""
    return answered(read_log(path))


def read_log(path: Path) -> list[Prediction]:
    """Every complete line of a file, those of skipped questions too. Raises DataError where one is no prediction."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what a killed process left of a line goes
    try:
        return [Prediction.parse(line) for line in lines]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} holds what is no prediction ({error}); remove the file to answer anew") from None


def by_source(items: Sequence[Prediction]) -> Iterator[tuple[str, list[int]]]:
    """Each data set and which of the items are its own, in order."""
    places: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        places.setdefault(item.source, []).append(number)
    yield from places.items()
