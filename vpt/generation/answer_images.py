"""Images of one answer: its image with regions, crops and similarity maps; and their composition into one figure."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import east_asian_width

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vpt.data.records import Pixels
from vpt.generation.row_state import IGNORED, REPAIRED, Answer, PerceptionStep
from vpt.generation.similarity_map import SimilarityMap
from vpt.utils.drawing import save

REGION_COLOUR, EVIDENCE_COLOUR, SEEN_COLOUR = (232, 89, 12), (11, 143, 122), (25, 113, 194)
SIDE = 420  # pixels along the longer side of an image
MOST_COLUMNS = 3  # of the figure of a reply


@dataclass(frozen=True)
class CaptionedImage:
    """An image, its caption, and a verdict below it in its own colour."""

    caption: str
    image: Image.Image
    verdict: str = ""
    colour: str = "black"


def answer_images(
    image: Image.Image, trace: Sequence[PerceptionStep], maps: Sequence[SimilarityMap | None], *,
    evidence: Pixels | None = None,
) -> list[CaptionedImage]:  # fmt: skip
    """The image with all regions in it, then the crop or the similarity map of each step that was shown.

    Args:
        image: at full resolution.
        trace: what the model asked for.
        maps: of each step, as `similarity_maps` returns them; or none at all.
        evidence: the true box, where it is known.
    """
    pairs = zip(trace, maps or [None] * len(trace), strict=True)
    steps = [(step, found) for step, found in pairs if step.status != IGNORED]
    numbers: dict[Pixels, list[str]] = {}  # the same region may be shown more than once
    for number, (step, _) in enumerate(steps, start=1):
        if step.box:
            numbers.setdefault(step.box, []).append(str(number))
    drawn = scaled(image)
    if evidence:
        _frame(drawn, image, evidence, EVIDENCE_COLOUR)
    for box, named in numbers.items():
        _frame(drawn, image, box, REGION_COLOUR, label=", ".join(named))
    names = [
        ("orange: what it chose", bool(numbers)),
        ("green: the evidence", bool(evidence)),
        ("answered at once", not steps),
    ]
    caption = "; ".join([f"{image.width} x {image.height} pixels", *(name for name, there in names if there)])
    return [
        CaptionedImage(caption, drawn),
        *(_step_image(image, *pair, number) for number, pair in enumerate(steps, 1)),
    ]


def _step_image(image: Image.Image, step: PerceptionStep, found: SimilarityMap | None, number: int) -> CaptionedImage:
    if step.box:
        x0, y0, x1, y1 = step.box
        repaired = ", repaired" if step.status == REPAIRED else ""
        caption = f"{number}: region{repaired}, {x1 - x0} x {y1 - y0} pixels as {step.visual_tokens} tokens"
        return CaptionedImage(caption, scaled(image.crop(step.box)))
    caption = f"{number}: {step.kind}, {step.visual_tokens} tokens"
    if found is None:
        return CaptionedImage(caption, scaled(image))
    middle, reach = _colour_range(found)
    partial = (
        found.extent[0] > 0.5
        or found.extent[1] > 0.5
        or found.extent[2] < image.width - 0.5
        or found.extent[3] < image.height - 0.5
    )
    rows, columns = found.values.shape
    caption += (
        f" ({columns} x {rows}): f·c from {_short(middle - reach)}, blue, to {_short(middle + reach)}, red; "
        "white: the median" + "; blue frame: what it sees" * partial
    )
    return CaptionedImage(caption, _shaded(image, found, framed=partial))


def step_note(step: PerceptionStep) -> str:
    """Tokens and control-state norm of a step, or that it was ignored."""
    norm = "" if step.state_norm is None else f", |c| {step.state_norm:.1f}"
    return f"{step.kind}: {step.status}" if step.status == IGNORED else f"{step.visual_tokens} tokens{norm}"


def scaled(image: Image.Image) -> Image.Image:
    """The image with its longer side `SIDE`; enlarged it keeps its sharp pixels."""
    factor = SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor > 1.5 else Image.Resampling.LANCZOS)


def _frame(
    drawn: Image.Image, image: Image.Image, box: tuple[float, ...], colour: tuple[int, int, int], *, label: str = ""
) -> None:
    """Draw a box of `image` into its scaled copy, with a white rim and a number in its corner."""
    pen, factor = ImageDraw.Draw(drawn), drawn.width / image.width
    x0, y0, x1, y1 = (round(edge * factor) for edge in box)
    x1, y1 = max(x1, x0 + 2), max(y1, y0 + 2)
    pen.rectangle((x0 - 1, y0 - 1, x1, y1), outline="white", width=5)
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=3)
    if label:
        font = ImageFont.load_default(15)
        left, top = min(max(x0, 0), drawn.width - 16), min(max(y0, 0), drawn.height - 20)
        pen.rectangle((left, top, left + pen.textlength(label, font) + 7, top + 19), fill=colour)
        pen.text((left + 4, top + 1), label, fill="white", font=font)


def _colour_range(found: SimilarityMap) -> tuple[float, float]:
    """Median of the values and their greatest distance from it: what was sought stands out both ways."""
    middle = float(np.median(found.values))
    return middle, max(float(np.abs(found.values - middle).max()), 1e-6)


def _map_colours(found: SimilarityMap) -> np.ndarray:
    """[rows, columns, 3], from 0 to 1: red above the median, blue below."""
    middle, reach = _colour_range(found)
    return matplotlib.colormaps["RdBu_r"]((found.values - middle) / (2 * reach) + 0.5)[..., :3]


def _shaded(image: Image.Image, found: SimilarityMap, *, framed: bool) -> Image.Image:
    """The grey image under f·c, red above the median, blue below."""
    drawn = scaled(image).convert("L").convert("RGB")
    shades = _map_colours(found)
    x0, y0, x1, y1 = (round(edge * drawn.width / image.width) for edge in found.extent)
    shade = Image.fromarray((shades * 255).astype(np.uint8)).resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST)
    drawn.paste(shade, (x0, y0), Image.new("L", shade.size, 165))
    if framed:
        _frame(drawn, image, found.extent, SEEN_COLOUR)
    return drawn


def draw_reply(path: Path, *, question: str, answer: Answer, images: Sequence[CaptionedImage]) -> Path:
    """Write the images of an answer under its question to `path`; its suffix says the format (png, pdf, svg, ...)."""
    ignored = sum(step.status == IGNORED for step in answer.trace)
    notes = [f"{ignored} request(s) ignored"] * bool(ignored) + ["cut off"] * (not answer.complete)
    said = (answer.text or "(no answer)") + (f"   ({', '.join(notes)})" if notes else "")
    return draw_grid(path, images, columns=min(len(images), MOST_COLUMNS), title=question, footer=said)


def draw_grid(
    path: Path, images: Sequence[CaptionedImage], *, columns: int, title: str, footer: str = "", width: float = 4.2
) -> Path:
    """Write captioned images side by side to `path`, each `width` inches wide at most."""
    rows = max(1, math.ceil(len(images) / columns))
    letters = int(width * 10.5)  # of a caption's line
    captions = ["\n".join(wrapped(line, letters) for line in each.caption.split("\n")) for each in images]
    verdicts = [wrapped(each.verdict, letters - 4) for each in images]
    room = 0.17 * _most_lines(captions) + 0.19 * _most_lines(verdicts) + 0.1
    sides = [max((each.image.size[axis] / max(each.image.size) for each in images), default=1) for axis in (0, 1)]
    texts = [wrapped(title, int(columns * width * 7)), wrapped(footer, int(columns * width * 6.5))]
    height = rows * (width * sides[1] + room + 0.15) + sum(0.25 * _most_lines([text]) for text in texts) + 0.3
    figure = Figure(figsize=(columns * (width * max(sides[0], 0.7) + 0.2), height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, each, caption, verdict in zip(axes, images, captions, verdicts, strict=False):
        axis.imshow(each.image, interpolation="antialiased")
        axis.set(xticks=[], yticks=[], anchor="N")
        axis.spines[:].set_color("#cccccc")
        axis.set_title(caption, fontsize=10, parse_math=False)
        axis.set_xlabel(verdict, fontsize=11, color=each.colour, weight="bold", parse_math=False)
    for axis in list(axes)[len(images) :]:
        axis.axis("off")
    figure.suptitle(texts[0], weight="bold", fontsize=13, parse_math=False)
    figure.supxlabel(texts[1], weight="bold", fontsize=14, parse_math=False)
    save(figure, path)
    return path


def _most_lines(texts: Sequence[str]) -> int:
    return max((text.count("\n") + 1 for text in texts if text), default=0)


def wrapped(text: str, width: int) -> str:
    """Printable text in at most six lines; letters of double width count as two."""
    text = "".join(c if c.isprintable() else " " for c in text)
    wide = sum(east_asian_width(c) in "WF" for c in text)
    width = max(width * len(text) // max(len(text) + wide, 1), 8)
    return textwrap.fill(text, width, max_lines=6, placeholder=" ...")


def _short(value: float) -> str:
    """Two significant digits, without an exponent for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"
