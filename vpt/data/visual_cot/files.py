"""Convert whole Visual-CoT files to files of VPT records."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from vpt.errors import DataError
from vpt.utils.files import atomic_file, atomic_write

_NUMBERS = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")  # in reasons that are alike but for them


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
    """Convert a file, by `converter` (`convert_record` with its options bound); return a line that says what was done.

    With `skip`, records that cannot be converted are left out; each is named, with its reason, in a file beside
    `target`, and printed are counts.

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
    _report_skipped(skipped, source, target.with_suffix(".skipped.txt"))
    done = f"wrote {written} records to {target}, skipped {len(skipped)}, clipped {notes['clipped']} boxes"
    return f"{done}; {notes['unsure']} regions may be a cell off, sizes being inexact" if notes["unsure"] else done


def _report_skipped(skipped: Sequence[DataError], source: Path, listed: Path) -> None:
    """Write every reason to a file, which goes where there is none; print how many have which reason."""
    listed.unlink(missing_ok=True)
    if not skipped:
        return
    reasons = [str(error) for error in skipped]
    atomic_write(listed, "".join(f"{reason}\n" for reason in reasons))
    kinds = Counter(_NUMBERS.sub("N", re.sub(rf"^{re.escape(str(source))}:\d+: ", "", reason)) for reason in reasons)
    for kind, count in kinds.most_common():
        print(f"skipped {count}: {kind}", file=sys.stderr)
    print(f"skipped records are named in {listed}", file=sys.stderr)


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
    try:
        with atomic_file(target) as draft, draft.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error}") from None
