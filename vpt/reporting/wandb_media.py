"""A report's tables and images for W&B."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from vpt.config.schema import TrainConfig
from vpt.evaluation.ablations.runner import ablation_table, from_json
from vpt.evaluation.metrics.perception import action_label
from vpt.evaluation.summary import metrics_table
from vpt.reporting.charts import draw_overlaps, overlaps
from vpt.reporting.report import image_loader
from vpt.reporting.run_artifacts import RunArtifacts
from vpt.tracking import ReportMedia
from vpt.utils.drawing import save
from vpt.utils.table import Table


def report_media(folder: Path, *, config: TrainConfig | None = None) -> ReportMedia:
    """Tables and images of the report in `folder`; those that have no data are left out."""
    found = RunArtifacts.at(folder)
    tables = {
        "metrics": metrics_table(found.summary),
        "ablations table": ablation_table(from_json(found.summary.get("ablations", {}))),
        "confusion": _confusion(found.summary), "answers": _answers(found, config),
    }  # fmt: skip
    images = {}
    for name in ("curves", "samples", "ablations"):
        if (folder / f"{name}.png").is_file():
            with Image.open(folder / f"{name}.png") as image:
                images[name] = image.convert("RGB")
    if pairs := overlaps(found.predictions):
        images["regions"] = _painted(draw_overlaps(pairs, {}))
    return ReportMedia(found.page, {name: table for name, table in tables.items() if table.rows}, images)


def _confusion(summary: Mapping[str, Any]) -> Table:
    table = summary.get("perception", {}).get("confusion", {})
    rows = [(asked, did, count) for asked, row in table.items() for did, count in row.items()]
    return Table(["the record perceives by", "the model by", "questions"], rows)


def _answers(found: RunArtifacts, config: TrainConfig | None) -> Table:
    images_of, rows = image_loader(found, config), []
    for example in found.examples:
        item, seen = found.predictions[example.number], images_of(example)
        pictures = [each.image for each in seen] if not isinstance(seen, str) else []
        first, second = (*pictures, None, None)[:2]
        did = action_label(item.actions)
        rows.append((example.why, item.question, item.answer, item.target, item.confidence, did, first, second))
    columns = ["why", "question", "answer", "target", "probability", "perceived by", "image", "perceived"]
    return Table(columns, rows)


def _painted(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    save(figure, buffer)
    with Image.open(buffer) as image:
        return image.convert("RGB")
