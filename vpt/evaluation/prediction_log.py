"""The log of an evaluation: answers are appended as they come, so that one that is interrupted goes on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from vpt.config.former_names import with_present_names
from vpt.distributed.process_group import World
from vpt.evaluation.predictions import PREDICTIONS, SETTINGS, Prediction, read_log
from vpt.utils.files import atomic_write

# Keys of `data` that change no answer: an evaluation goes on under others
NO_MATTER = (
    "root", "train", "metrics", "limit", "workers", "image_cache_mb", "max_length", "overflow", "on_error",
    "max_skipped_fraction",
)  # fmt: skip
OF_ANSWERS = (SETTINGS, "summary.json", "examples.json")  # files that say something of the answers beside them


def that_matters(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `data` that change an answer."""
    return {key: value for key, value in data.items() if key not in NO_MATTER}


def read_settings(folder: Path) -> dict[str, Any]:
    """`settings.json` beside the answers of a folder: what they were given under; empty where there is none."""
    file = folder / SETTINGS
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "control" in stored:
        stored["ablation"] = stored.pop("control")  # as version 0.1 called it
    return with_present_names(stored)


class PredictionLog:
    """The predictions of one evaluation, those of an earlier process included. Used as a context."""

    def __init__(self, folder: Path, settings: dict[str, Any], records: Sequence[str]) -> None:
        """Take up what `folder` holds, if it answers the same questions under the same settings.

        Otherwise what is there is kept under names of its own, and all begins anew.

        Args:
            folder: where the files are.
            settings: whatever changes an answer; of `data` other keys, too, which are noted.
            records: names of the questions' records, in order.
        """
        self.path, self._settings = folder / PREDICTIONS, folder / SETTINGS
        self.done: list[Prediction] = []
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))  # as they will be read
        if self.path.exists():
            why = self._differs(settings, records)
            if why:
                print(f"{self.path} answers {why}: kept as {_set_aside(folder)}; begins anew", flush=True)
            else:
                self.done = read_log(self.path)
                _truncate_partial_line(self.path)
        atomic_write(self._settings, json.dumps(settings, indent=1))

    def _differs(self, settings: dict[str, Any], records: Sequence[str]) -> str | None:
        """Name the first difference from the evaluation in the folder; None where it is the same one."""
        before, now = (
            one | ({"data": that_matters(one["data"])} if "data" in one else {})
            for one in (read_settings(self.path.parent), settings)
        )
        changed = [key for key in sorted({*before, *now}) if not _agree(before.get(key), now.get(key))]
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


def _set_aside(folder: Path) -> str:
    """Give the answers of a folder, and what was made of them, names that are free; returns that of the answers."""
    number = next(n for n in count(1) if not (folder / _earlier(PREDICTIONS, n)).exists())
    for name in (PREDICTIONS, *OF_ANSWERS):
        if (folder / name).exists():
            (folder / name).rename(folder / _earlier(name, number))
    return _earlier(PREDICTIONS, number)


def _earlier(name: str, number: int) -> str:
    stem, _, ending = name.partition(".")
    return f"earlier_{stem}{f'_{number}' if number > 1 else ''}.{ending}"


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
