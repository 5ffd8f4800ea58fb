"""Runs side by side: what differs in their settings, and what they reached.

    vpt compare outputs/dino outputs/sam outputs/clip
    vpt compare outputs/masking                           a sweep: every run below the folder
    vpt compare --paired outputs/baseline outputs/dino    two runs question by question

Runs that differ in nothing but the seed are one line, mean ± standard deviation; compare.png and compare.json are
written beside the runs, and frontier.png, accuracy against perceived visual tokens, where these differ. Paired, each
metric's difference has its 95% interval and a paired test (McNemar's, where every question has an image of its own).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vpt.errors import ConfigError
from vpt.evaluation.metrics import METRICS
from vpt.evaluation.paired import compare_predictions, comparison_table, find_predictions, pair
from vpt.evaluation.predictions import read_predictions
from vpt.reporting.compare_runs import compare_runs, draw_runs, runs_table
from vpt.reporting.frontier import draw_frontier, frontier_points
from vpt.reporting.runs import failures, find_runs, run_names, unfinished_runs
from vpt.utils.drawing import save


def main(arguments: Sequence[str]) -> None:
    """`vpt compare`."""
    parser = argparse.ArgumentParser(
        prog="vpt compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folders", metavar="RUN", type=Path, nargs="+", help="runs, or folders of runs; with --paired exactly two "
        "runs, folders with predictions, or their files")  # fmt: skip
    add("--paired", action="store_true", help="compare two runs question by question")
    add("--metrics", metavar="NAMES", help="by comma: keys of summary.json (default accuracy); with --paired of "
        f"{', '.join(METRICS)} (default exact_match)")  # fmt: skip
    add("--to", type=Path, metavar="FOLDER", help="where compare.png and compare.json go; default: the first RUN")
    add("--out", type=Path, metavar="FILE", help="with --paired: write the table as JSON, too")
    options = parser.parse_args(arguments)
    names = options.metrics.split(",") if options.metrics else None
    if options.paired:
        _compare_pair(options.folders, names or ["exact_match"], options.out)
    else:
        _compare_runs(options.folders, names or ["accuracy"], options.to or options.folders[0])


def _compare_runs(folders: Sequence[Path], metrics: Sequence[str], to: Path) -> None:
    runs = find_runs(folders)
    groups = compare_runs(runs, metrics)
    print(runs_table(groups, metrics).as_text())
    for sentence in (*unfinished_runs(runs), *failures(folders)):
        print(sentence)
    to.mkdir(parents=True, exist_ok=True)
    written = [
        {"settings": dict(group.label), "runs": [str(run.folder) for run in group.runs], **group.values}
        for group in groups
    ]
    (to / "compare.json").write_text(json.dumps(written, indent=1))
    pictures = [draw_runs(groups, metrics, to / "compare.png")]
    names = run_names([run.folder for run in runs])
    points = [point for name, run in zip(names, runs) for point in frontier_points(run.folder, name=name)]
    if len({point.visual_tokens.value for point in points}) > 1:
        pictures.append(to / "frontier.png")
        save(draw_frontier(points, {}), pictures[-1])
    print(f"see {', '.join(map(str, pictures))} and {to / 'compare.json'}")


def _compare_pair(paths: Sequence[Path], metrics: Sequence[str], out: Path | None) -> None:
    if len(paths) != 2:
        raise ConfigError(f"--paired compares two runs, {len(paths)} given; type: vpt compare --paired RUN OTHER")
    if out and not (folder := out.absolute().parent).is_dir():
        raise ConfigError(f"--out {out}: folder {folder} does not exist; type: mkdir -p {folder}")
    found = [read_predictions(find_predictions(path)) for path in paths]
    a, b = pair(*found)
    rows = compare_predictions(a, b, metrics)
    left = max(map(len, found)) - len(a)
    print(f"{len(a):,} questions answered by both" + (f"; {left:,} only by one are left out" if left else ""))
    print(comparison_table(rows).as_text())
    if out:
        out.write_text(json.dumps(rows, indent=1))
