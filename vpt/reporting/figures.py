"""Pictures of a run: its curves, and a sheet of test questions with what the model did."""

import contextlib
import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from PIL import Image

from vpt.checkpoint.format import find_checkpoint, load_config
from vpt.config.former_names import present_metric
from vpt.config.schema import TrainConfig
from vpt.data.build import build_sources
from vpt.data.images import MediaStore
from vpt.data.references import ImageRef, VideoRef
from vpt.errors import DataError
from vpt.evaluation.ablations.runner import Comparison
from vpt.evaluation.predictions import PREDICTIONS, read_predictions
from vpt.generation.row_state import IGNORED

matplotlib.use("Agg")


RIGHT, WRONG = "#1b7f3b", "#c0392b"


def draw_run(folder: Path) -> list[Path]:
    """The pictures of a finished run: `curves.png`, and `samples.png` where questions were asked."""
    config = load_config(find_checkpoint(folder))
    sheet = draw_sheet(folder / "predictions", config, to=folder / "samples.png")
    return [draw_curves(folder), *([sheet] if sheet else [])]


def draw_curves(folder: Path) -> Path:
    """Loss, token accuracies, learning rate and speed over the steps of `metrics.jsonl`."""
    raw = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{present_metric(name): value for name, value in line.items()} for line in raw]
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    loss, perception, rates, speed = axes.flat
    _curve(loss, lines, "train/loss", "training", smooth=True)
    _curve(loss, lines, "eval/loss", "test")
    loss.set(title="loss per labelled token", yscale="log")
    names = sorted({key for line in lines for key in line if key.startswith("eval/perception/")})
    shown = [name for name in names if not name.rpartition("/")[2].startswith(("x_", "y_"))]
    _curve(perception, lines, "eval/token_accuracy", "all labelled tokens")
    for name in shown:
        _curve(perception, lines, name, name.rpartition("/")[2])
    if len(shown) < len(names):
        _mean_curve(perception, lines, [name for name in names if name not in shown], "region cells (mean)")
    perception.set(title="accuracy of each perception token (teacher-forced, test)", ylim=(-0.03, 1.03))
    _curve(rates, lines, "train/lr", "learning rate")
    rates.set(title="learning rate")
    _curve(speed, lines, "perf/tokens_per_second", "tokens per second", smooth=True)
    speed.set(title="tokens per second", ylim=(0, None))
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(folder.name, weight="bold")
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _curve(axis: Axes, lines: list[dict[str, Any]], key: str, label: str, *, smooth: bool = False) -> None:
    points = [(line["step"], line[key]) for line in lines if key in line]
    if not points:
        return
    steps, values = np.array(points).T
    if smooth and len(values) >= 20:
        axis.plot(steps, values, alpha=0.25, color="C0", linewidth=0.8)
        width = max(len(values) // 40, 3)
        values = np.convolve(np.pad(values, width // 2, mode="edge"), np.ones(width) / width, "valid")[: len(steps)]
    axis.plot(steps, values, label=label, marker="o" if len(steps) < 20 else None, markersize=3)


def _mean_curve(axis: Axes, lines: list[dict[str, Any]], keys: list[str], label: str) -> None:
    means = [
        {"step": line["step"], "mean": float(np.mean([line[key] for key in keys if key in line]))}
        for line in lines
        if any(key in line for key in keys)
    ]
    _curve(axis, means, "mean", label)


def draw_sheet(
    folder: Path, config: TrainConfig, *, to: Path | None = None, columns: int = 6, rows: int = 4
) -> Path | None:
    """Questions, what was perceived, answers: spread evenly over right and wrong ones of `predictions.jsonl`; None
    where that is empty.
    """
    lines = [asdict(item) for item in read_predictions(folder / PREDICTIONS)]  # those of version 0.1, too
    if not lines:
        return None
    chosen = _choose(lines, columns * rows)
    room = 0.15 * max((_title(item).count("\n") for item in chosen), default=0)  # inches for further lines of titles
    figure, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, (3.5 + room) * rows), layout="constrained")
    _, folders = build_sources(config.data.test, config, split="test")
    for axis in axes.flat:
        axis.axis("off")
    for axis, item in zip(axes.flat, chosen, strict=False):
        _draw_prediction(axis, item, folders)
    right = sum(line["correct"] for line in lines)
    layout = figure.get_layout_engine()
    if isinstance(layout, ConstrainedLayoutEngine):
        layout.set(h_pad=0.14 + room / 2)  # the lines below an image are outside its axes
    figure.suptitle(f"{right:,} of {len(lines):,} test questions right ({right / len(lines):.1%})", weight="bold")
    path = to or folder / "samples.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _choose(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """A third wrong ones where there are that many, the rest right ones, evenly spaced over the split."""
    wrong = [line for line in lines if not line["correct"]]
    right = [line for line in lines if line["correct"]]
    few = min(len(wrong), max(count // 3, count - len(right)))
    picked = [*_spaced(right, count - few), *_spaced(wrong, few)]
    return picked


def _spaced(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    if not lines or count <= 0:
        return []
    return [lines[i] for i in np.unique(np.linspace(0, len(lines) - 1, count).round().astype(int))]


def _open(reference: ImageRef, folders: list[MediaStore], where: str) -> Image.Image:
    """The image out of the first folder that has it."""
    for folder in folders[:-1]:
        with contextlib.suppress(DataError):
            return folder.original(reference, where=where)
    return folders[-1].original(reference, where=where)


def _first_image(item: dict[str, Any]) -> ImageRef:
    """The image that the question is about; of a video, a frame."""
    first = item["images"]["image"][0]
    return VideoRef.read(first, item["record"]).frame if isinstance(first, dict) else ImageRef.parse(first)


def _lines(text: str, width: int, *, most: int) -> str:
    return textwrap.fill(text, width, max_lines=most, placeholder=" ...")


def _title(item: dict[str, Any]) -> str:
    return _lines(item["question"], 32, most=3)


def _draw_prediction(axis: Axes, item: dict[str, Any], folders: list[MediaStore]) -> None:
    image = _open(_first_image(item), folders, item["record"])
    axis.imshow(image, interpolation="nearest" if max(image.size) < 200 else None)
    said = []
    for step in item["trace"]:
        if step["box"]:
            x0, y0, x1, y1 = step["box"]
            axis.add_patch(
                Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="#e67e22", linewidth=2)
            )
            said.append(f"region {step['box']}")
        elif step["status"] == IGNORED:
            said.append(f"{step['kind']}: ignored")
        else:
            said.append(f"{step['kind']}: {step['visual_tokens']} tokens, |c| {step['state_norm']:.1f}")
    colour = RIGHT if item["correct"] else WRONG
    verdict = item["answer"] if item["correct"] else f"{item['answer']}  (is: {item['target']})"
    verdict = textwrap.shorten(verdict, 28, placeholder=" ...")
    trace = _lines("; ".join(said) or "answered at once", 40, most=2)
    axis.set_title(_title(item), fontsize=9)
    axis.text(0.5, -0.03, trace, transform=axis.transAxes, ha="center", va="top", fontsize=7.5, color="#555")
    axis.text(
        0.5, -0.13, verdict, transform=axis.transAxes, ha="center", va="top", fontsize=11, color=colour, weight="bold"
    )


matplotlib.use("Agg")


WORSE, BETTER, EVEN = "#c0392b", "#1b7f3b", "#7f8c8d"


def draw_ablations(compared: Mapping[str, Comparison], path: Path, *, title: str) -> Path:
    """One line a control that could change an answer: the difference that it makes to the score, with its interval."""
    items = [item for item in compared.values() if item.difference is not None]
    figure, axis = plt.subplots(figsize=(11, 1.6 + 0.45 * len(items)), layout="constrained")
    for place, item in enumerate(items):
        d = item.difference
        assert d is not None
        colour = WORSE if d.high < 0 else BETTER if d.low > 0 else EVEN
        axis.plot([d.low, d.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
        axis.plot(d.value, place, "o", color=colour, markersize=6)
        axis.annotate(
            f"{d.value:+.3f}   {item.reference:.3f} → {item.ablated:.3f}", (1.01, place), va="center", fontsize=9,
            color=colour, xycoords=axis.get_yaxis_transform(), annotation_clip=False,
        )  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.8)
    labels = [f"{textwrap.fill(item.description, 48)}\n{item.questions:,} questions" for item in items]
    axis.set_yticks(range(len(items)), labels, fontsize=8)
    axis.set_ylim(len(items) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("difference of the score, with its paired 95% bootstrap interval")
    axis.set_title(title, fontsize=10, weight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
