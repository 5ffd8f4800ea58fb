"""The picture of one reply: the image, the selected regions, and the similarity maps of the control states."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vpt.generation.row_state import IGNORED, REPAIRED, Answer, PerceptionStep
from vpt.generation.similarity_map import SimilarityMap
from vpt.perception.regions import Box

REGION_COLOUR, SEEN_COLOUR, QUIET = "#e8590c", "#1971c2", "#666666"
PANEL = 4.2  # inches along a panel's longer side
MOST_COLUMNS = 3
TEXT = {"parse_math": False}  # a dollar in a question is a dollar


def draw_reply(
    path: Path, *, image: Image.Image, question: str, answer: Answer, maps: Sequence[SimilarityMap | None]
) -> Path:
    """Write the picture to `path`; its suffix says the format (png, pdf, svg, ...). `maps` are those of the trace."""
    shown = [(step, found) for step, found in zip(answer.trace, maps, strict=True) if step.status != IGNORED]
    columns = min(len(shown) + 1, MOST_COLUMNS)
    rows = math.ceil((len(shown) + 1) / columns)
    figure = _figure(image, columns, rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    _draw_image(axes[0], image, [step for step, _ in shown])
    for number, (axis, (step, found)) in enumerate(zip(axes[1:], shown, strict=False), start=1):
        if step.box is not None:
            _draw_crop(axis, image, step, number)
        else:
            _draw_map(axis, image, step, found, number)
    for axis in axes[len(shown) + 1 :]:
        axis.axis("off")
    figure.suptitle(_wrapped(question, 30 * columns), weight="bold", fontsize=13, **TEXT)
    figure.supxlabel(_wrapped(_said(answer), 26 * columns), fontsize=15, weight="bold", **TEXT)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return path


def _figure(image: Image.Image, columns: int, rows: int) -> Figure:
    longest = max(image.size)
    width, height = (PANEL * max(extent / longest, 0.35) for extent in image.size)
    figure = Figure(figsize=(columns * (width + 0.9), rows * (height + 0.7) + 1.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    return figure


def _said(answer: Answer) -> str:
    ignored = sum(step.status == IGNORED for step in answer.trace)
    notes = [f"{ignored} request(s) ignored"] if ignored else []
    notes += [] if answer.complete else ["cut off"]
    return (answer.text or "(no answer)") + (f"   ({', '.join(notes)})" if notes else "")


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill("".join(c if c.isprintable() else " " for c in text), width, max_lines=6)


def _draw_image(axis: Axes, image: Image.Image, steps: list[PerceptionStep]) -> None:
    _show(axis, image)
    numbers: dict[Box, list[str]] = {}  # the same region may be looked at again
    for number, step in enumerate(steps, start=1):
        if step.box is not None:
            numbers.setdefault(step.box, []).append(str(number))
    for box, named in numbers.items():
        axis.add_patch(_frame(box, REGION_COLOUR, linewidth=2.5))
        label = axis.annotate(
            ", ".join(named), (box[0] - 0.5, box[1] - 0.5), xytext=(3, -3), textcoords="offset points", ha="left",
            va="top", color="white", weight="bold", fontsize=10,
        )  # fmt: skip
        label.set_bbox({"facecolor": REGION_COLOUR, "edgecolor": "none", "pad": 2})
    note = "" if steps else ", answered at once"
    axis.set_title(f"the image{note}\n{image.width} x {image.height} pixels", fontsize=10)


def _draw_crop(axis: Axes, image: Image.Image, step: PerceptionStep, number: int) -> None:
    assert step.box is not None
    crop = image.crop(step.box)
    _show(axis, crop)
    for spine in axis.spines.values():
        spine.set(visible=True, color=REGION_COLOUR, linewidth=2.5)
    mended = ", mended" if step.status == REPAIRED else ""
    axis.set_title(
        f"{number}  region{mended}: {crop.width} x {crop.height} pixels\nseen as {step.visual_tokens} tokens",
        fontsize=10,
    )


def _draw_map(axis: Axes, image: Image.Image, step: PerceptionStep, found: SimilarityMap | None, number: int) -> None:
    """The map over a grey image. Colours are centred on the median token: what was sought stands out both ways."""
    if found is None:
        _show(axis, image)
        axis.set_title(f"{number}  {step.kind}: {step.visual_tokens} tokens\nno control state steered it", fontsize=10)
        return
    _show(axis, image.convert("L"))
    x0, y0, x1, y1 = found.extent
    extent = (x0 - 0.5, x1 - 0.5, y1 - 0.5, y0 - 0.5)
    middle = float(np.median(found.values))
    reach = max(float(np.abs(found.values - middle).max()), 1e-6)
    shade = axis.imshow(
        found.values, extent=extent, cmap="RdBu_r", vmin=middle - reach, vmax=middle + reach, alpha=0.65,
        interpolation="nearest",
    )  # fmt: skip
    axis.set(xlim=(-0.5, image.width - 0.5), ylim=(image.height - 0.5, -0.5))
    partial = x0 > 0.5 or y0 > 0.5 or x1 < image.width - 0.5 or y1 < image.height - 0.5
    if partial:
        axis.add_patch(_frame(found.extent, SEEN_COLOUR, linewidth=1.5, linestyle="--"))
    bar = axis.figure.colorbar(shade, cax=axis.inset_axes((1.03, 0, 0.04, 1)))
    bar.solids.set(alpha=1)  # type: ignore[union-attr]
    bar.set_label("f·c", fontsize=10)
    bar.ax.tick_params(labelsize=8)
    rows, columns = found.values.shape
    dashed = ", dashed: what it sees" if partial else ""
    title = f"{number}  {step.kind}: what the control state looked for\n"
    title += f"{columns} x {rows} tokens, white: the median{dashed}"
    axis.set_title(title, fontsize=10)


def _show(axis: Axes, image: Image.Image) -> None:
    grey = image.mode == "L"
    axis.imshow(
        np.asarray(image), cmap="gray" if grey else None, vmin=0 if grey else None, vmax=255 if grey else None,
        interpolation="nearest" if max(image.size) < 300 else "antialiased",
    )  # fmt: skip
    axis.set(xticks=[], yticks=[], anchor="N")
    for spine in axis.spines.values():
        spine.set(color="#cccccc")


def _frame(box: tuple[float, float, float, float], colour: str, **line: object) -> Rectangle:
    x0, y0, x1, y1 = box
    return Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, clip_on=False, **line)  # type: ignore[arg-type]
