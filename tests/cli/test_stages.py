"""One command for both stages: what a run starts from is trained first where it is not there."""

from pathlib import Path

import pytest

from conftest import compose_config
from vpt.cli import stages
from vpt.errors import ConfigError

SECOND = ("+experiment=scenes/dino", "seed=3", "training.steps=7")


@pytest.fixture
def trained(monkeypatch) -> dict[str, int]:
    """Runs that were trained, in order, and their steps; `_steps` knows of no others."""
    runs: dict[str, int] = {}

    def train(config, folder) -> float:
        assert Path(folder) == Path(config.output_dir) / config.run_name
        runs[config.run_name] = config.training.steps
        return config.seed

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(stages, "_steps", lambda folder: runs.get(str(Path(folder).relative_to("outputs")), 0))
    return runs


def start(*overrides: str) -> float:
    config = compose_config(*SECOND, *overrides)
    return stages.train_stages(config, Path(config.output_dir) / config.run_name, [*SECOND, *overrides])


def test_the_stage_before_is_trained_first_and_once(trained):
    assert start() == 3
    assert [*trained] == ["scenes/align_dino", "scenes/dino"] and trained["scenes/dino"] == 7
    assert trained["scenes/align_dino"] == compose_config("+experiment=scenes/align_dino").training.steps
    del trained["scenes/dino"]
    start()
    assert [*trained] == ["scenes/align_dino", "scenes/dino"]


def test_another_start_needs_no_stage(trained):
    start("init_from=null", "init_exclude=[]")
    assert [*trained] == ["scenes/dino"]


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1"}


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_several_processes_do_not_train_a_stage_on_the_way(trained, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="train \\+experiment=scenes/align_dino first"):
        start()


def test_an_earlier_stage_shares_what_the_machine_and_the_model_are():
    shared = ["seed=1", "model=tiny", "model.dtype=float32", "+debug=two_steps", "strategy.kind=none"]
    assert [
        text for text in [*shared, "training.steps=4", "optim.lr=1", "run_name=x"] if stages._is_shared(text)
    ] == shared
