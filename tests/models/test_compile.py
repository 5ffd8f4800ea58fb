"""`training.compile` computes what the layers compute."""

import shutil

import pytest
import torch

from conftest import compose_config
from vpt.training.trainer import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_as_they_are(tmp_path, checkpointing):
    losses = {}
    for compiled in (False, True):
        config = compose_config(
            "+experiment=all", "+debug=two_steps", "training.steps=3", f"training.compile={compiled}",
            f"model.activation_checkpointing={checkpointing}",
        )  # fmt: skip
        trainer = Trainer(config, tmp_path / str(compiled))
        losses[compiled] = [
            trainer.train_step([batch.to("cpu") for batch in trainer.objective.dataset[step]], step).loss
            for step in range(3)
        ]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    stats = torch._dynamo.utils.counters["stats"]
    assert 0 < stats["unique_graphs"] < 40  # all layers and lengths share their graphs
