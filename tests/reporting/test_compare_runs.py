"""Runs side by side."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conftest import compose_config
from vpt.__main__ import main
from vpt.errors import CheckpointError, ConfigError
from vpt.reporting.compare_runs import compare_runs, runs_table
from vpt.reporting.runs import find_runs


def write_run(folder: Path, *overrides: str, accuracy: float | None) -> Path:
    """What a run leaves of its settings and results."""
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.structured(compose_config(*overrides)), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("")
    if accuracy is not None:
        summary = {"accuracy": accuracy, "accuracy_by_type": {"shape": accuracy / 2}, "questions": 10}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_runs_that_differ_in_the_seed_are_one_line(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.7)):
        write_run(tmp_path / f"a{seed}", f"seed={seed}", f"run_name=a{seed}", accuracy=accuracy)
    write_run(tmp_path / "b", "optim.lr=0.1", accuracy=0.9)
    lines = compare_runs(find_runs([tmp_path]), ["accuracy", "accuracy_by_type.shape"])
    assert [dict(line.label) for line in lines] == [{"optim.lr": 0.1}, {"optim.lr": 0.0008}]
    assert lines[1].cell("accuracy") == "0.600 ± 0.141"  # sample deviation of 0.5 and 0.7
    assert lines[0].cell("accuracy_by_type.shape") == "0.450"
    text = runs_table(lines, ["accuracy"]).as_text()
    assert text.splitlines()[2].startswith("a0, a1 ")
    assert text.splitlines()[0].split() == ["run", "optim.lr", "runs", "accuracy"]


def test_a_branch_that_some_lack_is_one_column(tmp_path):
    for name, encoders in {"none": "encoder=[]", "dino": "encoder=[dino]", "whole": "encoder=[dino]"}.items():
        view = ["encoder.dino.options.view=whole"] if name == "whole" else []
        write_run(tmp_path / name, encoders, *view, accuracy=0.5)
    labels = [dict(line.label) for line in compare_runs(find_runs([tmp_path]), ["accuracy"])]
    assert {frozenset(label) for label in labels} == {frozenset({"encoder.dino", "encoder.dino.options.view"})}
    assert sorted(label["encoder.dino"] for label in labels) == ["-", "yes", "yes"]


def test_main_writes_a_picture_and_names_what_has_not_ended(tmp_path, capsys):
    write_run(tmp_path / "a", accuracy=0.5)
    write_run(tmp_path / "b", "optim.lr=0.1", accuracy=None)
    main(["compare", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'b'} has not ended; type its command again" in printed
    assert "0 of 1" in printed
    assert (tmp_path / "compare.png").stat().st_size > 5000
    written = json.loads((tmp_path / "compare.json").read_text())
    assert {"settings": {"optim.lr": 0.0008}, "runs": [str(tmp_path / "a")], "accuracy": [0.5]} in written


def test_a_sweep_with_seeds_and_a_member_that_failed(tmp_path, capsys):
    for rate in ("0.1", "0.2"):
        for seed in (0, 1):
            write_run(tmp_path / f"optim.lr={rate},seed={seed}", f"optim.lr={rate}", f"seed={seed}", accuracy=0.5)
    (tmp_path / "seed=2").mkdir()
    (tmp_path / "seed=2" / "failed.txt").write_text("Traceback\nerror: no room\n")
    main(["compare", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:3]] == ["optim.lr=0.1", "optim.lr=0.2"]
    assert f"{tmp_path / 'seed=2'} failed: no room" in printed


def test_errors_say_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        find_runs([tmp_path])
    write_run(tmp_path / "a", accuracy=0.5)
    with pytest.raises(ConfigError, match=r"has the metric acuracy; did you mean accuracy"):
        compare_runs(find_runs([tmp_path]), ["acuracy"])
