"""The curves of runs as one page, or as a workspace at W&B.

    vpt dashboard outputs/dino outputs/sam       one local page with all panels: outputs/dino/dashboard.html
    vpt dashboard --wandb PROJECT                the same panels as a workspace at W&B

The second needs a W&B account and `pip install 'vpt[dashboard]'`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vpt.reporting.dashboard import workspace, write_page


def main(arguments: Sequence[str]) -> None:
    """`vpt dashboard`."""
    parser = argparse.ArgumentParser(
        prog="vpt dashboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", metavar="RUN", type=Path, nargs="*", help="runs to draw on one page")
    parser.add_argument("--wandb", metavar="PROJECT", help="make a workspace in this W&B project (ENTITY/PROJECT)")
    options = parser.parse_args(arguments)
    if not options.folders and not options.wandb:
        parser.error("name a run (outputs/RUN_NAME), or --wandb PROJECT")
    if options.folders:
        print(f"see {write_page(options.folders)}")
    if options.wandb:
        entity, _, project = options.wandb.rpartition("/")
        print(f"see {workspace(project, entity).save().url}")
