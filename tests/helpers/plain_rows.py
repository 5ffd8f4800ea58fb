"""A second writer of rows, slow and plain: from a conversation to ids, labels, positions and what steers what.

It shares no code with `vpt`: sizes come from transformers' `smart_resize`, text from transformers' tokenizer, and the rest
is written down as the design states it. A conversation is a list of turns, a turn a list of parts:

    ("text", words)                 anybody's words
    ("region", corners, numeric)    cells (x0, y0, x1, y1) that an assistant names, by tokens or by numbers
    ("action", token)               a re-encoding that an assistant requests
    ("image", token, path, corners) an image that a user shows, "" for the tower: all of it, or the cells that were named
    ("video", frames)               a video that a user shows

`as_record` spells it as a record; `write_row` writes the row that a model must be given for it.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

IGNORED, CELL, ENCODED = -100, 16, 4  # pixels along a token of the tiny tower; tokens along a side of DINO and SAM
NAMES = {"detection": "dino", "seg": "sam", "clip": "clip", "": "image"}


@dataclass(frozen=True)
class Settings:
    """What decides how a row is written. `sizes`: path -> (width, height); `box`: the evidence in the first image; `margin`:
    cells by which crops are wider."""

    tokenizer: Any
    sizes: dict[str, tuple[int, int]]
    written: int = 8
    bins: int = 8
    text: bool = False
    scale: int = 1
    positions: str = "mrope"
    reencoded: str = "sequential"
    box: tuple[int, int, int, int] | None = None
    margin: int = 0


@dataclass
class Written:
    """The row: every position of every token on its own."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    blocks: list[tuple[int, int, str]] = field(default_factory=list)  # first token, how many, whose
    actions: list[list] = field(default_factory=list)  # first control token, how many, whose, which block it steers
    paragraphs: list[list[int]] = field(default_factory=list)


def pixels(corners, size, bins, margin):
    """The pixels of cells, [x0 W / k, y0 H / k] to [(x1 + 1) W / k, (y1 + 1) H / k], `margin` cells wider."""
    (a, b, c, d), (width, height) = corners, size
    x0, x1 = max(min(a, c) - margin, 0), min(max(a, c) + margin, bins - 1)
    y0, y1 = max(min(b, d) - margin, 0), min(max(b, d) + margin, bins - 1)
    left, top = x0 * width // bins, y0 * height // bins
    return left, top, max((x1 + 1) * width // bins, left + 1), max((y1 + 1) * height // bins, top + 1)


def as_record(turns, settings: Settings, **metadata: Any) -> dict:
    """The record that a file of the grid `settings.written` holds."""
    record: dict[str, Any] = {"messages": [], **metadata}
    for role, parts in turns:
        content = ""
        for kind, *rest in parts:
            if kind == "text":
                content += rest[0]
            elif kind == "region":
                (a, b, c, d), numeric = rest
                tokens = f"<|region_token_start|><|x_{a}|><|y_{b}|><|x_{c}|><|y_{d}|><|region_token_end|>"
                content += f"[{a}, {b}, {c}, {d}]" if numeric else tokens
            elif kind == "action":
                content += f"<|{rest[0]}_action_start|><|{rest[0]}_action|><|{rest[0]}_action_end|>"
            elif kind == "image":
                token, path, corners = rest
                crop = ""
                if corners:
                    box = pixels(corners, settings.sizes[path], settings.written, settings.margin)
                    crop = "_%d,%d,%d,%d" % box
                content += f"<{token}_image>" if token else "<image>"
                record.setdefault(f"{token}_images" if token else "images", []).append(path + crop)
            else:
                content += "<video>"
                record.setdefault("videos", []).append({"frames": rest[0], "fps": 2.0})
        record["messages"].append({"role": role, "content": content})
    if settings.box:
        record["box"] = list(settings.box)
    if settings.written != 8:
        record["region_bins"] = settings.written
    if settings.margin:
        record["crop_margin"] = settings.margin
    return record


def cells(box, size, bins):
    """The cells of a box's top left and bottom right pixels; what leaves the image is cut off."""
    (x0, y0, x1, y1), (width, height) = box, size
    ends = (x0, width), (y0, height), (min(x1, width), width), (min(y1, height), height)
    return tuple(min(pixel * bins // extent, bins - 1) for pixel, extent in ends)


def moved(corners, path, settings: Settings, *, alone: bool, first: str | None):
    """The corners that the model is taught: in order, of its own grid, of the true box where that is known."""
    a, b, c, d = corners
    ordered = (min(a, c), min(b, d), max(a, c), max(b, d))
    if settings.written == settings.bins:
        return ordered
    if settings.box and alone and path is not None and path == first:
        return cells(settings.box, settings.sizes[path], settings.bins)
    return tuple(cell // (settings.written // settings.bins) for cell in ordered)


def grid(size, *, longest=512, most=1003520):
    """Rows and columns of tokens of an image: limited in size, then Qwen's own rule."""
    width, height = size
    scale = min(max(size), longest) / max(size)
    width, height = round(width * scale), round(height * scale)
    height, width = smart_resize(height, width, factor=CELL, min_pixels=3136, max_pixels=most)
    return height // CELL, width // CELL


def write_row(turns, settings: Settings) -> Written:
    """The whole row, token by token."""
    row, position, names = Written(), 0, settings.tokenizer.get_vocab()
    pending_text: list = ["", False]

    def token(id: int, *, loss: bool = False, at: tuple[int, int, int] | None = None) -> None:
        nonlocal position
        row.ids.append(id)
        row.labels.append(id if loss else IGNORED)
        row.positions.append(at or (position, position, position))
        position += at is None

    def flush() -> None:
        for id in settings.tokenizer.encode(pending_text[0], add_special_tokens=False):
            token(id, loss=pending_text[1])
        pending_text[:] = ["", False]

    def text(words: str, *, loss: bool = False) -> None:
        if loss != pending_text[1]:
            flush()
        pending_text[:] = [pending_text[0] + words, loss]

    def named(name: str, *, loss: bool = False) -> None:
        flush()
        token(names[name], loss=loss)

    def block(source: str, pad: str, frames: int, height: int, width: int) -> None:
        nonlocal position
        named("<|vision_start|>")
        for action in row.actions:
            if action[2] == source and action[3] is None:
                action[3] = len(row.blocks)
                break
        row.blocks.append((len(row.ids), frames * height * width, source))
        flat = settings.positions == "sequential" or (source != "image" and settings.reencoded == "sequential")
        start = position
        for frame in range(frames):
            for y in range(height):
                for x in range(width):
                    token(names[pad], at=None if flat else (start + frame, start + y, start + x))
        position += 0 if flat else max(height, width)
        named("<|vision_end|>")

    regions = [part for _, parts in turns for part in parts if part[0] == "region"]
    shown = [part for _, parts in turns for part in parts if part[0] in ("image", "video")]
    first = next(
        (p[2] if p[0] == "image" else p[1][len(p[1]) // 2] for p in shown if p[0] == "video" or not p[1]), None
    )
    paths = seen_in(turns)

    def corners_of(number: int):
        path = paths[number] or first
        return moved(regions[number][1], path, settings, alone=len(regions) == 1, first=first)

    spoken = crop = 0
    order = [number for number in range(len(regions)) if paths[number]]
    prompted = turns[0][0] == "system"
    if not prompted or not "".join(words for _, words in turns[0][1]):  # Qwen2-VL's own stands for an empty one
        turns = [("system", [("text", "You are a helpful assistant.")]), *turns[prompted:]]
    for number, (role, parts) in enumerate(turns):
        loss = role == "assistant"
        if number:
            text("\n")
        named("<|im_start|>")
        row.paragraphs.append([len(row.ids), 0])
        text(f"{role}\n")
        if loss:
            flush()
        for kind, *rest in parts:
            if kind == "text":
                text(rest[0], loss=loss)
            elif kind == "region":
                a, b, c, d = corners_of(spoken)
                spoken += 1
                if settings.text:
                    text(f"[{a}, {b}, {c}, {d}]", loss=True)
                    continue
                for name in ("region_token_start", f"x_{a}", f"y_{b}", f"x_{c}", f"y_{d}", "region_token_end"):
                    named(f"<|{name}|>", loss=True)
            elif kind == "action":
                named(f"<|{rest[0]}_action_start|>", loss=True)
                row.actions.append([len(row.ids), settings.scale, NAMES[rest[0]], None])
                for _ in range(settings.scale):
                    named(f"<|{rest[0]}_action|>")
                named(f"<|{rest[0]}_action_end|>", loss=True)
            elif kind == "video":
                height, width = grid(settings.sizes[rest[0][0]], most=100352)
                block("image", "<|video_pad|>", (len(rest[0]) + 1) // 2, height, width)
            elif rest[0] in ("detection", "seg"):
                block(NAMES[rest[0]], f"<|{rest[0]}_image_pad|>", 1, ENCODED, ENCODED)
            else:
                size = settings.sizes[rest[1]]
                if rest[2]:
                    box = pixels(rest[2], size, settings.written, settings.margin)
                    if settings.written != settings.bins:
                        box = pixels(corners_of(order[crop]), size, settings.bins, settings.margin)
                    crop += 1
                    size = box[2] - box[0], box[3] - box[1]
                pad = "<|clip_image_pad|>" if rest[0] else "<|image_pad|>"
                block(NAMES[rest[0]], pad, 1, *grid(size))
        flush()
        row.paragraphs[-1][1] = len(row.ids)
        named("<|im_end|>", loss=loss)
    return row


def seen_in(turns) -> list[str | None]:
    """For each region of a conversation, in order, the image whose crop the next turn shows for it, if any."""
    paths: list[str | None] = []
    for number, (_, parts) in enumerate(turns):
        named = sum(part[0] == "region" for part in parts)
        after = turns[number + 1][1] if number + 1 < len(turns) else []
        crops = [part[2] for part in after if part[0] == "image" and part[3]]
        paths += [*crops, *[None] * named][:named]
    return paths
