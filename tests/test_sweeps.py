"""Sweeps as they are typed."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from vpt.cli import check_overrides
from vpt.config import TrainConfig

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


def test_the_wandb_sweep_asks_for_keys_that_exist():
    described = yaml.safe_load((ROOT / "examples" / "wandb_sweep.yaml").read_text())
    check_overrides([f"{key}=0" for key in described["parameters"]], TrainConfig)
    assert (ROOT / described["program"]).is_file()
    check_overrides([word for word in described["command"] if word.startswith("+")], TrainConfig)
