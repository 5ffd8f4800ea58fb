"""Visual-CoT files to VPT records: `vpt convert IN OUT [options]`."""

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from vpt.data.crops import OVERHANG
from vpt.data.visual_cot.files import convert_file
from vpt.data.visual_cot.records import convert_record

CLOSE = 0.7  # difflib ratio from which another kind is taken for a misspelt one


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} up, not {text!r}")
    return int(text)


def _kind(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]+", text):
        raise argparse.ArgumentTypeError(f"must be region, none or a re-encoder's token word (a-z, 0-9), not {text!r}")
    meant = get_close_matches(text, ("region", "none"), n=1, cutoff=CLOSE)
    if meant and text != meant[0]:
        raise argparse.ArgumentTypeError(f"{text!r}: did you mean {meant[0]}?")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vpt convert", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert Visual-CoT metadata or benchmark files to VPT records. Which of them IN is, is told from\n"
        "what it holds. Several boxes in one record: their union is the region. Boxes that leave their image by\n"
        f"up to {OVERHANG} pixels are clipped. Benchmark files name no image sizes: they are worked out from\n"
        "boxes, to a pixel or two, or read from the images with --images.",
        epilog="example:\n  vpt convert vsr_cot_train.jsonl vsr_region.jsonl --prefix cot/vsr",
    )  # fmt: skip
    whole, count = partial(_at_least, 0), partial(_at_least, 1)
    add = parser.add_argument
    add("source", metavar="IN", type=Path, help="Visual-CoT file")
    add("target", metavar="OUT", type=Path, help="records: .jsonl (one a line) or .json (one list)")
    add("--kind", type=_kind, default="region", help="perception between question and answer: region, none, or a "
        "re-encoder by its token word (detection, seg, clip, ...); default %(default)s")  # fmt: skip
    add("--bins", type=count, default=8, metavar="K", help="regions are cells of a KxK grid; default %(default)s")
    add("--region-format", choices=("tokens", "text"), default="tokens", help="text: the cells as [x0, y0, x1, y1] "
        "instead of region tokens, best with --bins 1000; default %(default)s")  # fmt: skip
    add("--crop-margin", type=whole, default=0, metavar="N", help="cells by which crops are widened; default 0")
    add("--prefix", default="", metavar="DIR", help="folder to put before image paths, below data.root; folders that "
        "both end it and begin a path are written once")  # fmt: skip
    add("--images", type=Path, metavar="ROOT", help="data.root, where it holds the images already: their sizes are "
        "read, and records made for other sizes refused")  # fmt: skip
    add("--no-prompt", dest="action_prompt", action="store_false", help="Free Choice: do not ask for perception")
    add("--limit", type=count, metavar="N", help="read the first N records only")
    add("--on-error", choices=("raise", "skip"), default="raise", help="a record that cannot be converted: stop and "
        "write nothing, or leave it out and say why in OUT's name with .skipped.txt; default %(default)s")  # fmt: skip
    return parser


def main(arguments: Sequence[str]) -> None:
    """`vpt convert`."""
    options = vars(_parser().parse_args(arguments))
    source, target, limit = options.pop("source"), options.pop("target"), options.pop("limit")
    skip = options.pop("on_error") == "skip"
    print(convert_file(source, target, converter=partial(convert_record, **options), limit=limit, skip=skip))
