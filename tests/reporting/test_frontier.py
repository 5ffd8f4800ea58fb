"""Accuracy against perceived visual tokens, and what perception gains over the checkpoints of a run."""

import json
from dataclasses import asdict

import pytest

from vpt.cli.compare import main as compare
from vpt.evaluation.statistics import Estimate
from vpt.reporting.frontier import FrontierPoint, frontier_points, gains_by_step, pareto
from vpt.reporting.report import write_report


def estimate(value):
    return Estimate(value, value - 0.05, value + 0.05, 100)


def summary(accuracy, tokens, *, step=None, without=None):
    """What an evaluation leaves."""
    found = {
        "questions": 100, "accuracy": accuracy, "step": step,
        "metrics": {"scenes": {"exact_match": asdict(estimate(accuracy))}},
        "perception": {"extra_visual_tokens": asdict(estimate(tokens))},
    }  # fmt: skip
    if without is not None:
        names = ("with_perception", "call_gain", "call_harm", "trigger_rate")
        details = {"gain": estimate(accuracy - without), "without_perception": estimate(without)}
        details |= {name: estimate(0.5) for name in names}
        compared = {"description": "no perception", "questions": 50, "reference": 0.5, "ablated": 0.4, "p": None}
        compared |= {"difference": asdict(estimate(-0.1)), "details": {k: asdict(e) for k, e in details.items()}}
        found["ablations"] = {"no_perception": compared}
    return found


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "always"
    for place, found in {
        "": summary(0.9, 256), "eval/late": summary(0.9, 256, step=20, without=0.6),
        "eval/early": summary(0.7, 200, step=10, without=0.5), "eval/sparing": summary(0.88, 40, step=20),
    }.items():  # fmt: skip
        (run / place).mkdir(parents=True, exist_ok=True)
        (run / place / "summary.json").write_text(json.dumps(found))
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    (run / "config.yaml").write_text("run_name: always\n")
    return run


def test_points_of_a_run(run):
    found = {point.label: (point.accuracy.value, point.visual_tokens.value) for point in frontier_points(run)}
    assert found == {
        "always": (0.9, 256), "always: early": (0.7, 200), "always: early, no perception": (0.5, 0),
        "always: late": (0.9, 256), "always: late, no perception": (0.6, 0), "always: sparing": (0.88, 40),
    }  # fmt: skip
    assert frontier_points(run, name="sweep/always")[1].label == "sweep/always: early"
    best = [(point.accuracy.value, point.visual_tokens.value) for point in pareto(frontier_points(run))]
    assert best == [(0.6, 0), (0.88, 40), (0.9, 256)]
    assert pareto([]) == [] and pareto([FrontierPoint("a", estimate(0.5), estimate(1))])[0].label == "a"


def test_gains_over_checkpoints_and_their_pictures(run, capsys):
    assert [(step, gain["gain"].value) for step, gain in gains_by_step(run)] == [
        (10, pytest.approx(0.2)), (20, pytest.approx(0.3)),
    ]  # fmt: skip
    page = write_report(run).read_text()
    assert "What perception gains" in page and page.count("<svg") >= 2
    assert "perceived visual tokens of a question" in page
    compare([str(run)])
    assert "frontier.png" in capsys.readouterr().out and (run / "frontier.png").stat().st_size > 10_000
