"""Write a run's reports anew from what is on disk.

    vpt report outputs/dino

A run has `report.html` beside its `metrics.jsonl`, and one in each of its evaluations (`eval/NAME/report.html`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vpt.evaluation.predictions import PREDICTIONS
from vpt.reporting.report import write_report


def main(arguments: Sequence[str]) -> None:
    """`vpt report`."""
    parser = argparse.ArgumentParser(
        prog="vpt report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="runs, or single evaluations")
    for folder in parser.parse_args(arguments).folders:
        for answers in sorted(folder.glob(f"eval/*/{PREDICTIONS}")):
            print(f"see {write_report(answers.parent)}")
        print(f"see {write_report(folder)}")
