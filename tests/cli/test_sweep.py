"""Sweeps as they are typed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils as sweeps

from conftest import ROOT, compose_config
from vpt.config.overrides import check_overrides
from vpt.config.schema import TrainConfig

TWO_STEPS = ("+experiment=dino", "+debug=two_steps", "tracking=none")


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", *arguments, *TWO_STEPS, f"output_dir={folder}", "run_name=swept"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_a_member_that_fails_does_not_end_the_sweep(tmp_path):
    done = sweep(tmp_path, "-m", "optim.freeze=[nothing.*],[]")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 runs of the sweep have ended" in done.stdout
    again = next(line for line in done.stdout.splitlines() if "failed:" in line)
    assert again.split("train.py -m ")[1].startswith("'optim.freeze=[nothing.*]' +experiment=dino")
    assert "matches no parameter" in (tmp_path / "swept" / "optim.freeze=[nothing.*]" / "failed.txt").read_text()
    assert (tmp_path / "swept" / "optim.freeze=[]" / "summary.json").is_file()


@pytest.mark.slow
def test_seeds_from_a_file_or_fewer_from_the_command_line(tmp_path):
    done = sweep(tmp_path, "+sweep=seeds", "hydra.sweeper.params={seed:'3,4'}")
    assert "2 of 2 runs" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "swept").iterdir()} == {"seed=3", "seed=4"}


def test_optuna_asks_for_what_the_runs_return(tmp_path):
    done = sweep(tmp_path, "+sweep=optuna", "hydra.sweeper.n_trials=2")
    assert "2 of 2 runs" in done.stdout, done.stderr
    best = yaml.safe_load((tmp_path / "swept" / "optimization_results.yaml").read_text())
    assert set(best["best_params"]) == {"optim.lr", "masking.para_mask_ratio"}


def test_the_wandb_agent_types_what_runs():
    """The command as wandb's own code makes it of the file and of values that a server may send."""
    described = yaml.safe_load((ROOT / "examples" / "wandb_sweep.yaml").read_text())
    sent = {"optim.lr": 0.000123456, "masking.para_mask_ratio": 0.25, "seed": 2}
    assert sent.keys() == described["parameters"].keys()
    made = sweeps.create_sweep_command_args({"args": {key: {"value": value} for key, value in sent.items()}})
    command = sweeps.create_sweep_command(described["command"])
    assert command[:3] == ["${env}", "${interpreter}", "${program}"] and (ROOT / described["program"]).is_file()
    assert command[-1] == "${args_no_hyphens}"
    overrides = [*command[3:-1], *made["args_no_hyphens"]]
    check_overrides(overrides, TrainConfig)
    config = compose_config(*overrides)
    assert (config.optim.lr, config.masking.para_mask_ratio, config.seed) == (0.000123456, 0.25, 2)
    assert re.fullmatch(r"sweep_\d{4}_\d{6}_\d+", config.run_name)
