"""`predictions.jsonl`: what was answered, appended as answers come, so that an interrupted evaluation goes on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from vpt.config.former_names import with_present_names
from vpt.data.references import ImageRef, Pixels, VideoRef
from vpt.distributed.process_group import World
from vpt.errors import DataError
from vpt.generation.row_state import IGNORED, PerceptionStep
from vpt.perception.batch import VISION_TOWER
from vpt.utils.files import atomic_write

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


# Keys of `data` that change no answer: an evaluation goes on under others
NO_MATTER = (
    "root", "train", "metrics", "limit", "workers", "image_cache_mb", "max_length", "overflow", "on_error",
    "max_skipped_fraction",
)  # fmt: skip


def that_matters(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `data` that change an answer."""
    return {key: value for key, value in data.items() if key not in NO_MATTER}


class PredictionLog:
    """The predictions of one evaluation, those of an earlier process included. Used as a context."""

    def __init__(self, folder: Path, settings: dict[str, Any], records: Sequence[str]) -> None:
        """Take up what `folder` holds, if it answers the same questions under the same settings.

        Otherwise what is there is kept under another name, and all begins anew.

        Args:
            folder: where the files are.
            settings: whatever changes an answer.
            records: names of the questions' records, in order.
        """
        self.path, self._settings = folder / PREDICTIONS, folder / SETTINGS
        self.done: list[Prediction] = []
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))  # as they will be read
        if self.path.exists():
            why = self._differs(settings, records)
            if why:
                kept = self.path.rename(folder / f"earlier_{PREDICTIONS}")
                print(f"{self.path} answers {why}: kept as {kept.name}; begins anew", flush=True)
            else:
                self.done = read_log(self.path)
                _truncate_partial_line(self.path)
        atomic_write(self._settings, json.dumps(settings, indent=1))

    def _differs(self, settings: dict[str, Any], records: Sequence[str]) -> str | None:
        """Name the first difference from the evaluation in the folder; None where it is the same one."""
        stored = json.loads(self._settings.read_text(encoding="utf-8")) if self._settings.exists() else {}
        if "control" in stored:
            stored["ablation"] = stored.pop("control")  # as version 0.1 called it
        before = with_present_names(stored)
        if "data" in before:
            before["data"] = that_matters(before["data"])
        changed = [key for key in sorted({*before, *settings}) if not _agree(before.get(key), settings.get(key))]
        if changed:
            return f"with other settings ({', '.join(changed)})"
        names = [item.record for item in read_log(self.path)]
        return None if all(a == b for a, b in zip(names, records, strict=False)) else "other questions"

    def add(self, items: Sequence[Prediction]) -> None:
        """Append lines; they are on their way to the disk when this returns."""
        self._file.write("".join(f"{_line(item)}\n" for item in items))
        self._file.flush()
        self.done.extend(items)

    def __enter__(self) -> "PredictionLog":
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class SharedLog:
    """The log of several processes, each of which adds its part in turn. Rank 0 writes; all hold all."""

    def __init__(self, log: PredictionLog | None, world: World) -> None:
        """`log`: rank 0's, None elsewhere."""
        self._log, self._world = log, world
        self.done = self._gather(log.done if log else [])[0]

    def _gather(self, items: Sequence[Prediction]) -> list[list[Prediction]]:
        texts = self._world.all_gather_text("".join(f"{_line(item)}\n" for item in items))
        return [[Prediction.parse(line) for line in text.splitlines()] for text in texts]

    def add(self, items: Sequence[Prediction]) -> None:
        """Append the predictions of every process, those of rank 0 first. A collective."""
        everyone = [item for part in self._gather(items) for item in part]
        self.done.extend(everyone)
        if self._log:
            self._log.add(everyone)


@contextmanager
def open_log(
    folder: Path, settings: dict[str, Any], records: Sequence[str], world: World
) -> Iterator[PredictionLog | SharedLog]:
    """The log of an evaluation, shared where there are several processes."""
    with PredictionLog(folder, settings, records) if world.is_main else nullcontext() as log:
        yield log if log is not None and world.size == 1 else SharedLog(log, world)


def _agree(before: Any, now: Any, *, groups: Sequence[str] = ("image", "video")) -> bool:
    """Whether settings are the same, but for keys that another version lacks, which then stood for their defaults."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return before == now
    return all(
        _agree(before[key], now[key], groups=()) if key in groups else before[key] == now[key]
        for key in before.keys() & now.keys()
    )


def _truncate_partial_line(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _line(item: Prediction) -> str:
    return json.dumps(asdict(item))


def by_source(items: Sequence[Prediction]) -> Iterator[tuple[str, list[int]]]:
    """Each data set and which of the items are its own, in order."""
    places: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        places.setdefault(item.source, []).append(number)
    yield from places.items()
