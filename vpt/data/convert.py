"""Visual-CoT files to VPT records: `python -m vpt.data.convert IN OUT [options]`.

Metadata records give boxes and the image's size in pixels. Benchmark records name no size, but write each coordinate v
of a box twice: int(v), after `###`, and round((v + padding) / side, 3), for the image in the middle of a square of
side = max(width, height) with padding = (side - extent) // 2 before it. `image_sizes` solves the two for the size.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import floor
from pathlib import Path, PurePosixPath
from reprlib import repr as short
from typing import Any, TextIO

from tqdm import tqdm

from vpt.cli import fail
from vpt.data.records import REENCODE_PROMPT, REGION_PROMPT, ImageRef, parse_record
from vpt.errors import DataError
from vpt.regions import Box, Region
from vpt.tokens import action_tokens

BOX_PROMPT = "Please provide the bounding box coordinate of the region that can help you answer the question better."
PUBLISHED = ("detection", "clip", "seg")  # published records have these lists even where they are empty
OVERHANG = 2  # pixels by which a box may leave its image
ROUNDING = 0.0005  # of fractions with three decimals
LONGEST_SIDE = 65_535  # pixels; a JPEG can have no more
SHOWN = 5  # skipped records that are named

Size = tuple[int, int]  # (width, height) in pixels
Reading = tuple[Box, Size]  # a box and the size of its image, in pixels
_Axis = tuple[tuple[float, float], tuple[float, float]]  # near and far end of a box: in pixels, as fractions


def convert(
    raw: Any, where: str = "record", *, kind: str = "region", bins: int = 8, prefix: str = "", prompted: bool = True,
    crop_margin: int = 0, notes: Counter[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One Visual-CoT record of either layout as a VPT record.

    Args:
        raw: the decoded JSON.
        where: file and line, for messages.
        kind: `region`, `none`, or the word that spells a re-encoder's tokens (`detection`).
        bins: regions are cells of a grid of bins x bins.
        prefix: folder put before image paths.
        prompted: whether the question ends with the sentence that asks for perception.
        crop_margin: cells by which the crop is widened on each side; the region tokens do not change.
        notes: counts `clipped` boxes and `unsure` regions, whose cells hang on a size not known to the pixel.

    Raises:
        DataError: with `where` and what is wrong.
    """
    notes = Counter() if notes is None else notes
    question, answer, path = _asked(raw, where)
    image = str(PurePosixPath(prefix) / path)
    images, turns, prompt = [image], [], REENCODE_PROMPT
    if kind == "region":
        readings = (_solved_box if "conversations" in raw else _united_boxes)(raw, where, notes)
        region, box = look(readings, notes, bins=bins, crop_margin=crop_margin)
        images.append(str(ImageRef(image, box)))
        turns, prompt = [region.to_text(), "<image>"], REGION_PROMPT
    elif kind != "none":
        turns = ["".join(action_tokens(kind)), f"<{kind}_image>"]
    asked = f"{question} {prompt}" if prompted and turns else question
    record = {key: raw[key] for key in ("dataset", "question_id") if key in raw}
    record["messages"] = [
        {"role": ("user", "assistant")[turn % 2], "content": content}
        for turn, content in enumerate([f"<image>\n{asked}", *turns, answer])
    ]
    record["images"] = images
    encoders = PUBLISHED if kind in ("region", "none") else dict.fromkeys((*PUBLISHED, kind))
    record |= {f"{token}_images": [image] if token == kind else [] for token in encoders}
    parse_record(record, where=where, encoder_tokens={kind: kind})
    return record


def look(
    readings: Sequence[Reading], notes: Counter[str], *, bins: int, crop_margin: int
) -> tuple[Region, tuple[int, int, int, int]]:
    """The cells of the best (first) reading, and their crop in pixels, kept inside the smallest image it may be."""
    cells = [Region.from_box(box, size, bins=bins) for box, size in readings]
    notes["unsure"] += len(set(cells)) > 1
    x0, y0, x1, y1 = cells[0].to_box(readings[0][1], bins=bins, margin=crop_margin)
    width, height = (min(extents) for extents in zip(*(size for _, size in readings), strict=True))
    return cells[0], (x0, y0, min(x1, width), min(y1, height))


def _asked(raw: Any, where: str) -> tuple[str, str, str]:
    """Question, answer and path of the image."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: a Visual-CoT record is an object, not {short(raw)}")
    if "conversations" not in raw:
        return _text(raw, "question", where), _text(raw, "answer", where), _text(raw, "image", where)
    question, *_, answer = _turns(raw, where)
    return question.replace("<image>", "").replace(BOX_PROMPT, "").strip(), answer, _paths(raw, where)[0]


def _united_boxes(raw: dict[str, Any], where: str, notes: Counter[str]) -> list[Reading]:
    """The union of a metadata record's boxes."""
    width, height = _get(raw, "width", int, where), _get(raw, "height", int, where)
    if width < 1 or height < 1:
        raise DataError(f"{where}: an image of {width}x{height} pixels; `width` and `height` must be at least 1")
    boxes = [_numbers(box, f"{where}: a box in `bboxs`") for box in _get(raw, "bboxs", list, where)]
    if not boxes:
        raise DataError(f"{where}: `bboxs` is empty; a region needs a box, or use --kind none")
    x0, y0, x1, y1 = zip(*(_clip(box, (width, height), where, notes) for box in boxes), strict=True)
    return [((min(x0), min(y0), max(x1), max(y1)), (width, height))]


def _solved_box(raw: dict[str, Any], where: str, notes: Counter[str]) -> list[Reading]:
    """The box of a benchmark record under every size that its image may have, the best guess first."""
    path, crop = _paths(raw, where)
    start, _, listed = crop.partition("###")
    if start != path:
        raise DataError(f"{where}: `image` must be [PATH, PATH###[x0, y0, x1, y1]], not {short([path, crop])}")
    x0, y0, x1, y1 = _numbers(listed, f"{where}: what follows ### in `image`")
    pixels = int(x0), int(y0), int(x1), int(y1)
    fractions = _numbers(_turns(raw, where)[1], f"{where}: the box in `conversations`")
    sizes, padded = image_sizes(pixels, fractions)
    if not sizes:
        raise DataError(
            f"{where}: box {list(fractions)} in fractions, {list(pixels)} in pixels: no image size agrees with both or "
            "too many do; mend one of them, or use --on-error skip"
        )
    smallest = min(size[0] for size in sizes), min(size[1] for size in sizes)
    ends = _clip(pixels, smallest, where, notes)

    def exact(size: Size) -> Box:
        """The fractions in pixels: sharper than whole pixels in small images, and at most a pixel away from them."""
        spans = (max(size), max(size)) if padded else size
        values = [
            min(max(fraction * spans[i % 2] - (spans[i % 2] - size[i % 2]) // 2, end), end + 0.999, smallest[i % 2])
            for i, (fraction, end) in enumerate(zip(fractions, ends, strict=True))
        ]
        return values[0], values[1], values[2], values[3]

    return [(exact(size), size) for size in sizes]


def image_sizes(pixels: Box, fractions: Box) -> tuple[list[Size], bool]:
    """Every image size under which both spellings of a box agree, the most central first; empty if it cannot be told.

    The flag says whether fractions are of the padded square; if no size fits that, they are taken as fractions of the
    image itself. Sides come out exact to a pixel or two, but a box of a few pixels leaves tens of sizes open.
    """
    if min(fractions[2:]) <= 2 * ROUNDING:  # nothing but the corner: sizes would be known to a factor of three
        return [], False
    x, y = [((pixels[i], pixels[i + 2]), (fractions[i], fractions[i + 2])) for i in (0, 1)]
    widths, heights = ([side for side in _sides(axis) if 0 in _paddings(axis, side)] for axis in (x, y))
    wide = {(w, w - 2 * pad - odd) for w in widths for pad in _paddings(y, w) for odd in (0, 1)}
    tall = {(h - 2 * pad - odd, h) for h in heights for pad in _paddings(x, h) for odd in (0, 1)}
    sizes = [size for size in wide | tall if min(size) > 0]
    padded = bool(sizes)
    if not padded:  # the two sides are independent: smallest, middle and largest of each will do
        some_widths, some_heights = ({s[0], s[len(s) // 2], s[-1]} if s else set() for s in (widths, heights))
        sizes = [(w, h) for w in some_widths for h in some_heights]
    over = [max(pixels[2] - size[0], pixels[3] - size[1], 0) for size in sizes]
    least = min(over, default=0)
    sizes = [size for size, beyond in zip(sizes, over, strict=True) if beyond == least]
    centre = [sum(extents) / len(sizes) for extents in zip(*sizes, strict=True)]
    return sorted(sizes, key=lambda s: ((s[0] - centre[0]) ** 2 + (s[1] - centre[1]) ** 2, s)), padded


def _sides(axis: _Axis) -> range:
    """Sides in pixels that may carry the far end of a box along an axis without padding."""
    pixel, fraction = axis[0][1], axis[1][1]
    longest = min((pixel + 1) / (fraction - ROUNDING), LONGEST_SIDE)
    return range(max(floor(pixel / (fraction + ROUNDING)), 1), floor(longest) + 1)


def _paddings(axis: _Axis, side: int) -> range:
    """Paddings in pixels that bring both ends of a box from their pixel to their fraction of `side`."""
    slack = ROUNDING * side + 1e-6
    ends = list(zip(*axis, strict=True))
    low = max(fraction * side - slack - (pixel + 1) for pixel, fraction in ends)
    high = min(fraction * side + slack - (pixel - (pixel < 0)) for pixel, fraction in ends)  # int(-0.5) is 0
    return range(max(floor(low) + 1, 0), floor(high) + 1)


def _clip(box: Box, size: Size, where: str, notes: Counter[str]) -> Box:
    """The part of a box inside its image; all in pixels. Raises DataError beyond OVERHANG, or where no area is left."""
    (x0, y0, x1, y1), (width, height) = box, size
    inside = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    over = max(abs(end - kept) for end, kept in zip(box, inside, strict=True))
    named = f"{where}: box {list(box)} in an image of {width}x{height} pixels"
    if over > OVERHANG:
        raise DataError(f"{named} leaves it by {over:g}, allowed are {OVERHANG}; mend it, or use --on-error skip")
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise DataError(f"{named} has no area (x0,y0,x1,y1 with x0 < x1 and y0 < y1); mend it, or use --on-error skip")
    notes["clipped"] += over > 0
    return inside


def _get(raw: dict[str, Any], key: str, type_: type, where: str) -> Any:
    if key not in raw:
        raise DataError(f"{where}: key `{key}` is missing; there is {', '.join(raw) or 'none'}")
    if not isinstance(raw[key], type_) or isinstance(raw[key], bool):
        raise DataError(f"{where}: `{key}` must be of type {type_.__name__}, not {short(raw[key])}")
    return raw[key]


def _text(raw: dict[str, Any], key: str, where: str) -> str:
    text = _get(raw, key, str, where).strip()
    if not text:
        raise DataError(f"{where}: `{key}` is empty")
    return text


def _turns(raw: dict[str, Any], where: str) -> list[str]:
    """What is said in a benchmark record: question, box in fractions, `<image>`, answer."""
    turns = _get(raw, "conversations", list, where)
    if len(turns) != 4 or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: `conversations` must hold 4 turns (question, box, <image>, answer): {short(turns)}")
    return [_text(turn, "value", f"{where}: conversations[{number}]") for number, turn in enumerate(turns)]


def _paths(raw: dict[str, Any], where: str) -> tuple[str, str]:
    paths = _get(raw, "image", list, where)
    if len(paths) != 2 or not all(isinstance(path, str) and path for path in paths):
        raise DataError(f"{where}: `image` must be [PATH, PATH###[x0, y0, x1, y1]], not {short(paths)}")
    return paths[0], paths[1]


def _numbers(box: Any, what: str) -> Box:
    """Four finite numbers, from a list or from its JSON."""
    try:
        values = json.loads(box) if isinstance(box, str) else box
    except ValueError:
        values = None
    numbers = isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in values)
    if not numbers or len(values) != 4:
        raise DataError(f"{what} must be four numbers [x0, y0, x1, y1], not {short(box)}")
    return values[0], values[1], values[2], values[3]


def read(source: Path) -> list[tuple[int, str]]:
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
    pieces, notes, skipped, written = read(source)[:limit], Counter[str](), list[DataError](), 0
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
    add("--crop-margin", type=whole, default=0, metavar="N", help="cells by which crops are widened; default 0")
    add("--prefix", default="", metavar="DIR", help="folder to put before image paths, below data.root")
    add("--no-prompt", dest="prompted", action="store_false", help="Free Choice: do not ask for perception")
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
        print(convert_file(source, target, converter=partial(convert, **options), limit=limit, skip=skip))
    except DataError as error:
        fail(error)


if __name__ == "__main__":
    main()
