"""Two runs question by question: `python -m vpt.evaluation.compare A B [--metrics exact_match anls] [--out FILE]`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vpt.cli import exit_with
from vpt.errors import ConfigError, DataError, UserError
from vpt.evaluation.metrics import METRICS, build_metrics
from vpt.evaluation.predictions import PREDICTIONS, Prediction, by_source, read_predictions
from vpt.evaluation.statistics import difference, mcnemar
from vpt.evaluation.summary import compute

_PLACES = ("", "eval/test", "predictions")  # where a run keeps its predictions


def find_predictions(path: Path) -> Path:
    """The predictions that a user names: the file, its folder, or a run. Raises DataError where there are none."""
    if path.is_file():
        return path
    for place in _PLACES:
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
    """A row for each data set and number: both values, the difference with its interval, McNemar's p where it applies.

    Args:
        a, b: answers to the same questions, in the same order.
        names: of the metrics.
    """
    metrics = build_metrics(names, key="--metrics")
    rows = []
    for source, places in by_source(a):
        ours = compute([a[place] for place in places], metrics)
        theirs = compute([b[place] for place in places], metrics)
        for name, ratio in ours.items():
            if not ratio.questions or not theirs[name].questions:
                continue
            found = difference(ratio, theirs[name])
            row = {"source": source, "metric": name, "a": ratio.value, "b": theirs[name].value}
            rows.append(row | {"difference": asdict(found), "p": mcnemar(ratio, theirs[name])})
    return rows


def comparison_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows for people."""
    names = [f"{row['source']}: {row['metric']}" for row in rows]
    width = max(map(len, names))
    lines = [f"{'':{width}}  questions       A       B   B - A   95% interval       McNemar's p"]
    for name, row in zip(names, rows, strict=True):
        d, p = row["difference"], "" if row["p"] is None else f"{row['p']:.2g}"
        lines.append(
            f"{name:{width}}  {d['questions']:9,}  {row['a']:6.4f}  {row['b']:6.4f}  {d['value']:+.4f}"
            f"  [{d['low']:+.4f}, {d['high']:+.4f}]  {p}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a UserError ends it in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m vpt.evaluation.compare", description=__doc__)
    parser.add_argument("a", metavar="A", type=Path, help="a run, a folder with predictions, or their file")
    parser.add_argument("b", metavar="B", type=Path, help="another one, of the same questions")
    parser.add_argument("--metrics", nargs="+", default=["exact_match"], metavar="NAME", help=", ".join(METRICS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON, too")
    options = parser.parse_args(arguments)
    try:
        if options.out and not (folder := options.out.absolute().parent).is_dir():
            raise ConfigError(f"--out {options.out}: folder {folder} does not exist; type: mkdir -p {folder}")
        found = [read_predictions(find_predictions(path)) for path in (options.a, options.b)]
        a, b = pair(*found)
        rows = compare_predictions(a, b, options.metrics)
    except UserError as error:
        exit_with(error)
        return
    left = max(map(len, found)) - len(a)
    print(f"{len(a):,} questions answered by both" + (f"; {left:,} only by one are left out" if left else ""))
    print("\n".join(comparison_table(rows)))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
