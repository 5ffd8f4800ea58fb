"""Measure, print, write."""

import argparse
import importlib
import time
from pathlib import Path

import torch
from tqdm import tqdm

from vpt.bench.measure import Measurement, write

GROUPS = ("inner_passes", "packing", "mfu", "memory", "generation", "rollouts", "vision", "loading")


def measure(groups: list[str]) -> list[Measurement]:
    """The figures of each group. A group whose packages are not installed is left out, and said so."""
    figures = []
    for group in tqdm(groups, unit="group", leave=False):
        try:
            figures += importlib.import_module(f"vpt.bench.{group}").measure()
        except ModuleNotFoundError as error:
            tqdm.write(f"{group}: not measured, {error.name} is missing; pip install -e '.[demo]'")
    return figures


def main() -> None:
    """Measure what is asked for; the exit code does not depend on the figures."""
    parser = argparse.ArgumentParser(description="What things cost, in ratios.")
    parser.add_argument("groups", nargs="*", default=[*GROUPS], metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"))
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    started = time.perf_counter()
    figures = measure(arguments.groups)
    print(f"{'':28}measured and its interval      bound")
    for figure in figures:
        print(figure)
    write(figures, arguments.out)
    took = time.perf_counter() - started
    print(f"written to {arguments.out}; {took:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
