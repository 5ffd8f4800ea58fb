"""Curves of runs as one self-contained page, or as a workspace at W&B."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vpt.errors import ConfigError
from vpt.reporting import html
from vpt.reporting.curves import panel_sections, read_curves
from vpt.reporting.panels import SECTIONS, Panel
from vpt.reporting.runs import read_summary, run_names
from vpt.utils.table import Table


def write_page(folders: Sequence[Path]) -> Path:
    """All panels of some runs as one self-contained page in the first of them."""
    names = run_names(folders)
    runs = {name: read_curves(folder) for name, folder in zip(names, folders, strict=True)}
    sections = [(name, html.fragments.panels(drawn)) for name, drawn in panel_sections(runs).items()]
    sections.append(("results", _results(dict(zip(names, folders, strict=True)))))
    page = folders[0] / "dashboard.html"
    page.write_text(html.page(", ".join(runs), sections, lead="Metrics of each run over its steps."), encoding="utf-8")
    return page


def _results(runs: Mapping[str, Path]) -> Markup:
    """A table of what the runs reached, by name; a run that has not ended has none."""
    columns = ("accuracy", "questions", "steps")
    reached = {name: read_summary(folder) for name, folder in runs.items()}
    rows = [[name, *(summary.get(key, "-") for key in columns)] for name, summary in reached.items()]
    return Table(["run", *columns], rows).as_html()


def workspace(project: str, entity: str) -> Any:
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
    return workspaces.Workspace(entity=entity, project=project, name="vpt", sections=sections)


def _regex(panel: Panel) -> str:
    """W&B finds metrics by one regular expression; only patterns need it."""
    if not any("*" in metric for metric in panel.metrics):
        return ""
    return "|".join(f"^{metric.replace('*', '.*')}$" for metric in panel.metrics)
