"""`optim.name=adamw_8bit`: it learns as AdamW does, and goes on to the last bit."""

from pathlib import Path

import pytest
import torch

from conftest import compose_config, losses
from helpers.stopped import fit_until
from vpt.checkpoint.format import find_checkpoint
from vpt.checkpoint.tensors import LazyStateDict
from vpt.checkpoint.train_state import optimizer_tensors
from vpt.config import validate
from vpt.config.schema import TrainConfig
from vpt.distributed.process_group import init_process_group
from vpt.errors import CheckpointError, ConfigError
from vpt.estimate.memory import state_bytes
from vpt.training.setup import build_training
from vpt.training.trainer import Trainer

pytest.importorskip("bitsandbytes")

EIGHT = "optim.name=adamw_8bit"


def settings(*overrides: str) -> TrainConfig:
    return compose_config(
        "+experiment=dino", "+debug=two_steps", "training.batch_size=4", "data.limit=4", "training.steps=4",
        "training.checkpoint_every=2", *overrides,
    )  # fmt: skip


def run(folder: Path, *overrides: str, stop: int = 0) -> Trainer:
    return fit_until(Trainer(settings(*overrides), folder), stop)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_last_bit(tmp_path):
    whole = run(tmp_path / "whole", EIGHT)
    run(tmp_path / "stopped", EIGHT, stop=2)
    again = run(tmp_path / "stopped", EIGHT)
    assert losses(again.folder) == losses(whole.folder)
    for ours, theirs in ((again.model.state_dict(), whole.model.state_dict()), (*map(optimizer_tensors, (again.optimizer, whole.optimizer)),)):  # fmt: skip
        assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    plain = run(tmp_path / "plain")
    assert losses(whole.folder) == pytest.approx(losses(plain.folder), rel=0.02)
    assert losses(whole.folder)[1:] != losses(plain.folder)[1:]
    sizes = [
        sum(tensor.nbytes for tensor in LazyStateDict(found, [found / "optimizer.safetensors"]).values())
        for found in map(find_checkpoint, (whole.folder, plain.folder))
    ]
    assert sizes[0] < 0.4 * sizes[1] and sizes == [state_bytes(t.model, t.config)[1] for t in (whole, plain)]
    with pytest.raises(CheckpointError, match=r"optim\.name: adamw_8bit -> adamw"):
        Trainer(settings(), whole.folder)


def test_shards_and_a_missing_package_are_told(monkeypatch):
    with (
        init_process_group(device="cpu", always=True) as world,
        pytest.raises(ConfigError, match=r"strategy=fsdp\); type strategy=ddp"),
    ):
        build_training(settings(EIGHT, "strategy=fsdp"), None, world, torch.device("cpu"))
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes; type: pip install"):
        settings(EIGHT)
