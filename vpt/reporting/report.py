"""Putting a report together from what is on disk."""

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from vpt.checkpoint.load import load_any_config
from vpt.config.schema import SourceConfig, TrainConfig
from vpt.errors import UserError
from vpt.evaluation.prediction_log import read_settings
from vpt.generation.answer_images import CaptionedImage, answer_images
from vpt.reporting import html
from vpt.reporting.examples import ExampleAnswer
from vpt.reporting.figures import question_images
from vpt.reporting.report_sections import ablations, choice, curves, examples, gain, regions, results, settings, tokens
from vpt.reporting.run_artifacts import RunArtifacts
from vpt.utils.files import atomic_write


def write_report(folder: Path, *, config: TrainConfig | None = None) -> Path:
    """Write `report.html` into a run or into one of its evaluations.

    Args:
        folder: `outputs/RUN_NAME`, or a folder of `predictions.jsonl`.
        config: where the test images come from; by default as the answers' own settings say.

    Raises:
        CheckpointError: where the folder holds neither a run nor answers.
    """
    found = RunArtifacts.at(folder)
    shown = [
        ("Results", results(found)),
        ("Does the perception do the work?", ablations(found)),
        ("What perception gains, and at what price", gain(found)),
        ("How it chose to perceive", choice(found)),
        ("Regions", regions(found)),
        ("Single answers", examples(found, image_loader(found, config))),
        ("Curves of training", curves(found)),
        ("Perception tokens, the right ones before them given", tokens(found)),
        ("Settings", settings(found)),
    ]
    text = html.page(
        found.name, [(name, body) for name, body in shown if body], lead=_lead(found), top=_tiles(found) + _links(found)
    )
    atomic_write(found.page, text)
    return found.page


def image_loader(
    found: RunArtifacts, config: TrainConfig | None
) -> Callable[[ExampleAnswer], list[CaptionedImage] | str]:
    """A function that returns the images of an example, or says why there are none."""
    if not found.examples:
        return lambda example: ""
    try:
        opened = question_images(config or _config_of(found))
    except UserError as error:
        reason = f"no pictures: {error}"
        return lambda example: reason

    def images_of(example: ExampleAnswer) -> list[CaptionedImage] | str:
        item = found.predictions[example.number]
        image = opened(item)
        return image if isinstance(image, str) else answer_images(image, item.trace, example.maps, evidence=item.box)

    return images_of


def _config_of(found: RunArtifacts) -> TrainConfig:
    """The run's configuration, with the test sets and the folder of data that its answers are about."""
    config, data = load_any_config(found.run), read_settings(found.answers).get("data", {})
    if "test" in data:
        config.data.test = {name: SourceConfig(**node) for name, node in data["test"].items()}
    config.data.root = data.get("root", config.data.root)
    return config


def _lead(found: RunArtifacts) -> str:
    names = dict.fromkeys(item.source for item in found.predictions)
    about = f"Answers to {len(found.predictions):,} questions of {', '.join(names)}." if names else "No answers yet."
    return about + " Intervals are 95% bootstrap intervals over images."


def _tiles(found: RunArtifacts) -> Markup:
    summary, pairs = found.summary, []
    for source, metrics in summary.get("metrics", {}).items():
        name, e = next(iter(metrics.items()), (None, None))
        if e is not None:
            where = f" on {source}" if len(summary["metrics"]) > 1 else ""
            known = e["value"] is not None
            about = f"[{e['low']:.3f}, {e['high']:.3f}]" if known else f"({e['reason']})"
            pairs.append((f"{name}{where} {about}", f"{e['value']:.3f}" if known else "-"))
    for key, what, form in (
        ("questions", "questions", ",d"), ("steps", "steps of training", ",d"),
        ("perceived_tokens_per_question", "tokens perceived in a question", ".1f"),
        ("seconds_per_question", "seconds a question", ".3f"),
    ):  # fmt: skip
        if key in summary:
            pairs.append((what, format(summary[key], form)))
    return html.fragments.tiles(pairs)


def _links(found: RunArtifacts) -> Markup:
    """Links to the run's other reports, which lie beside this one."""
    pages = [
        (quote(Path(os.path.relpath(page, found.page.parent)).as_posix()), _called(page, found.run))
        for page in found.siblings()
    ]
    return html.fragments.links(pages) if pages else Markup()


def _called(page: Path, run: Path) -> str:
    return "training" if page.parent == run else page.parent.name
