"""Sweeps as they are typed."""

import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils as sweeps

from conftest import ROOT, compose_config, compose_eval
from helpers.programs import run_program
from vpt.cli.sweep import member_name
from vpt.config.overrides import check_overrides
from vpt.config.schema import TrainConfig

TWO_STEPS = ("+experiment=dino", "+debug=two_steps", "tracking=none", "pictures=false")


def sweep(folder: Path, *arguments: str) -> CompletedProcess:
    return run_program("train.py", *arguments, *TWO_STEPS, f"output_dir={folder}", "run_name=swept")


# Sixteen with the swept one and the seed, a path among them
MANY = [
    "optim.lr=0.001", "optim.eps=1e-8", "optim.weight_decay=0.01", "optim.max_grad_norm=1.0", "optim.warmup_ratio=0.03",
    "optim.min_lr_ratio=0.0", "training.max_nonfinite_steps=10", "generation.max_actions=3", "generation.top_p=1.0",
    "generation.temperature=0.0", "data.mixing=weights", "data.image.max_side=512", "masking.para_mask_ratio=0.25",
    "encoder=[dino]",
]  # fmt: skip


def test_a_member_that_fails_does_not_end_the_sweep(tmp_path):
    """Members lie side by side, whatever they override, in folders that `eval.py` takes as they are printed."""
    cache = f"data.feature_cache={tmp_path}/features"
    done = sweep(tmp_path, "-m", "optim.freeze=[nothing.*],[]", *MANY, cache)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 runs of the sweep have ended" in done.stdout
    again = next(line for line in done.stdout.splitlines() if "failed:" in line)
    assert again.split("train.py -m ")[1].startswith("'optim.freeze=[nothing.*]' optim.lr=0.001")
    [printed] = re.findall(r"see (\S+)/summary.json", done.stdout)
    assert compose_eval(f"checkpoint={printed}").checkpoint == printed  # Hydra's own grammar
    ended = Path(printed)
    [failed] = set((tmp_path / "swept").iterdir()) - {ended}
    assert ended.parent == failed.parent and "matches no parameter" in (failed / "failed.txt").read_text()
    assert (failed / "overrides.txt").read_text().splitlines()[:2] == ["optim.freeze=[nothing.*]", MANY[0]]
    assert cache in (ended / "overrides.txt").read_text()


def test_names_of_members():
    assert member_name("seed=1") == "seed-1" and member_name("") == ""
    assert member_name("optim.lr=1e-4,seed=1") == "optim.lr-1e-4_seed-1"
    odd = ["a=x/y", "a=x y", "a=[x,y]", "a=x-y/", "+a=x", "a=é", "a='x'", f"a={'x' * 300}", f"a={'x' * 301}"]
    names = [member_name(text) for text in odd]
    assert len({*names}) == len(odd) and all(re.fullmatch(r"a[\w.-]{0,79}", name, re.ASCII) for name in names)


@pytest.mark.slow
def test_seeds_from_a_file_or_fewer_from_the_command_line(tmp_path):
    done = sweep(tmp_path, "+sweep=seeds", "hydra.sweeper.params={seed:'3,4'}")
    assert "2 of 2 runs" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "swept").iterdir()} == {"seed-3", "seed-4"}


@pytest.mark.slow
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
