"""Curves of runs as one self-contained page, or as a workspace at W&B."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vpt.errors import ConfigError
from vpt.reporting import html
from vpt.reporting.curves import panel_sections, read_curves
from vpt.reporting.panels import SECTIONS, Panel
from vpt.utils.table import Table


def write_page(folders: Sequence[Path]) -> Path:
    """All panels of some runs as one self-contained page in the first of them."""
    runs = {folder.name: read_curves(folder) for folder in folders}
    sections = [(name, html.fragments.panels(drawn)) for name, drawn in panel_sections(runs).items()]
    sections.append(("results", _results(folders)))
    page = folders[0] / "dashboard.html"
    page.write_text(html.page(", ".join(runs), sections, lead="Metrics of each run over its steps."), encoding="utf-8")
    return page


def _results(folders: Sequence[Path]) -> Markup:
    """A table of what the runs reached; a run that has not ended has none."""
    rows: list[list[Any]] = []
    for folder in folders:
        summary = folder / "summary.json"
        reached = json.loads(summary.read_text()) if summary.is_file() else {}
        rows.append([folder.name, *(reached.get(key, "-") for key in ("accuracy", "questions", "steps"))])
    return Table(["run", "accuracy", "questions", "steps"], rows).as_html()


def workspace(project: str, entity: str, name: str = "vpt") -> Any:
    """The panels as a W&B workspace, not saved yet. Raises ConfigError where the package is missing."""
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2 as reports
    except ImportError:
        raise ConfigError("--wandb needs a package; type: pip install wandb-workspaces") from None
    sections = [
        workspaces.Section(
            name=section,
            is_open=section in ("train", "eval"),
            panels=[
                reports.LinePlot(
                    title=panel.title, x="Step", log_y=panel.log,
                    y=[m for m in panel.metrics if "*" not in m],
                    metric_regex=_regex(panel) or None,
                )
                for panel in panels
            ],
        )
        for section, panels in SECTIONS.items()
    ]  # fmt: skip
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


def _regex(panel: Panel) -> str:
    """W&B finds metrics by one regular expression; only patterns need it."""
    if not any("*" in metric for metric in panel.metrics):
        return ""
    return "|".join(f"^{metric.replace('*', '.*')}$" for metric in panel.metrics)
