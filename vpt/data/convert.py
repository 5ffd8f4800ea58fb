"""Visual-CoT files to VPT records: `python -m vpt.data.convert IN OUT [options]`."""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from vpt.cli import exit_with
from vpt.data.viscot import convert_record
from vpt.data.viscot_boxes import OVERHANG
from vpt.errors import DataError

SHOWN = 5  # skipped records that are named
CLOSE = 0.7  # difflib ratio from which another kind is taken for a misspelt one


def read_records(source: Path) -> list[tuple[int, str]]:
    """The records of a file, still as JSON, each with its line: one a line, or a list if the file starts with `[`."""
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"input {source} cannot be read: {error}") from None
    if not text.lstrip().startswith("["):
        return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    pieces, decoder = [], json.JSONDecoder()
    end = text.index("[") + 1
    line = 1 + text.count("\n", 0, end)
    for _ in _decode(text, source, 1):  # valid as a whole; now one by one, for the lines
        start = end
        while text[start] in ", \t\r\n":
            start += 1
        line += text.count("\n", end, start)
        _, end = decoder.raw_decode(text, start)
        pieces.append((line, text[start:end]))
        line += text.count("\n", start, end)
    return pieces


def _decode(text: str, source: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}:{line + error.lineno - 1}: not valid JSON, column {error.colno}: {error.msg}; "
            "expected one record a line, or one list of records"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}:{line}: not valid JSON: {error}") from None


def convert_file(
    source: Path, target: Path, *, converter: Callable[..., dict[str, Any]], limit: int | None = None,
    skip: bool = False,
) -> str:  # fmt: skip
    """Convert a file, by `convert` with its options bound; return a line that says what was done.

    Raises:
        DataError: for the first record that cannot be converted, or with `skip` if there is no other; `target` is then
            as it was.
    """
    _check_paths(source, target)
    pieces, notes, skipped, written = read_records(source)[:limit], Counter[str](), list[DataError](), 0
    with _whole(target) as file, tqdm(pieces, desc="converting", unit="record", leave=False, disable=None) as bar:
        listed = target.suffix == ".json"
        for line, text in bar:
            noted = Counter[str]()
            try:
                record = converter(_decode(text, source, line), f"{source}:{line}", notes=noted)
            except DataError as error:
                if not skip:
                    raise
                skipped.append(error)
                continue
            lead = "" if not listed else ",\n" if written else "[\n"
            file.write(lead + json.dumps(record) + ("" if listed else "\n"))
            notes += noted
            written += 1
        if not written:
            raise DataError(f"{source} holds no record to convert" + (f"; the first: {skipped[0]}" if skipped else ""))
        file.write("\n]\n" if listed else "")
    for reason in skipped[:SHOWN]:
        print(f"skipped {reason}", file=sys.stderr)
    if len(skipped) > SHOWN:
        print(f"skipped {len(skipped) - SHOWN} more", file=sys.stderr)
    done = f"wrote {written} records to {target}, skipped {len(skipped)}, clipped {notes['clipped']} boxes"
    return f"{done}; {notes['unsure']} regions may be a cell off, sizes being inexact" if notes["unsure"] else done


def _check_paths(source: Path, target: Path) -> None:
    if not source.is_file():
        raise DataError(f"IN is {source}, which is not a file; give a Visual-CoT file")
    if target.suffix not in (".jsonl", ".json"):
        raise DataError(f"OUT is {target}, but must end in .jsonl (one record a line) or .json (one list)")
    if not target.parent.is_dir():
        raise DataError(f"folder {target.parent} of OUT does not exist; type: mkdir -p {target.parent}")
    if target.is_dir() or target.resolve() == source.resolve():
        taken = "a folder" if target.is_dir() else "the same file as IN"
        raise DataError(f"OUT is {target}, {taken}; name another file")


@contextmanager
def _whole(target: Path) -> Iterator[TextIO]:
    """A file to write, which gets its name once it is complete and is removed otherwise."""
    draft = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            yield file
        draft.replace(target)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error}") from None
    finally:
        draft.unlink(missing_ok=True)


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
        prog="python -m vpt.data.convert", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert Visual-CoT metadata or benchmark files to VPT records. Which of them IN is, is told from\n"
        "what it holds. Several boxes in one record: their union is the region. Boxes that leave their image by\n"
        f"up to {OVERHANG} pixels are clipped. Benchmark files name no image sizes; they are worked out from boxes.",
        epilog="example:\n  python -m vpt.data.convert vsr_cot_train.jsonl vsr_region.jsonl --prefix cot/vsr",
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
    add("--prefix", default="", metavar="DIR", help="folder to put before image paths, below data.root")
    add("--no-prompt", dest="action_prompt", action="store_false", help="Free Choice: do not ask for perception")
    add("--limit", type=count, metavar="N", help="read the first N records only")
    add("--on-error", choices=("raise", "skip"), default="raise", help="a record that cannot be converted: stop and "
        "write nothing, or leave it out and say so; default %(default)s")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a DataError ends it in one line and exit code 2."""
    options = vars(_parser().parse_args(arguments))
    source, target, limit = options.pop("source"), options.pop("target"), options.pop("limit")
    skip = options.pop("on_error") == "skip"
    try:
        print(convert_file(source, target, converter=partial(convert_record, **options), limit=limit, skip=skip))
    except DataError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
