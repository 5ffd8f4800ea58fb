"""The sections of a report. Each gives HTML, or nothing where there is no data for it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from vpt.evaluation.ablations.requests import gain_table
from vpt.evaluation.ablations.runner import ablation_table, details_table, from_json, gain_of
from vpt.evaluation.metrics.perception import action_label
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.summary import metrics_table
from vpt.generation.answer_images import CaptionedImage, step_note
from vpt.reporting import html
from vpt.reporting.charts import confusion_table, draw_overlaps, interval, overlaps
from vpt.reporting.curves import panel_sections
from vpt.reporting.examples import ExampleAnswer
from vpt.reporting.frontier import draw_frontier, draw_gains, frontier_points, gains_by_step
from vpt.reporting.html import fragments
from vpt.reporting.run_artifacts import RunArtifacts
from vpt.utils.table import Range, Table

UNIT = (0.0, 1.0)
AMOUNTS = ("extra_visual_tokens", "latency_seconds", "cider_d")  # these may be small, and are no shares for all that
SEEN_AT = 0.5  # of the true box


def results(found: RunArtifacts) -> Markup:
    """Every metric with its interval; accuracy by type of question and by what the model did."""
    summary = found.summary
    if not summary.get("metrics"):
        return Markup()
    table = metrics_table(summary)
    drawn = [_unit_interval(name, value, ends) for _, name, value, ends, _ in table.rows]
    parts = [table.insert(4, "from 0 to 1", drawn).as_html()]
    for key, what in (("accuracy_by_type", "type of question"), ("accuracy_by_perception", "what the model did")):
        if len(summary.get(key, {})) > 1:
            labels = (p.type if key == "accuracy_by_type" else action_label(p.actions) for p in found.predictions)
            groups = Counter(labels)
            rates = summary.get("look_rate_by_type", {}) if key == "accuracy_by_type" else {}
            counted = [
                (name, groups[name] or "-", value, *([rates.get(name, "-")] if rates else []))
                for name, value in summary[key].items()
            ]
            columns = [what, "questions", "accuracy", *(["look rate"] if rates else [])]
            parts.append(Table(columns, counted).as_html())
    return Markup().join([*parts, fragments.note(_odd(summary))])


def _odd(summary: Mapping[str, Any]) -> str:
    names = (
        ("requests_repaired", "requests repaired"),
        ("requests_ignored", "requests ignored"),
        ("truncated", "answers cut off"),
    )
    return ", ".join(f"{summary.get(key, 0):,} {name}" for key, name in names) + "."


def _unit_interval(name: str, value: float, ends: Range | str) -> Markup | str:
    if isinstance(ends, str):  # the reason why there is no number
        return ""
    inside = name not in AMOUNTS and ends.low >= 0 and ends.high <= 1
    return interval(value, ends.low, ends.high, span=UNIT) if inside else ""


def ablations(found: RunArtifacts) -> Markup:
    """The ablations: what each makes of the answers, with paired intervals."""
    compared = from_json(found.summary.get("ablations", {}))
    if not compared:
        return Markup()
    differences = [item.difference for item in compared.values()]
    reach = max([0.02, *(abs(end) for d in differences if d for end in (d.low, d.high))])
    drawn = [(d and interval(d.value, d.low, d.high, span=(-reach, reach), mark=0.0)) or "" for d in differences]
    table = ablation_table(compared).insert(5, "", drawn)
    details = details_table(compared)
    return fragments.ablations(table.as_html()) + (details.as_html() if details else Markup())


def gain(found: RunArtifacts) -> Markup:
    """What perception gains: where it helped and harmed, how often it was asked for, its price."""
    split = gain_of(from_json(found.summary.get("ablations", {})))
    points, steps = frontier_points(found.run), gains_by_step(found.run)
    parts = []
    if split:
        parts.append(gain_table(split).as_html())
    if len(steps) > 1:
        parts.append(html.figure(draw_gains(steps, html.theme()), width=900))
    if len({point.visual_tokens.value for point in points}) > 1:
        parts.append(html.figure(draw_frontier(points, html.theme()), width=900))
    return Markup().join(parts)


def choice(found: RunArtifacts) -> Markup:
    """How the model perceives beside how the records do; only where there was something to choose."""
    table = found.summary.get("perception", {}).get("confusion", {})
    kinds = {*table, *(kind for row in table.values() for kind in row)}
    return confusion_table(table) if len(kinds) > 1 else Markup()


def regions(found: RunArtifacts) -> Markup:
    """Distributions of IoU and IoGT, and how much a region that shows the evidence is worth."""
    pairs = overlaps(found.predictions)
    if not pairs:
        return Markup()
    groups = (
        (f"at least {SEEN_AT:.0%} of the true box is seen", [right for _, share, right in pairs if share >= SEEN_AT]),
        ("less", [right for _, share, right in pairs if share < SEEN_AT]),
    )
    rows = [(name, len(group), sum(group) / len(group) if group else math.nan) for name, group in groups if group]
    table = Table(["of the first region", "answers", "accuracy"], rows)
    return html.figure(draw_overlaps(pairs, html.theme()), width=900) + table.as_html()


def curves(found: RunArtifacts) -> Markup:
    """All panels of the dashboard; what is about speed and data stays folded."""
    if not found.curves:
        return Markup()
    shown = panel_sections({found.run.name: found.curves})
    first = [drawn for section in ("train", "rl", "eval", "perception") for drawn in shown.pop(section, [])]
    rest = [drawn for section in shown.values() for drawn in section]
    folded = fragments.folded("speed and data", fragments.panels(rest)) if rest else Markup()
    return fragments.panels(first) + folded


def tokens(found: RunArtifacts) -> Markup:
    """How often each perception token is the likeliest where it should be said, the right ones before it given."""
    scores = found.summary.get("teacher_forced", {})
    rows = [(name.rpartition("/")[2], value) for name, value in scores.items() if name.startswith("perception/")]
    return Table(["perception token", "accuracy"], rows).as_html() if rows else Markup()


def settings(found: RunArtifacts) -> Markup:
    """The run's configuration, folded."""
    if not found.settings:
        return Markup()
    return fragments.folded("config.yaml", fragments.preformatted(found.settings))


def examples(found: RunArtifacts, images_of: Callable[[ExampleAnswer], list[CaptionedImage] | str]) -> Markup:
    """Cards of single answers, those of a kind together.

    Args:
        found: the answers.
        images_of: gives the pictures of an example, or says why there are none.
    """
    parts = []
    for why in dict.fromkeys(example.why for example in found.examples):
        cards = [
            _card(found.predictions[example.number], images_of(example))
            for example in found.examples
            if example.why == why and example.number < len(found.predictions)
        ]
        parts.append(fragments.cards(why.capitalize(), cards))
    return Markup().join(parts)


def _card(item: Prediction, images: list[CaptionedImage] | str) -> Markup:
    pictures = images if isinstance(images, str) else [html.picture(image.image, image.caption) for image in images]
    return fragments.card(item, pictures, [(step.requested, step_note(step)) for step in item.trace])
