"""Two runs question by question: paired differences with intervals and a paired test."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vpt.errors import DataError
from vpt.evaluation.metrics import build_metrics
from vpt.evaluation.predictions import PREDICTIONS, Prediction, by_source
from vpt.evaluation.statistics import difference, paired_p
from vpt.evaluation.summary import compute, image_clusters
from vpt.utils.table import Range, Table

PLACES = ("", "eval/test", "predictions")  # where a run keeps its predictions


def find_predictions(path: Path) -> Path:
    """The predictions that a user names: the file, its folder, or a run. Raises DataError where there are none."""
    if path.is_file():
        return path
    for place in PLACES:
        if (path / place / PREDICTIONS).is_file():
            return path / place / PREDICTIONS
    raise DataError(f"{path} holds no {PREDICTIONS}; give a run (outputs/NAME), a folder like outputs/NAME/eval/test")


def pair(a: Sequence[Prediction], b: Sequence[Prediction]) -> tuple[list[Prediction], list[Prediction]]:
    """The questions that both answered, in the order of the first. Raises DataError where there are none."""
    others = {(item.record, item.question): item for item in b}
    shared = [item for item in a if (item.record, item.question) in others]
    if not shared:
        raise DataError("the two runs have no question in common; were both evaluated on the same test split?")
    return shared, [others[item.record, item.question] for item in shared]


def compare_predictions(a: Sequence[Prediction], b: Sequence[Prediction], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each data set and number: both values, the difference with its interval, and `paired_p`.

    Args:
        a, b: answers to the same questions, in the same order.
        names: of the metrics.
    """
    metrics = build_metrics(names, key="--metrics")
    rows = []
    for source, places in by_source(a):
        ours = compute([a[place] for place in places], metrics)
        theirs = compute([b[place] for place in places], metrics)
        clusters = image_clusters([a[place] for place in places])
        for name, ratio in ours.items():
            if not ratio.questions or not theirs[name].questions:
                continue
            found = difference(ratio, theirs[name], clusters)
            row = {"source": source, "metric": name, "a": ratio.value, "b": theirs[name].value}
            rows.append(row | {"difference": asdict(found), "p": paired_p(ratio, theirs[name], clusters)})
    return rows


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `compare_predictions` as a table."""
    columns = ["data", "metric", "questions", "A", "B", "B - A", "95% interval", "p"]
    cells = [
        (
            row["source"],
            row["metric"],
            d["questions"],
            row["a"],
            row["b"],
            d["value"],
            Range(d["low"], d["high"]),
            row["p"],
        )
        for row in rows
        if (d := row["difference"])
    ]
    form = {"A": ".4f", "B": ".4f", "B - A": "+.4f", "95% interval": "+.4f", "p": ".2g"}
    return Table(columns, cells, form)
