"""Runs on the disk: their settings, what they reached, in what they differ, and which have not ended."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vpt.config.former_names import with_present_names, with_present_results
from vpt.errors import CheckpointError
from vpt.evaluation.predictions import PREDICTIONS, Prediction, answered, read_log

# Keys in which two runs of one experiment may differ
_NO_DIFFERENCE = (
    "seed", "run_name", "output_dir", "device", "threads", "pictures", "tracking", "data.workers",
    "data.image_cache_mb", "data.feature_cache", "model.token_ids", "model.vision_encoder_ls",
)  # fmt: skip
ABSENT, PRESENT = "-", "yes"  # a re-encoder or a source that some of the runs lack


@dataclass(frozen=True)
class RunSummary:
    """One run: its folder, its settings, and its results by dotted key, None where it has not ended."""

    folder: Path
    settings: Mapping[str, Any]
    results: Mapping[str, float] | None


def find_runs(folders: Iterable[Path]) -> list[RunSummary]:
    """Every run in or below the folders. Raises CheckpointError where there is none."""
    runs: list[RunSummary] = []
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob("config.yaml") if (path.parent / "metrics.jsonl").is_file())
        if not found:
            raise CheckpointError(f"{folder} holds no run (config.yaml and metrics.jsonl); give outputs/RUN_NAME")
        runs.extend(read_run(path) for path in found)
    return runs


def run_names(folders: Sequence[Path]) -> list[str]:
    """A name for each run that no other one has: its path below the folder that all are in."""
    paths = [os.path.abspath(folder) for folder in folders]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(path).relative_to(shared).as_posix() for path in paths]


def read_run(folder: Path) -> RunSummary:
    """Settings and results of one run."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    results = dict(_numbers(read_summary(folder))) or None
    return RunSummary(folder, with_present_names(settings), results)


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a run or of one of its evaluations; empty where there is none."""
    file = folder / "summary.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return with_present_results(found)


def read_answers(folder: Path) -> list[Prediction]:
    """The answers in a folder, those that its summary is about: of fewer questions, the log keeps what was answered
    before.
    """
    if not (folder / PREDICTIONS).is_file():
        return []
    summary = read_summary(folder)
    asked = summary["questions"] + summary.get("skipped_questions", 0) if "questions" in summary else None
    return answered(read_log(folder / PREDICTIONS)[:asked])


def run_summaries(run: Path) -> dict[Path, dict[str, Any]]:
    """The summaries of a run and of its evaluations, by folder, where there are any, the run's own first."""
    folders = [run, *sorted(path.parent for path in run.glob("eval/*/summary.json"))]
    return {folder: summary for folder in folders if (summary := read_summary(folder))}


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def config_diff(trees: Sequence[Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Dotted keys that are not the same in all trees, each with its value in every tree.

    A branch that some trees lack is a key of its own; below it, the trees that have it are compared.
    """
    present = [tree for tree in trees if isinstance(tree, Mapping)]
    for key in dict.fromkeys(key for tree in present for key in tree):
        known = [tree.get(key, ABSENT) for tree in present]
        if f"{prefix}{key}" in _NO_DIFFERENCE or all(value == known[0] for value in known):
            continue
        values = [tree.get(key, ABSENT) if isinstance(tree, Mapping) else ABSENT for tree in trees]
        branches = [isinstance(value, Mapping) for value in known]
        if not all(branches):
            yield f"{prefix}{key}", [PRESENT if isinstance(value, Mapping) else value for value in values]
        if any(branches):
            yield from config_diff(values, f"{prefix}{key}.")


def unfinished_runs(runs: Iterable[RunSummary]) -> list[str]:
    """A sentence for each run without a summary."""
    return [f"{run.folder} has not ended; type its command again to go on" for run in runs if run.results is None]


def failures(folders: Iterable[Path]) -> list[str]:
    """A sentence for each member of a sweep that failed, and the last line of why."""
    notes = sorted(note for folder in folders for note in folder.rglob(NOTE))
    return [f"{note.parent} failed: {_last_line(note)}" for note in notes]


def _last_line(file: Path) -> str:
    return next(iter(file.read_text(encoding="utf-8").splitlines()[-1:]), "").removeprefix("error: ")


NOTE = "failed.txt"
