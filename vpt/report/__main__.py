"""Write a run's reports anew from what is on disk: `python -m vpt.report outputs/dino`.

A run has `report.html` beside its `metrics.jsonl`, and one in each of its evaluations (`eval/NAME/report.html`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vpt.cli import exit_with
from vpt.errors import UserError
from vpt.evaluation.predictions import PREDICTIONS
from vpt.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a UserError ends it in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m vpt.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="runs, or single evaluations")
    options = parser.parse_args(arguments)
    try:
        for folder in options.folders:
            for answers in sorted(folder.glob(f"eval/*/{PREDICTIONS}")):
                print(f"see {write_report(answers.parent)}")
            print(f"see {write_report(folder)}")
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
