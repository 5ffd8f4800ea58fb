"""The sections of a report. Each gives HTML, or nothing where there is no data for it."""

import math
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from vpt.evaluation.predictions import Prediction
from vpt.generation.row_state import IGNORED
from vpt.reporting import html
from vpt.reporting.answer_images import CaptionedImage
from vpt.reporting.charts import confusion_table, draw_overlaps, interval, overlaps
from vpt.reporting.dashboard import draw_panel
from vpt.reporting.examples import ExampleAnswer
from vpt.reporting.panels import SECTIONS
from vpt.reporting.run_artifacts import RunArtifacts

UNIT = (0.0, 1.0)
AMOUNTS = ("extra_visual_tokens", "latency_seconds", "cider_d")  # these may be small, and are no shares for all that
SEEN_AT = 0.5  # of the true box


def results(found: RunArtifacts) -> str:
    """Every metric with its interval; accuracy by type of question and by what the model did."""
    summary = found.summary
    if not summary.get("metrics"):
        return ""
    named = [(source, name, e) for source, metrics in summary["metrics"].items() for name, e in metrics.items()]
    named += [("all", name, e) for name, e in summary.get("perception", {}).items() if name != "confusion"]
    rows = [(source, name, e["value"], _range(e), _unit_interval(name, e), e["questions"]) for source, name, e in named]
    parts = [html.html_table(["data", "metric", "value", "95% interval", "from 0 to 1", "questions"], rows)]
    for key, what in (("accuracy_by_type", "type of question"), ("accuracy_by_perception", "what the model did")):
        if len(summary.get(key, {})) > 1:
            groups = _counted(found.predictions, key)
            counted = [(name, groups.get(name, "-"), value) for name, value in summary[key].items()]
            parts.append(html.html_table([what, "questions", "accuracy"], counted))
    parts.append(f'<p class="note">{escape(_odd(summary))}</p>')
    return "".join(parts)


def _counted(items: list[Prediction], key: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        name = item.type if key == "accuracy_by_type" else " + ".join(item.actions) or "none"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _odd(summary: Mapping[str, Any]) -> str:
    names = (
        ("requests_mended", "requests mended"),
        ("requests_ignored", "requests ignored"),
        ("cut_off", "answers cut off"),
    )
    return ", ".join(f"{summary.get(key, 0):,} {name}" for key, name in names) + "."


def _range(estimate: Mapping[str, float]) -> str:
    return f"{estimate['low']:.4g} to {estimate['high']:.4g}"


def _unit_interval(name: str, estimate: Mapping[str, float]) -> object:
    inside = name not in AMOUNTS and estimate["low"] >= 0 and estimate["high"] <= 1
    return interval(estimate["value"], estimate["low"], estimate["high"], span=UNIT) if inside else ""


def controls(found: RunArtifacts) -> str:
    """What each control makes of the answers, with paired intervals."""
    compared = found.summary.get("controls", {})
    if not compared:
        return ""
    reach = max(
        (abs(d[end]) for c in compared.values() if (d := c["difference"]) for end in ("low", "high")), default=1
    )
    span = (-max(reach, 0.02), max(reach, 0.02))
    rows = [_control_row(item, span) for item in compared.values()]
    header = ["what is changed", "questions", "as it is", "changed", "difference", "", "95% interval", "McNemar's p"]
    return (
        '<p class="note">The same model answers once more with what it perceives changed; differences are paired, '
        "question by question. Noise and another image's features look like what it was trained on: where they "
        "cost nothing, what was perceived was not used. Zeros and an empty turn are like nothing it has seen; that "
        f"they cost much says little by itself.</p>{html.html_table(header, rows)}"
    )


def _control_row(item: Mapping[str, Any], span: tuple[float, float]) -> tuple[object, ...]:
    d = item["difference"]
    if d is None:
        return (item["description"], 0, "-", "-", "-", "no answer that it could change", "-", "-")
    p = "-" if item["p"] is None else f"{item['p']:.2g}"
    drawn = interval(d["value"], d["low"], d["high"], span=span, mark=0.0)
    return (
        item["description"], item["questions"], round(item["reference"], 4), round(item["ablated"], 4), f"{d['value']:+.3f}",
        drawn, html.Raw(f'<td class="interval">{d["low"]:+.3f} to {d["high"]:+.3f}</td>'), p,
    )  # fmt: skip


def choice(found: RunArtifacts) -> str:
    """How the model perceives beside how the records do; only where there was something to choose."""
    table = found.summary.get("perception", {}).get("confusion", {})
    kinds = {*table, *(kind for row in table.values() for kind in row)}
    if len(kinds) < 2:
        return ""
    return confusion_table(table)


def regions(found: RunArtifacts) -> str:
    """Distributions of IoU and IoGT, and how much a region that shows the evidence is worth."""
    pairs = overlaps(found.predictions)
    if not pairs:
        return ""
    groups = (
        (f"at least {SEEN_AT:.0%} of the true box is seen", [right for _, share, right in pairs if share >= SEEN_AT]),
        ("less", [right for _, share, right in pairs if share < SEEN_AT]),
    )
    rows = [(name, len(group), sum(group) / len(group) if group else math.nan) for name, group in groups if group]
    drawn = html.figure(draw_overlaps(pairs, html.theme())).replace("<figure>", '<figure style="max-width:900px">')
    return drawn + html.html_table(["of the first region", "answers", "accuracy"], rows)


def curves(found: RunArtifacts) -> str:
    """All panels of the dashboard; what is about speed and data stays folded."""
    if not found.curves:
        return ""
    shown = {}
    for section, panels in SECTIONS.items():
        figures = [
            figure for panel in panels if (figure := draw_panel(panel, {found.run.name: found.curves})) is not None
        ]
        shown[section] = [html.figure(figure) for figure in figures]
    first = [drawn for section in ("train", "eval", "perception") for drawn in shown.pop(section, [])]
    rest = [drawn for section in shown.values() for drawn in section]
    return html.panels(first) + (html.folded("speed and data", html.panels(rest)) if rest else "")


def tokens(found: RunArtifacts) -> str:
    """How often each perception token is the likeliest where it should be said, the right ones before it given."""
    scores = found.summary.get("teacher_forced", {})
    rows = [(name.rpartition("/")[2], value) for name, value in scores.items() if name.startswith("perception/")]
    return html.html_table(["perception token", "accuracy"], rows) if rows else ""


def settings(found: RunArtifacts) -> str:
    """The run's configuration, folded."""
    return html.folded("config.yaml", f"<pre>{escape(found.settings)}</pre>") if found.settings else ""


def examples(found: RunArtifacts, look: Callable[[ExampleAnswer], list[CaptionedImage] | str]) -> str:
    """Cards of single answers, those of a kind together.

    Args:
        found: the answers.
        look: gives the pictures of an example, or says why there are none.
    """
    parts = []
    for why in dict.fromkeys(example.why for example in found.examples):
        cards = [
            _card(found.predictions[example.number], look(example))
            for example in found.examples
            if example.why == why and example.number < len(found.predictions)
        ]
        parts.append(f"<h3>{escape(why.capitalize())}</h3>" + f'<div class="cards">{"".join(cards)}</div>')
    return "".join(parts)


def _card(item: Prediction, seen: list[CaptionedImage] | str) -> str:
    pictures = (
        f'<p class="note">{escape(seen)}</p>'
        if isinstance(seen, str)
        else f'<div class="looks">{"".join(html.picture(look.image, look.caption) for look in seen)}</div>'
    )
    mark, style = ("✓", "right") if item.correct else ("✗", "wrong")
    answer = item.answer or "(nothing)"
    truth = "" if item.correct else f' <span class="note">is: {escape(item.target)}</span>'
    return (
        f'<div class="card"><p><b>{escape(item.question)}</b></p>{pictures}'
        f'<p><b class="{style}">{mark} {escape(answer)}</b>{truth} '
        f'<span class="note">probability {item.confidence:.2f}</span></p>{_trace(item)}</div>'
    )


def _trace(item: Prediction) -> str:
    if not item.trace:
        return '<p class="note">answered at once</p>'
    lines = []
    for step in item.trace:
        norm = "" if step.state_norm is None else f", |c| {step.state_norm:.1f}"
        note = f"{step.kind}: {step.status}" if step.status == IGNORED else f"{step.visual_tokens} tokens{norm}"
        lines.append(f'<p><code>{escape(step.requested)}</code> <span class="note">{escape(note)}</span></p>')
    return "".join(lines)
