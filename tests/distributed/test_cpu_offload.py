"""`strategy.cpu_offload`: where shards wait changes no result."""

import pytest
import torch

from conftest import compose_config, losses
from vpt.distributed.process_group import init_process_group
from vpt.errors import ConfigError
from vpt.training.trainer import Trainer

SMALL = ("+experiment=dino", "+debug=two_steps", "training.batch_size=4", "data.limit=4", "training.steps=3")


@pytest.mark.slow
def test_a_run_is_the_same_and_goes_on(tmp_path):
    with init_process_group(device="cpu", always=True) as world:
        for name, offload in (("here", "false"), ("there", "true")):
            config = compose_config(*SMALL, "strategy=fsdp", f"strategy.cpu_offload={offload}")
            trainer = Trainer(config, tmp_path / name, world)
            trainer.fit()
            again = Trainer(config, tmp_path / name, world)
            ours, theirs = trainer.model.state_dict(), again.model.state_dict()
            assert all(torch.equal(tensor.full_tensor(), theirs[n].full_tensor()) for n, tensor in ours.items())
            del trainer, again, ours, theirs
        assert losses(tmp_path / "here") == losses(tmp_path / "there") and len(losses(tmp_path / "here")) == 3


@pytest.mark.parametrize("kind", ["auto", "single", "ddp"])
def test_it_is_for_shards(kind):
    with pytest.raises(ConfigError, match=f"not for strategy={kind}; type strategy=fsdp"):
        compose_config(f"strategy={kind}", "strategy.cpu_offload=true")
