"""Visual-CoT records, of metadata and of benchmark files, to VPT records."""

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path, PurePosixPath
from reprlib import repr as short
from typing import Any

from vpt.data.images import MediaStore
from vpt.data.records import PUBLISHED, REENCODE_PROMPT, REGION_PROMPT, parse_record
from vpt.data.references import ImageRef, Size
from vpt.data.visual_cot.boxes import BoxCandidate, checked_numbers, infer_box, united_box
from vpt.errors import DataError
from vpt.perception.regions import Region
from vpt.perception.tokens import action_tokens

BOX_PROMPT = "Please provide the bounding box coordinate of the region that can help you answer the question better."


def convert_record(
    raw: Any, where: str = "record", *, kind: str = "region", bins: int = 8, prefix: str = "",
    action_prompt: bool = True, region_format: str = "tokens", crop_margin: int = 0, images: Path | None = None,
    notes: Counter[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One Visual-CoT record of either layout as a VPT record.

    Args:
        raw: the decoded JSON.
        where: file and line, for messages.
        kind: `region`, `none`, or the word that spells a re-encoder's tokens (`detection`).
        bins: regions are cells of a grid of bins x bins.
        region_format: `tokens`, or `text`: the cells as `[x0, y0, x1, y1]`.
        prefix: folder put before image paths; what ends it and begins a path is written once.
        action_prompt: whether the question ends with the sentence that asks for perception.
        crop_margin: cells by which the crop is widened on each side; the region tokens do not change.
        images: folder that the paths start from, to read sizes there; else they are what `raw` says or implies.
        notes: counts `clipped` boxes and `unsure` regions, whose cells hang on a size not known to the pixel.

    Raises DataError with `where` and what is wrong.
    """
    notes = Counter() if notes is None else notes
    question, answer, path = _asked(raw, where)
    image = joined(prefix, path)
    shown, turns, prompt, evidence = [image], [], REENCODE_PROMPT, {}
    if kind == "region":
        size = None if images is None else _stored_size(images, image, where)
        readings = (_benchmark_box if "conversations" in raw else _metadata_box)(raw, where, notes, size)
        region, crop = choose_region(readings, notes, bins=bins, crop_margin=crop_margin)
        shown.append(str(ImageRef(image, crop)))
        turns = [region.to_numbers() if region_format == "text" else region.to_text(), "<image>"]
        prompt, evidence = REGION_PROMPT, {"box": list(readings[0][0]), "region_bins": bins, "crop_margin": crop_margin}
        if size or "conversations" not in raw:  # what boxes imply is not exact
            evidence["image_size"] = list(readings[0][1])
    elif kind != "none":
        turns = ["".join(action_tokens(kind)), f"<{kind}_image>"]
    asked = f"{question} {prompt}" if action_prompt and turns else question
    record = {key: raw[key] for key in ("dataset", "question_id") if key in raw} | evidence
    spoken = zip(cycle(("user", "assistant")), [f"<image>\n{asked}", *turns, answer])
    record["messages"] = [{"role": role, "content": content} for role, content in spoken]
    record["images"] = shown
    encoders = PUBLISHED if kind in ("region", "none") else dict.fromkeys((*PUBLISHED, kind))
    record |= {f"{token}_images": [image] if token == kind else [] for token in encoders}
    parse_record(record, where=where, encoder_tokens={kind: kind})
    return record


def _stored_size(images: Path, image: str, where: str) -> Size:
    """Width and height of a file of any size: it is not decoded."""
    return MediaStore(images, max_pixels=sys.maxsize).size(ImageRef.read(image, where), where=where)


def joined(prefix: str, path: str) -> str:
    """The path below a folder. Benchmark files bring folders (`cot/docvqa/1.png`), which the prefix may name too."""
    folders, parts = PurePosixPath(prefix).parts, PurePosixPath(path).parts
    shared = next((n for n in range(len(folders), 0, -1) if folders[-n:] == parts[:n]), 0)
    return str(PurePosixPath(prefix, *parts[shared:]))


def choose_region(
    readings: Sequence[BoxCandidate], notes: Counter[str], *, bins: int, crop_margin: int
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


def _metadata_box(raw: dict[str, Any], where: str, notes: Counter[str], size: Size | None) -> list[BoxCandidate]:
    """The union of a metadata record's boxes; `size` is that of its image, where it was read."""
    width, height = _get(raw, "width", int, where), _get(raw, "height", int, where)
    if width < 1 or height < 1:
        raise DataError(f"{where}: an image of {width}x{height} pixels; `width` and `height` must be at least 1")
    if size not in (None, (width, height)):
        raise DataError(
            f"{where}: the image has {size} pixels, `width` and `height` say {(width, height)}; bring the image that "
            "the record was made for, or use --on-error skip"
        )
    boxes = [checked_numbers(box, f"{where}: a box in `bboxs`") for box in _get(raw, "bboxs", list, where)]
    if not boxes:
        raise DataError(f"{where}: `bboxs` is empty; a region needs a box, or use --kind none")
    return [united_box(boxes, (width, height), where, notes)]


def _benchmark_box(raw: dict[str, Any], where: str, notes: Counter[str], size: Size | None) -> list[BoxCandidate]:
    """The box of a benchmark record under every size that its image may have, the best guess first, or under `size`."""
    path, crop = _paths(raw, where)
    start, _, listed = crop.partition("###")
    if start != path:
        raise DataError(f"{where}: `image` must be [PATH, PATH###[x0, y0, x1, y1]], not {short([path, crop])}")
    pixels = checked_numbers(listed, f"{where}: what follows ### in `image`")
    fractions = checked_numbers(_turns(raw, where)[1], f"{where}: the box in `conversations`")
    return infer_box(pixels, fractions, where, notes, size=size)


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
    """The texts of a benchmark record: question, box in fractions, `<image>`, answer."""
    turns = _get(raw, "conversations", list, where)
    if len(turns) != 4 or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: `conversations` must hold 4 turns (question, box, <image>, answer): {short(turns)}")
    return [_text(turn, "value", f"{where}: conversations[{number}]") for number, turn in enumerate(turns)]


def _paths(raw: dict[str, Any], where: str) -> tuple[str, str]:
    paths = _get(raw, "image", list, where)
    if len(paths) != 2 or not all(isinstance(path, str) and path for path in paths):
        raise DataError(f"{where}: `image` must be [PATH, PATH###[x0, y0, x1, y1]], not {short(paths)}")
    return paths[0], paths[1]
