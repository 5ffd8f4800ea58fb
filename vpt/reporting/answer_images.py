"""Pictures of one answer: the image with its boxes, what was looked at again, what was looked for."""

from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from vpt.data.records import Pixels
from vpt.evaluation.predictions import Prediction
from vpt.generation.row_state import REPAIRED, PerceptionStep
from vpt.generation.similarity_map import SimilarityMap

SEEN, TRUE = (232, 89, 12), (11, 143, 122)
SIDE = 420  # pixels along the longer side of a picture


@dataclass(frozen=True)
class CaptionedImage:
    """A picture and what it shows."""

    caption: str
    image: Image.Image


def answer_images(image: Image.Image, item: Prediction, maps: list[SimilarityMap | None]) -> list[CaptionedImage]:
    """The image with the boxes of all regions and the true one, then for each act of perception what it showed.

    Args:
        image: what the question is about, at full resolution.
        item: the answer.
        maps: as `trace_maps` gives them; empty where there are none.
    """
    boxes = [step.box for step in item.perceived if step.box]
    found = dict(zip(map(id, item.trace), maps, strict=False))
    shown = [CaptionedImage(_legend(image, bool(boxes), item.box is not None), _boxed(image, boxes, item.box))]
    for step in item.perceived:
        searched = found.get(id(step))
        if step.box:
            shown.append(CaptionedImage(_about(step, image), scaled(image.crop(step.box), SIDE // 2)))
        elif searched is not None:
            shown.append(
                CaptionedImage(f"{step.kind}, {step.visual_tokens} tokens: f·c, red is more", _mapped(image, searched))
            )
    return shown


def _legend(image: Image.Image, seen: bool, true: bool) -> str:
    names = [name for name, there in (("orange: what it chose", seen), ("green: the evidence", true)) if there]
    return "; ".join([f"{image.width} x {image.height} pixels", *names])


def _about(step: PerceptionStep, image: Image.Image) -> str:
    assert step.box is not None
    x0, y0, x1, y1 = step.box
    mended = ", mended" if step.status == REPAIRED else ""
    return f"region{mended}: {x1 - x0} x {y1 - y0} pixels as {step.visual_tokens} tokens"


def scaled(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side `side`; enlarged it keeps its sharp pixels."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor > 1.5 else Image.Resampling.LANCZOS)


def _boxed(image: Image.Image, boxes: list[Pixels], true: Pixels | None) -> Image.Image:
    drawn = scaled(image, SIDE)
    pen, factor = ImageDraw.Draw(drawn), drawn.width / image.width
    for box, colour, width in [*([(true, TRUE, 2)] if true else []), *((box, SEEN, 3) for box in boxes)]:
        x0, y0, x1, y1 = (round(edge * factor) for edge in box)
        pen.rectangle((x0 - 1, y0 - 1, x1, y1), outline=(255, 255, 255), width=width + 2)
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=width)
    return drawn


def _mapped(image: Image.Image, found: SimilarityMap) -> Image.Image:
    """Red over grey where f·c is above its median, blue where it is below."""
    drawn = scaled(image, SIDE // 2).convert("L").convert("RGB")
    middle = float(np.median(found.values))
    reach = max(float(np.abs(found.values - middle).max()), 1e-6)
    shades = matplotlib.colormaps["RdBu_r"]((found.values - middle) / (2 * reach) + 0.5)[..., :3]
    x0, y0, x1, y1 = (round(edge * drawn.width / image.width) for edge in found.extent)
    shade = Image.fromarray((shades * 255).astype(np.uint8)).resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST)
    drawn.paste(shade, (x0, y0), Image.new("L", shade.size, 165))
    return drawn
