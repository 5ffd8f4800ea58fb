"""Dashboards: the local page and the workspace."""

import json
import math
import re
from pathlib import Path

import pytest

from conftest import compose_config
from vpt.cli.train import train
from vpt.errors import CheckpointError
from vpt.reporting.curves import draw_panel, mean_curve, panel_sections, read_curves
from vpt.reporting.dashboard import _regex, workspace, write_page
from vpt.reporting.panels import SECTIONS, Panel
from vpt.reporting.runs import run_names


@pytest.fixture(scope="module")
def runs(trained_run, tmp_path_factory):
    """Two runs of two steps."""
    baseline = tmp_path_factory.mktemp("runs") / "baseline"
    train(compose_config("+experiment=baseline", "+debug=two_steps", "training.log_every=1"), baseline)
    return [trained_run, baseline]


def test_a_page_holds_its_pictures_and_every_metric(runs):
    page = write_page(runs)
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:image/|#)', text)  # nothing is fetched from elsewhere
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert f"<td>{runs[0].parent.name}/all</td>" in text and str(summary["questions"]) in text
    metrics = {name for run in runs for name in read_curves(run)}
    panels = [panel for section in SECTIONS.values() for panel in section]
    assert metrics == {name for panel in panels for name in panel.shown(metrics)}  # no metric without a panel
    assert text.count("<svg") == sum(bool(panel.shown(metrics)) * (1 + panel.mean) for panel in panels)


def test_runs_of_the_same_name_are_told_apart(tmp_path, monkeypatch):
    """By their paths below the folder that all are in."""
    folders = [tmp_path / place for place in ("lr/seed_0", "batch/seed_0", "batch")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(f'{{"step": 1, "train/loss": {number + 1}.0}}\n')
        (folder / "summary.json").write_text(json.dumps({"accuracy": (number + 1) / 4, "questions": number}))
    text = write_page(folders).read_text()
    for number, name in enumerate(("lr/seed_0", "batch/seed_0", "batch")):
        assert f"<td>{name}</td><td>{(number + 1) / 4}" in re.sub(r"\s*(</?t[dr])[^>]*>\s*", r"\1>", text)
    assert run_names(folders[:1]) == ["seed_0"] and run_names(folders[1:]) == ["batch/seed_0", "batch"]
    monkeypatch.chdir(folders[0])
    assert run_names([Path("."), Path("../../batch")]) == ["lr/seed_0", "batch"]


def test_curves_are_those_of_the_file(runs):
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    curves = read_curves(runs[1])
    assert curves["train/loss"] == [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    panel = SECTIONS["train"][0]
    axis = draw_panel(panel, {"a": curves}).axes[0]
    assert list(axis.lines[0].get_ydata()) == [value for _, value in curves["train/loss"]]


def test_a_legend_hides_no_curve_and_zeros_leave_gaps(runs):
    """Below the axes; and lines of a logarithmic panel do not fall to the bottom where a value is 0."""
    panel = next(panel for panel in SECTIONS["train"] if panel.title == "gradient norm")
    curves = {"train/grad_norm": [(1, 2.0), (2, 1.0)], "train/grad_norm/dino": [(1, 0.0), (2, 0.5)]}
    for shown in ({"a": curves}, {"a": curves, "b": curves}):
        figure = draw_panel(panel, shown)
        figure.canvas.draw()
        [legend], [axis] = figure.legends, figure.axes
        assert legend.get_window_extent().y1 < axis.get_window_extent().y0
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == [*(shown if len(shown) > 1 else ()), "grad_norm", "grad_norm/dino"]
        looks = {(line.get_color(), line.get_linestyle()) for line in axis.lines}
        assert len(looks) == len(axis.lines) == 2 * len(shown)
        assert math.isnan(axis.lines[1].get_ydata()[0])


def test_region_cells_are_a_smooth_mean_with_each_one_folded_below():
    """A step has the cells that occur in it; what is folded has every one."""
    panel = next(panel for panel in SECTIONS["perception"] if panel.mean)
    cells = {f"perception/accuracy/x_{n}": [(s, (s + n) % 5 / 4) for s in range(n, 60)] for n in range(20)}
    figure = draw_panel(panel, {"a": cells})
    raw, smooth = (line.get_ydata() for line in figure.axes[0].lines)
    assert list(raw) == [value for _, value in mean_curve(cells, [*cells])] and len(raw) == 60
    assert raw[0] == 0 and raw[1] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert smooth[30] == pytest.approx(raw[29:32].mean()) and abs(smooth).max() <= abs(raw).max()
    [drawn] = panel_sections({"a": cells})["perception"]
    shown, _, folded = drawn.partition("<details>")
    assert shown.count("<svg") == folded.count("<svg") == 1 and "mean of 20" in shown
    assert folded.count("<path") > shown.count("<path") + 15


@pytest.mark.parametrize("values", [(0.21, 0.28), (3e-4, 40.0), (2.0, 2.0)])
def test_logarithmic_axes_have_plain_numbers(values):
    [drawn] = draw_panel(Panel("norm", ("a/b",), log=True), {"run": {"a/b": [*enumerate(values)]}}).axes
    drawn.figure.canvas.draw()
    labels = [label.get_text() for label in drawn.get_yticklabels(which="both") if label.get_text()]
    assert len(labels) >= 2 and all(float(label.replace("\N{MINUS SIGN}", "-")) > 0 for label in labels)


def test_what_goes_below_zero_is_not_logarithmic():
    """The loss of a policy does, and every point of it is to be seen."""
    loss = [(1, 0.2), (2, -0.1), (3, 0.0)]
    [drawn] = draw_panel(SECTIONS["train"][0], {"run": {"train/loss": loss}}).axes
    assert drawn.get_yscale() == "linear" and list(drawn.lines[0].get_ydata()) == [value for _, value in loss]


def test_the_workspace_has_the_same_panels():
    pytest.importorskip("wandb_workspaces")
    made = workspace("project", "someone")
    assert [section.name for section in made.sections] == list(SECTIONS)
    titles = [panel.title for section in made.sections for panel in section.panels]
    assert titles == [panel.title for panels in SECTIONS.values() for panel in panels]
    cells = SECTIONS["eval"][2]
    pattern = _regex(cells)
    assert re.search(pattern, "eval/perception/x_3") and not re.search(pattern, "eval/perception/dino_start")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no metrics\.jsonl"):
        write_page([tmp_path])
